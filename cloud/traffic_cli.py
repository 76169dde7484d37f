"""`isthmus traffic`: which versions answer requests, and which Tritons serve them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloud.connection import Connection, asks_cloud, asks_whole_cloud
from isthmus.errors import InputError
from isthmus.terminal import JsonOption, note, show_record, show_table
from security.durations import parse_duration

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(no_args_is_help=True, help="Spread requests over versions; drain and resume Tritons.")

ModelArgument = Annotated[str, typer.Argument(help="The model.")]
ReplicaArgument = Annotated[str, typer.Argument(metavar="TRITON", help="Its name in `isthmus traffic replicas`.")]
_SPLIT_HINT = "for example --canary 7=5%, or --ab 7=50%"


@app.command("set")
@asks_cloud
def set_traffic(
    model: ModelArgument,
    canary: Annotated[
        list[str] | None,
        typer.Option(help="A version and its share of the requests, by chance; repeat; none ends it.", metavar="N=P%"),
    ] = None,
    ab: Annotated[
        list[str] | None,
        typer.Option(help="The same, but always the same version for the same caller; repeat.", metavar="N=P%"),
    ] = None,
    by: Annotated[
        str, typer.Option(help="Request parameter that decides in an A/B test, instead of the caller.", metavar="NAME")
    ] = "",
    shadow: Annotated[
        str | None,
        typer.Option(help="A version that gets copies of a share of the requests; none ends it.", metavar="N=P%"),
    ] = None,
    shadow_at_once: Annotated[int, typer.Option(min=1, max=64, help="Copies under way at once.")] = 4,
    cache: Annotated[
        str | None, typer.Option(help="How long answers are kept for equal requests: 30s, 10m; 0 for never.")
    ] = None,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Change how requests for MODEL that name no version are spread; what is not named here stays as it is."""
    from cloud.traffic_client import TrafficClient
    from isthmus.v1 import traffic_pb2

    if canary and ab:
        raise InputError("expected --canary or --ab, got both", hint=_SPLIT_HINT)
    if by and not ab:
        raise InputError("--by goes with --ab", hint=_SPLIT_HINT)
    request = traffic_pb2.SetTrafficRequest(model=model)
    if canary or ab:
        request.split.CopyFrom(_split(canary, ab, by))
    if shadow is not None:
        request.shadow.CopyFrom(_shadow(shadow, shadow_at_once))
    if cache is not None:
        request.cache_s = 0 if cache == "0" else int(parse_duration(cache).total_seconds())
    if not any(request.HasField(part) for part in ("split", "shadow", "cache_s")):
        raise InputError("nothing to change", hint="name at least one of --canary, --ab, --shadow, --cache")
    with connection.open() as (client, _):
        record = TrafficClient(client).set(request)
    show_record("traffic", record if as_json else _flat(record), as_json=as_json)


@app.command()
@asks_cloud
def show(
    model: Annotated[str, typer.Argument(help="A model; all that have a policy by default.")] = "",
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Show policies, and what this cloud has counted since it started."""
    from cloud.traffic_client import TrafficClient

    with connection.open() as (client, _):
        records = TrafficClient(client).reports(model)
    if as_json:
        show_table("traffic", records, as_json=True)
        return
    show_table("traffic", [_flat(record) for record in records])
    for record in records:
        show_table(f"answers of {record['model']}", record["versions"])


@app.command()
@asks_cloud
def rollback(
    model: ModelArgument,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """End canary, A/B test and shadow of MODEL at once: the released version answers."""
    from cloud.traffic_client import TrafficClient

    with connection.open() as (client, _):
        record = TrafficClient(client).roll_back(model)
    if as_json:
        show_record("traffic", record, as_json=True)
    else:
        note(f"{model}@{record['released']} answers all requests that name no version")


@app.command()
@asks_whole_cloud
def replicas(
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Show the Tritons of the cloud."""
    from cloud.traffic_client import TrafficClient

    with connection.open() as (client, _):
        show_table("Tritons", TrafficClient(client).replicas(), as_json=as_json)


@app.command()
@asks_whole_cloud
def drain(
    replica: ReplicaArgument,
    wait: Annotated[str, typer.Option(help="How long to wait for its requests.")] = "30s",
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Send TRITON no new requests and wait for those that it has; then it can be stopped."""
    from cloud.traffic_client import TrafficClient

    wait_s = int(parse_duration(wait).total_seconds())
    with connection.open() as (client, _):
        row = TrafficClient(client).drain(replica, wait_s)
    show_table("Triton", [row], as_json=as_json)
    if row["under_way"]:
        note(f"{row['under_way']} requests still run there; drain it again to wait for them")


@app.command()
@asks_whole_cloud
def resume(
    replica: ReplicaArgument,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Let a drained TRITON serve again."""
    from cloud.traffic_client import TrafficClient

    with connection.open() as (client, _):
        show_table("Triton", [TrafficClient(client).resume(replica)], as_json=as_json)


def _split(canary: Sequence[str] | None, ab: Sequence[str] | None, by: str) -> Any:
    from isthmus.v1 import traffic_pb2

    kind = traffic_pb2.ASSIGNMENT_STICKY if ab else traffic_pb2.ASSIGNMENT_RANDOM
    split = traffic_pb2.Split(assignment=kind, key_parameter=by)
    for text in ab or canary or ():
        if text == "none":
            return traffic_pb2.Split()
        version, share = _version_and_share(text, "--ab" if ab else "--canary")
        split.shares.add(version=version, share=share)
    return split


def _shadow(text: str, at_once: int) -> Any:
    from isthmus.v1 import traffic_pb2

    if text == "none":
        return traffic_pb2.Shadow()
    version, share = _version_and_share(text, "--shadow")
    return traffic_pb2.Shadow(version=version, share=share, most_at_once=at_once)


def _version_and_share(text: str, option: str) -> tuple[int, float]:
    version, equals, share = text.partition("=")
    number = share.strip().removesuffix("%")
    try:
        if not equals or not share.endswith("%") or not version.isascii():
            raise ValueError(text)
        return int(version), float(number) / 100
    except ValueError as error:
        raise InputError(f"{option}: expected VERSION=SHARE%, got {text[:40]!r}", hint=_SPLIT_HINT) from error


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    shown = ("model", "policy", "by", "released", "changed_at", "changed_by", "cache_hits", "cache_misses")
    flat = {name: record[name] for name in shown if name in record}
    if record.get("shadow") and "shadow_outcomes" in record:
        flat["shadow outcomes"] = ", ".join(f"{name} {count}" for name, count in record["shadow_outcomes"].items())
    return flat
