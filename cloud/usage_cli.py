"""`isthmus quota` and `isthmus usage`: what tenants, devices and models may ask of the cloud, and what they asked."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cloud.connection import Connection, asks_whole_cloud
from isthmus.errors import InputError
from isthmus.terminal import JsonOption, note, show_record, show_table

quota_app = typer.Typer(no_args_is_help=True, help="Set, show and clear what tenants, devices and models may ask.")
usage_app = typer.Typer(add_completion=False, help="Show what was asked of the cloud.")

_HOUR: Final = 3600
_COUNTS: Final = ("answered", "cached", "limited", "refused", "failed", "cancelled", "bytes_in", "bytes_out", "calls")
TenantOption = Annotated[str, typer.Option(help="The tenant; * is each of them.")]
DeviceOption = Annotated[
    str, typer.Option(help="A device, or other caller; * is each. Default: all of the tenant's together.")
]
ModelOption = Annotated[str, typer.Option(help="A model; * is each. Default: all together.")]


@quota_app.command("set")
@asks_whole_cloud
def set_quota(
    tenant: TenantOption,
    device: DeviceOption = "",
    model: ModelOption = "",
    rate: Annotated[str, typer.Option(help="Requests in a time: 100/s, 5/min, 1000/h.")] = "",
    burst: Annotated[int | None, typer.Option(min=0, help="Requests at once. Default: one second's worth.")] = None,
    bytes_rate: Annotated[str, typer.Option(help="Bytes of requests in a time: 10MB/s.")] = "",
    bytes_burst: Annotated[str, typer.Option(help="Bytes at once: 50MB. Default: one second's worth.")] = "",
    concurrency: Annotated[int | None, typer.Option(min=0, help="Requests in progress.")] = None,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Set a quota in place of what was set for the same tenant, device and model; what is left out has no limit."""
    from cloud.quotas import Limits, Scope, parse_rate, parse_size
    from isthmus.v1 import usage_pb2

    most_bytes = parse_size(bytes_burst) if bytes_burst else None
    limits = Limits(  # what cannot be is refused here, with the names of the options
        rate=parse_rate(rate) if rate else None,
        burst=burst,
        bytes_rate=parse_rate(bytes_rate, sizes=True) if bytes_rate else None,
        bytes_burst=most_bytes,
        concurrency=concurrency,
    )
    message = usage_pb2.QuotaLimits(
        rate=rate, burst=burst, bytes_rate=bytes_rate, bytes_burst=most_bytes, concurrency=concurrency
    )
    scope = usage_pb2.QuotaScope(tenant=tenant, device=device, model=model)
    with connection.open() as (client, _):
        quota = usage_pb2.Quota(scope=scope, limits=message)
        warnings = client.set_quota(quota)
    if as_json:
        show_record("quota", _quota_row(quota) | {"warnings": warnings}, as_json=True)
        return
    what = "no limit" if limits.unlimited else "this quota"
    note(f"{Scope(tenant, device, model)}: {what} counts from now on")
    for text in warnings:
        note(f"warning: {text}")


