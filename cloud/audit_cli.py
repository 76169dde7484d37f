"""`isthmus audit`: verify, search and export the audit log, where it lies or over the wire, and keep its heads."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloud.connection import Connection, asks_cloud, asks_whole_cloud
from isthmus.errors import InputError, TrustError
from isthmus.terminal import JsonOption, note, show_record, show_table

if TYPE_CHECKING:
    from cloud.client import CloudClient
    from security.audit.reading import Query

app = typer.Typer(no_args_is_help=True, help="Verify, search and export the audit log.")

_STATE: Final = Path("state") / "audit"
_DECISIONS: Final = ("allowed", "done", "failed", "refused")
_SHOWN: Final = ("at", "decision", "action", "subject", "model", "version", "device", "rollout", "reason")

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="The workspace's cloud folder, on the cloud's machine.", metavar="DIR")
]
FolderOption = Annotated[
    Path | None, typer.Option("--folder", help="The log, or a copy of it, where it is not in --home.", metavar="DIR")
]
SinceOption = Annotated[
    str | None, typer.Option(help="From then on: 2026-11-30T12:00, or so long ago: 90s, 15m, 12h, 30d.")
]
UntilOption = Annotated[str | None, typer.Option(help="Before then, written as --since.")]


@app.command()
def verify(
    home: HomeOption = None,
    folder: FolderOption = None,
    keys: Annotated[
        Path | None, typer.Option(help="Public keys, audit.pub, from somewhere safe; default: in --home.")
    ] = None,
    head: Annotated[
        list[Path] | None,
        typer.Option(help="A head that was kept elsewhere and must be in the log; repeat.", metavar="FILE"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every record, checkpoint and chain; name the first one that is wrong, and exit with 5."""
    from security.audit.keys import PUBLIC, load_public_keys
    from security.audit.verification import verify as check

    log, public = _local(home, folder), keys or (None if home is None else home / PUBLIC)
    if public is None:
        raise InputError("expected public keys", hint="--keys names audit.pub; --home DIR/cloud has it, too")
    kept = [kept for file in head or () for kept in _read_heads(file)]
    reports = check(log, load_public_keys(public), kept)
    wrong = [report for report in reports if report.problem is not None]
    if as_json:
        chains = [asdict(report) | {"sound": report.problem is None} for report in reports]
        show_record("audit log", {"sound": not wrong, "folder": str(log), "chains": chains}, as_json=True)
    else:
        rows = [
            {
                "chain": report.chain,
                "sound": report.problem is None,
                "records": report.records,
                "checkpoints": report.checkpoints,
                "first": report.first_at[:19],
                "last": report.last_at[:19],
            }
            for report in reports
        ]
        show_table(f"audit log {log}", rows)
        for report in reports:
            for text in report.notes:
                note(f"{report.chain}: {text}")
    if wrong:
        chain, problem = wrong[0].chain, wrong[0].problem
        assert problem is not None  # noqa: S101 - chosen for it
        where = f" ({problem.file}{f', line {problem.line}' if problem.line else ''})" if problem.file else ""
        raise TrustError(
            f"chain {chain} was {problem.kind} at record {problem.seq}: {problem.message}{where}",
            hint="docs/security.md says what to do when the log was tampered with",
            reason=problem.kind,
        )


