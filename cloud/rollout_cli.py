"""`isthmus rollout`: staged activation of a version, from the plan to the end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloud.connection import Connection, asks_cloud
from cloud.operator_cli import parse_labels, parse_version
from isthmus.errors import InputError
from isthmus.terminal import JsonOption, note, show_record, show_table

if TYPE_CHECKING:
    from cloud.client import CloudClient

app = typer.Typer(no_args_is_help=True, help="Roll a version out in stages, watch, pause, resume and abort.")

_WATCH_S: Final = 1.0
_OPEN: Final = ("active", "paused")
RolloutArgument = Annotated[str, typer.Argument(help="The rollout, or its model: the newest one of it then.")]


@app.command()
@asks_cloud
def start(
    version: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="For example triage@3.")],
    stages: Annotated[
        str, typer.Option(help="Shares or numbers of devices, all stages before included; the last is 100%.")
    ] = "1%,10%,50%,100%",
    soak: Annotated[
        str, typer.Option(help="How long the version must stand on a device: 10m; one for all, or one each.")
    ] = "10m",
    to: Annotated[list[str] | None, typer.Option(help="Only devices with these labels: group=line-3,site=a.")] = None,
    max_failure_rate: Annotated[str, typer.Option(help="Share of the devices that may fail.")] = "5%",
    max_failures: Annotated[int, typer.Option(min=0, help="Failed devices that stop it at once; 0: no number.")] = 0,
    max_error_rate: Annotated[
        str, typer.Option(help="Share of a device's requests that may fail; 0%: no limit.")
    ] = "2%",
    min_agreement: Annotated[str, typer.Option(help="Agreement with the heavy model; 0%: no limit.")] = "0%",
    max_latency_ratio: Annotated[float, typer.Option(min=0, help="Median latency, new over old; 0: no limit.")] = 0.0,
    min_samples: Annotated[int, typer.Option(min=1, help="Requests or audits below which rates say nothing.")] = 100,
    confidence: Annotated[str, typer.Option(help="With which a limit is broken before a stage's end.")] = "99%",
    done_share: Annotated[str, typer.Option(help="Share of a stage's online devices that must be done.")] = "95%",
    stage_limit: Annotated[str, typer.Option(help="When a stage is decided on what there is.")] = "24h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and do nothing.")] = False,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Move devices to MODEL@VERSION stage by stage; a bad version stops by itself and everybody goes back."""
    from isthmus.v1 import fleet_pb2

    model, number = parse_version(version)
    request = fleet_pb2.StartRolloutRequest(
        model=model,
        version=number,
        stages=_stages(stages, soak),
        selector=parse_labels(to or []),
        gates=fleet_pb2.RolloutGates(
            max_failure_rate=_share("--max-failure-rate", max_failure_rate), max_failures=max_failures,
            confidence=_share("--confidence", confidence), max_error_rate=_share("--max-error-rate", max_error_rate),
            min_agreement=_share("--min-agreement", min_agreement), max_latency_ratio=max_latency_ratio,
            min_samples=min_samples, done_share=_share("--done-share", done_share),
            stage_limit_s=_seconds("--stage-limit", stage_limit),
        ),
        dry_run=True,
    )  # fmt: skip
    with connection.open() as (client, _):
        plan = client.start_rollout(request)  # shown before anything is done
        if not as_json:
            _show_plan(plan)
        if not dry_run:
            request.dry_run = False
            plan = client.start_rollout(request)
    if as_json:
        show_record("rollout", _plan_record(plan), as_json=True)
    elif dry_run:
        note("nothing was started")
    else:
        note(f"rollout {plan.rollout.id} runs; isthmus rollout status {plan.rollout.id} --watch follows it")


