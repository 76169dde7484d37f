"""`isthmus keys` and `isthmus token`: parse, call, print. No secret is printed, but a token that was asked for."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from isthmus.errors import InputError
from isthmus.terminal import JsonOption, note, show_record, show_table

if TYPE_CHECKING:
    from security.workspace import Entry

keys_app = typer.Typer(no_args_is_help=True, help="Create and inspect the keys and certificates of a workspace.")
token_app = typer.Typer(no_args_is_help=True, help="Mint and inspect access tokens.")

_PORT: Final = 8443
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_NEXT_STEPS: Final = """\
Made the workspace {root}:
  {root}/operator  keep offline: signs models and certificates. Back it up; nothing can replace it.
  {root}/cloud     copy to the machine that runs `isthmus cloud serve`.
  {root}/trust     public: copy to every device and operator.

Next:
  isthmus cloud serve --home {root}/cloud{listen}
  isthmus token mint --home {root}/cloud --role operator --subject YOU --ttl 12h --output operator.token
  isthmus device invite DEVICE --cloud {host}:{port} --trust {root}/trust --token-file operator.token"""


@keys_app.callback()
def keys() -> None:
    """Keep `keys` a group."""


@keys_app.command("init")
def init(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make; must not exist or be empty.")],
    host: Annotated[
        list[str], typer.Option("--host", help="DNS name or IP address of the cloud; repeat for more.", metavar="NAME")
    ],
    name: Annotated[str, typer.Option("--name", help="Your organisation, for certificates and tokens.")] = "isthmus",
) -> None:
    """Make a workspace: authorities, certificates, token and update keys."""
    from security.workspace import init_workspace

    init_workspace(root, host, name, datetime.now(UTC))
    local = all(name in _LOOPBACK for name in host)
    listen = "" if local else f" --listen 0.0.0.0:{_PORT}"  # the default is reachable from this machine only
    note(_NEXT_STEPS.format(root=root, host=host[0], port=_PORT, listen=listen))


@keys_app.command("show")
def show(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="The workspace, or the part of one that is here.")],
    as_json: JsonOption = False,
) -> None:
    """List every key, certificate and metadata file: role, algorithm and expiry, never a secret."""
    from security.workspace import describe_workspace

    now = datetime.now(UTC)
    rows = [_row(entry, now) for entry in describe_workspace(root)]
    if as_json:
        show_table(f"Workspace {root}", rows, as_json=True)
    else:  # what fits a narrow terminal: the file's suffix says the kind, the day is enough
        show_table(f"Workspace {root}", [{**_without(row, "kind"), "expires": _day(row)} for row in rows])
    expired = [row["file"] for row in rows if (row["days_left"] or 0) < 0]
    if expired:
        note(f"expired: {', '.join(expired)}")


def _row(entry: Entry, now: datetime) -> dict[str, Any]:
    until = entry.expires_at
    return {
        "file": entry.file,
        "role": entry.role,
        "kind": entry.kind,
        "algorithm": entry.algorithm,
        "expires": None if until is None else until.isoformat(),
        "days_left": None if until is None else (until - now).days,
    }


def _without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def _day(row: dict[str, Any]) -> str | None:
    return None if row["expires"] is None else str(row["expires"])[:10]


@token_app.callback()
def token() -> None:
    """Keep `token` a group."""


@token_app.command("mint")
def mint(
    home: Annotated[Path, typer.Option("--home", help="The workspace's cloud folder.", metavar="DIR")],
    role: Annotated[str, typer.Option("--role", help="operator, client or device.")],
    subject: Annotated[str, typer.Option("--subject", help="Whom the token is for.", metavar="NAME")],
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model that it allows; repeat for more. Default: all.")
    ] = None,
    ttl: Annotated[str, typer.Option("--ttl", help="How long it is valid: 15m, 12h, 30d.")] = "1h",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it here (0600), not to stdout.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Mint an access token."""
    from security.durations import parse_duration
    from security.keyfiles import PRIVATE_MODE, replace_file
    from security.tokens import ALL_MODELS, TokenIssuer

    issuer = TokenIssuer.load(home)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise InputError(f"cannot write {output}", hint="--output needs a file in a folder that exists")
    text, expires_at = issuer.mint(subject, role, models=model or [ALL_MODELS], ttl=parse_duration(ttl))
    record: dict[str, Any] = {"subject": subject, "role": role, "expires": expires_at.isoformat()}
    if output is not None:
        replace_file(output, text.encode() + b"\n", mode=PRIVATE_MODE)
        record["file"] = str(output)
    elif as_json:
        record["token"] = text
    else:
        typer.echo(text)
    if as_json:
        show_record("Token", record, as_json=True)
        return
    where = "" if output is None else f" in {output}"
    note(f"token for {subject} ({role}){where}, valid until {expires_at.isoformat()}")


@token_app.command("inspect")
def inspect(
    text: Annotated[str, typer.Argument(metavar="TOKEN", help="The token, or - to read it from standard input.")],
    home: Annotated[
        Path | None, typer.Option("--home", help="The workspace's cloud folder, to verify it, too.", metavar="DIR")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a token says, without its signature; with --home also whether it is valid."""
    from security.jws import MAX_TOKEN_BYTES
    from security.tokens import TokenIssuer, describe_token

    value = (sys.stdin.buffer.read(MAX_TOKEN_BYTES + 1).decode("ascii", "replace") if text == "-" else text).strip()
    record = describe_token(value)
    if home is None:
        record["verified"] = "not checked"
        note("not verified: --home DIR/cloud checks the signature, too")
    else:
        TokenIssuer.load(home).verifier().verify(value)
        record["verified"] = "valid"
    show_record("Token", record, as_json=as_json)