@app.command("search")
@asks_cloud
def search_records(
    action: Annotated[str, typer.Option(help="Part of the action: Invite, rollout., ModelInfer.")] = "",
    subject: Annotated[str, typer.Option(help="Who.")] = "",
    decision: Annotated[str, typer.Option(help="allowed, done, failed or refused.")] = "",
    reason: Annotated[str, typer.Option(help="Why.")] = "",
    model: Annotated[str, typer.Option(help="Which model.")] = "",
    version: Annotated[int, typer.Option(help="Which version of it.")] = 0,
    device: Annotated[str, typer.Option(help="Which device.")] = "",
    rollout: Annotated[str, typer.Option(help="Which rollout.")] = "",
    request_id: Annotated[str, typer.Option(help="Which request.")] = "",
    since: SinceOption = None,
    until: UntilOption = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The newest so many.")] = 100,
    home: HomeOption = None,
    folder: FolderOption = None,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Show matching records, oldest first: of --home or --folder, or else asked of the cloud, of one tenant."""
    from security.audit.reading import Query
    from security.audit.reading import search as look

    if decision and decision not in _DECISIONS:
        raise InputError(f"--decision: expected one of {', '.join(_DECISIONS)}, got {decision[:40]!r}")
    query = Query(
        action=action, subject=subject, decision=decision, reason=reason, model=model, version=version, device=device,
        rollout=rollout, request_id=request_id, since=_time("--since", since), until=_time("--until", until),
    )  # fmt: skip
    if home is not None or folder is not None:
        records = list(deque(look(_local(home, folder), query), maxlen=limit))
    else:
        with connection.open() as (client, _):
            records = list(_asked(client, query, limit))
    if as_json:
        show_table("records", records, as_json=True)
        return
    show_table("records", [_row(record) for record in records])


@app.command()
@asks_cloud
def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="Gets the records: one JSON object a line.")],
    since: SinceOption = None,
    until: UntilOption = None,
    home: HomeOption = None,
    folder: FolderOption = None,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Write records to a file; where the log is at hand (--home, --folder) with the checkpoints that are in it."""
    from security.audit.reading import Query, search
    from security.audit.records import canonical

    query, count = Query(since=_time("--since", since), until=_time("--until", until)), 0
    with output.open("wb") as file:
        output.chmod(0o600)
        if home is not None or folder is not None:
            for record in search(_local(home, folder), query, all_kinds=True):
                file.write(canonical(record) + b"\n")
                count += 1
        else:
            with connection.open() as (client, _):
                for lines in client.export_records(_times(query)):
                    file.write(lines)
                    count += lines.count(b"\n")
    show_record("exported", {"file": str(output), "records": count}, as_json=as_json)


@app.command("head")
@asks_whole_cloud
def show_heads(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep the heads here, away from the cloud.", metavar="FILE")
    ] = None,
    home: HomeOption = None,
    folder: FolderOption = None,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Show the signed head of every chain; kept elsewhere, it proves later what the log was (verify --head)."""
    from security.audit.records import parse_head

    if home is not None or folder is not None:
        heads = [path.read_bytes() for path in sorted(_local(home, folder).glob("*.head"))]
    else:
        with connection.open() as (client, _):
            heads = client.audit_heads()
    parsed = [parse_head(data) for data in heads]
    if output is not None:
        output.write_bytes(b"".join(head.to_json() for head in parsed))
    rows = [{"chain": head.chain, "record": head.seq, "at": head.at, "hash": head.hash} for head in parsed]
    show_table("heads", rows, as_json=as_json)


@app.command("rotate-key")
def rotate_key(
    home: Annotated[Path, typer.Option("--home", help="The workspace's cloud folder.", metavar="DIR")],
    as_json: JsonOption = False,
) -> None:
    """Replace the key that signs checkpoints; restart the cloud, and hand audit.pub to whoever verifies."""
    from security.audit.keys import PUBLIC, rotate_audit_key

    key_id = rotate_audit_key(home)
    show_record("audit key", {"key": key_id, "public_keys": str(home / PUBLIC)}, as_json=as_json)
    note("restart the cloud: it signs with the new key from then on. Hand audit.pub to whoever verifies")


def _local(home: Path | None, folder: Path | None) -> Path:
    if folder is None and home is None:
        raise InputError("expected the log", hint="--home DIR/cloud on the cloud's machine, or --folder with a copy")
    return folder if folder is not None else home / _STATE if home is not None else _STATE


def _read_heads(file: Path) -> Iterator[Any]:
    from security.audit.records import parse_head
    from security.keyfiles import read_file

    for line in read_file(file, hint="isthmus audit head --output FILE writes it").splitlines():
        yield parse_head(line)


def _asked(client: CloudClient, query: Query, limit: int) -> Iterator[dict[str, Any]]:
    texts = ("action", "subject", "decision", "reason", "model", "device", "rollout", "request_id", "version")
    fields = {name: getattr(query, name) for name in texts}
    for line in client.search_records(fields | _times(query) | {"limit": limit}):
        yield json.loads(line)


def _times(query: Query) -> dict[str, datetime]:
    return {name: value for name in ("since", "until") if (value := getattr(query, name)) is not None}


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    row = {name: record.get(name) for name in _SHOWN}
    row["at"] = str(row["at"])[:23]
    row["action"] = str(row["action"]).rpartition("/")[2]
    row["version"] = str(row["version"] or "") or None
    detail = record.get("detail")
    row["detail"] = " ".join(f"{key}={value}" for key, value in detail.items()) if isinstance(detail, dict) else None
    return row


def _time(flag: str, text: str | None) -> datetime | None:
    """Return the time that somebody wrote.

    Raises:
        InputError: It is none.
    """
    from security.durations import parse_duration

    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        try:
            return datetime.now(UTC) - parse_duration(text)
        except InputError as error:
            raise InputError(
                f"{flag}: expected a time such as 15m, 24h, 30d, 2026-11-30 or 2026-11-30T12:00, got {text[:40]!r}",
                hint="times without a zone are UTC",
            ) from error
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at