@quota_app.command("show")
@asks_whole_cloud
def show_quotas(
    tenant: Annotated[str, typer.Option(help="Only this tenant's.")] = "",
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """List the quotas that are set; where none is, the cloud's configuration counts."""
    with connection.open(tenant=_own_if(tenant)) as (
        client,
        _,
    ):
        rows = [_quota_row(quota) for quota in client.quotas(tenant)]
    show_table("quotas", rows, as_json=as_json)


@quota_app.command("clear")
@asks_whole_cloud
def clear_quota(
    tenant: TenantOption,
    device: DeviceOption = "",
    model: ModelOption = "",
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Remove a quota: a less specific one counts then, or the cloud's configuration."""
    from cloud.quotas import Scope
    from isthmus.v1 import usage_pb2

    with connection.open() as (client, _):
        client.clear_quota(usage_pb2.QuotaScope(tenant=tenant, device=device, model=model))
    if as_json:
        shown = {"tenant": tenant, "device": device or None, "model": model or None, "cleared": True}
        show_record("quota", shown, as_json=True)
        return
    note(f"{Scope(tenant, device, model)}: cleared")


@usage_app.command()
@asks_whole_cloud
def usage(
    tenant: Annotated[str, typer.Option(help="Only this tenant's.")] = "",
    device: Annotated[str, typer.Option(help="Only of this device, or other caller.")] = "",
    model: Annotated[str, typer.Option(help="Only of this model.")] = "",
    since: Annotated[
        str, typer.Option(help="From then on: a time ago (24h, 30d), or 2026-11-01, or 2026-11-01T06:00; UTC.")
    ] = "",
    until: Annotated[str, typer.Option(help="Before then, in the same forms.")] = "",
    by: Annotated[
        str, typer.Option(help="What each row is for: some of tenant, device, model, version, hour.")
    ] = "tenant,model",
    of_triton: Annotated[
        bool, typer.Option("--triton", help="Instead: what Triton computed, by model and heavy version.")
    ] = False,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write CSV to this file; - is standard output.")
    ] = None,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Show requests, bytes and time, added up. Usage is kept by the hour: times are those of whole hours."""
    from google.protobuf.timestamp_pb2 import Timestamp

    from isthmus.v1 import usage_pb2

    groups = [name.strip() for name in by.split(",") if name.strip()]
    times = {
        "since": Timestamp(seconds=_hour("--since", since)) if since else None,
        "until": Timestamp(seconds=_hour("--until", until)) if until else None,
    }
    with connection.open(tenant=_own_if(tenant)) as (
        client,
        _,
    ):
        if of_triton:
            names = list(_COMPUTE)
            found = client.compute(usage_pb2.GetComputeRequest(**times))
            rows = [_compute_row(row) for row in found if model in ("", row.model)]
        else:
            names = [*groups, *_SHOWN]
            request = usage_pb2.GetUsageRequest(tenant=tenant, device=device, model=model, by=groups, **times)
            rows = [_usage_row(groups, row) for row in client.usage(request)]
    if csv_file is not None:
        _write_csv(csv_file, rows, names)
        return
    show_table("Triton" if of_triton else "usage", rows, as_json=as_json)


_COMPUTE: Final = (
    "model", "heavy_version", "answered", "failed", "inferences", "executions", "queue_s", "compute_s",
    "mean_compute_ms",
)  # fmt: skip
_SHOWN: Final = ("requests", *_COUNTS, "call_s", "mean_call_ms")


def _own_if(tenant: str) -> str | None:
    """Return which tenant to act in: the token's own where another one's figures are named, else the setting's."""
    return "" if tenant else None


def _quota_row(quota: Any) -> dict[str, Any]:
    scope, limits = quota.scope, quota.limits
    optional = {name: getattr(limits, name) if limits.HasField(name) else None for name in ("burst", "bytes_burst")}
    return {
        "tenant": scope.tenant,
        "device": scope.device or None,
        "model": scope.model or None,
        "rate": limits.rate or None,
        "burst": optional["burst"],
        "bytes_rate": limits.bytes_rate or None,
        "bytes_burst": optional["bytes_burst"],
        "concurrency": limits.concurrency if limits.HasField("concurrency") else None,
    }


def _usage_row(groups: Sequence[str], row: Any) -> dict[str, Any]:
    from cloud.fleet_rows import moment

    named = {name: moment(row.hour) if name == "hour" else getattr(row, name) for name in groups}
    counts = {name: getattr(row, name) for name in _COUNTS}
    requests = sum(counts[name] for name in _COUNTS[:6])
    times = {
        "call_s": round(row.call_us / 1e6, 6),
        "mean_call_ms": round(row.call_us / row.calls / 1e3, 3) if row.calls else None,
    }
    return named | {"requests": requests} | counts | times


def _compute_row(row: Any) -> dict[str, Any]:
    values = (
        row.model, row.heavy_version, row.answered, row.failed, row.inferences, row.executions,
        round(row.queue_ns / 1e9, 6), round(row.compute_ns / 1e9, 6),
        round(row.compute_ns / row.answered / 1e6, 3) if row.answered else None,
    )  # fmt: skip
    return dict(zip(_COMPUTE, values, strict=True))


def _hour(flag: str, text: str) -> int:
    """Return the Unix time at which the hour of a time began."""
    from security.durations import parse_duration

    try:
        then = datetime.fromisoformat(text)
    except ValueError:
        try:
            then = datetime.now(UTC) - parse_duration(text)
        except InputError as error:
            raise InputError(
                f"{flag}: expected a time such as 24h, 30d, 2026-11-01 or 2026-11-01T06:00, got {text[:40]!r}",
                hint="times are UTC, and count as the whole hours that they are in",
            ) from error
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return int(then.timestamp()) // _HOUR * _HOUR


def _write_csv(path: Path, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    if str(path) == "-":
        _write_rows(sys.stdout, rows, names)
        return
    with path.open("w", newline="") as file:
        _write_rows(file, rows, names)
    note(f"{len(rows)} rows in {path}")


def _write_rows(file: Any, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)