@app.command()
@asks_cloud
def status(
    rollout: RolloutArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again until it is over.")] = False,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Show how a rollout stands, what it waits for and what happened."""
    with connection.open() as (client, _):
        if watch and not as_json:
            _watch(client, rollout)
            return
        answer = client.rollout(rollout)
    from cloud.fleet_rows import event_rows, rollout_record

    record = rollout_record(answer.rollout) | {"history": event_rows(answer.events)}
    if as_json:
        show_record("rollout", record, as_json=True)
        return
    history, stages = record.pop("history"), record.pop("stages")
    show_record("rollout", _flat(record))
    show_table("stages", stages)
    show_table("history, newest first", history)


def _watch(client: CloudClient, rollout: str) -> None:
    """Redraw one table until the rollout is over; the last state stays on the screen."""
    from rich.console import Group
    from rich.live import Live

    from cloud.fleet_rows import rollout_record
    from isthmus.terminal import record_table, table

    with Live(auto_refresh=False) as live:
        while True:
            record = rollout_record(client.rollout(rollout).rollout)
            stages = record.pop("stages")
            live.update(Group(record_table("rollout", _flat(record)), table("stages", stages)), refresh=True)
            if record["state"] not in _OPEN:
                return
            time.sleep(_WATCH_S)


@app.command()
@asks_cloud
def pause(
    rollout: RolloutArgument,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Tell no further device until `resume`; devices that took the version keep it."""
    _change("pause", rollout, connection, as_json=as_json)


@app.command()
@asks_cloud
def resume(
    rollout: RolloutArgument,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Go on with a paused rollout; its stage gets its whole time again."""
    _change("resume", rollout, connection, as_json=as_json)


@app.command()
@asks_cloud
def abort(
    rollout: RolloutArgument,
    reason: Annotated[str, typer.Option(help="For the record.")] = "",
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """End a rollout and send every device that took the version back."""
    _change("abort", rollout, connection, as_json=as_json, reason=reason)


@app.command("list")
@asks_cloud
def list_rollouts(
    model: Annotated[str, typer.Option(help="Only those of one model.")] = "",
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """List the rollouts, newest first."""
    from cloud.fleet_rows import rollout_row

    with connection.open() as (client, _):
        rows = [rollout_row(rollout) for rollout in client.rollouts(model)]
    show_table("rollouts", rows, as_json=as_json)


def _change(change: str, name: str, connection: Connection, *, as_json: bool, reason: str = "") -> None:
    from cloud.fleet_rows import rollout_record

    with connection.open() as (client, _):
        rollout = client.change_rollout(change, name, reason)
    if as_json:
        show_record("rollout", rollout_record(rollout), as_json=True)
        return
    done = {"pause": "is paused", "resume": "goes on", "abort": "is aborted: its devices go back"}
    note(f"rollout {rollout.id} {done[change]}")


def _plan_record(answer: Any) -> dict[str, Any]:
    from cloud.fleet_rows import rollout_record

    return rollout_record(answer.rollout) | {
        "matching": answer.matching,
        "left_out": [{"device": row.device_id, "reason": row.reason, "detail": row.detail} for row in answer.left_out],
        "warnings": list(answer.warnings),
    }


def _show_plan(answer: Any) -> None:
    record = _plan_record(answer)
    target = f"{record['model']}@{record['version']}"
    labels = ", ".join(f"{key}={value}" for key, value in record["to"].items()) or "all devices"
    before = f"{record['model']}@{record['from_version']}" if record["from_version"] else "nothing"
    note(f"{target} instead of {before}, to {labels}: {record['matching']} devices")
    rows = [{name: row[name] for name in ("stage", "size", "devices", "soak_s")} for row in record["stages"]]
    show_table("plan", rows)
    if record["left_out"]:
        show_table("devices that are left out", record["left_out"])
    for warning in record["warnings"]:
        note(f"warning: {warning}")


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record whose inner records are lines of text."""
    return {
        name: ", ".join(f"{key}={number}" for key, number in value.items()) or None
        if isinstance(value, dict)
        else value
        for name, value in record.items()
    }


def _stages(stages: str, soak: str) -> list[Any]:
    from isthmus.v1 import fleet_pb2

    sizes, soaks = stages.split(","), soak.split(",")
    if len(soaks) not in (1, len(sizes)):
        raise InputError(f"--soak: expected one time, or one for each of the {len(sizes)} stages, got {len(soaks)}")
    soaks = soaks * len(sizes) if len(soaks) == 1 else soaks
    made = []
    for size, time_text in zip(sizes, soaks, strict=True):
        soak_s = _seconds("--soak", time_text)
        if size.strip().isdecimal():
            made.append(fleet_pb2.RolloutStage(count=min(int(size), 2**31), soak_s=soak_s))
        else:
            made.append(fleet_pb2.RolloutStage(share=_share("--stages", size), soak_s=soak_s))
    return made


def _share(flag: str, text: str) -> float:
    """Return the share that a percentage is."""
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / 100
    except ValueError:
        value = -1.0
    if not percent or rest or not 0.0 <= value <= 1.0:
        raise InputError(f"{flag}: expected a percentage from 0% to 100%, got {text!r}")
    return value


def _seconds(flag: str, text: str) -> int:
    from security.durations import parse_duration

    if text.strip() in ("0", "0s"):
        return 0
    try:
        return int(parse_duration(text.strip()).total_seconds())
    except InputError as error:
        raise InputError(f"{flag}: {error.message}", hint=error.hint) from error
