"""`isthmus model` and `isthmus device`: what an operator does with models and devices of a cloud."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cloud.config import OperatorSettings
from cloud.connection import Connection, asks_cloud
from isthmus.errors import ConfigError, InputError
from isthmus.terminal import JsonOption, note, progress, show_record, show_table

model_app = typer.Typer(no_args_is_help=True, help="Publish, release and list model versions.")
device_app = typer.Typer(no_args_is_help=True, help="Invite, revoke, list, label, pin and retry devices.")

DeviceArgument = Annotated[str, typer.Argument(help="The device's name.")]
KeyOption = Annotated[
    list[Path] | None,
    typer.Option("--key", help="Key file of another holder, where several must sign; repeat for more.", metavar="FILE"),
]


@model_app.command()
@asks_cloud
def publish(
    bundle: Annotated[Path, typer.Argument(help="Folder that `isthmus compile` made.")],
    operator: Annotated[Path | None, typer.Option(help="The workspace's operator folder.")] = None,
    release: Annotated[bool, typer.Option("--release/--no-release", help="Move devices to it at once.")] = True,
    rollback_floor: Annotated[
        str | None,
        typer.Option(
            metavar="N|none",
            help="Oldest version to which devices that ran this one may go back. Default: the released one.",
        ),
    ] = None,
    key: KeyOption = None,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Upload, sign and publish BUNDLE; devices move to it unless --no-release is given."""
    from cloud.client import Progress

    started = time.monotonic()
    with connection.open(operator=operator) as (client, settings):
        operator_dir = _operator(settings)
        with progress() as display:
            task = display.add_task("upload", total=None)
            told = Progress(
                found=lambda total: display.update(task, total=max(total, 1)),
                sent=lambda count: display.advance(task, count),
                waiting=lambda what: display.update(display.add_task(what, total=None), visible=True),
            )
            record = client.publish(
                bundle,
                operator_dir,
                release=release,
                rollback_floor=_parse_floor(rollback_floor),
                keys=key or (),
                progress=told,
            )
    if as_json:
        show_record("published", record, as_json=True)
        return
    deltas = record.pop("deltas")
    show_record("published", record)
    if deltas:
        show_table("deltas that were prepared", deltas)
    note(f"done in {time.monotonic() - started:.1f} s")


@model_app.command()
@asks_cloud
def withdraw(
    version: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="For example triage@3.")],
    reason: Annotated[str, typer.Option(help="Why; devices and logs show it.", metavar="TEXT")],
    operator: Annotated[Path | None, typer.Option(help="The operator folder that published it.")] = None,
    key: KeyOption = None,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Sign that no device may install a version any more; its open rollout stops, and it is never released again."""
    model, number = parse_version(version)
    with connection.open(operator=operator) as (client, settings):
        record = client.withdraw(model, number, reason, _operator(settings), keys=key or ())
    show_record("withdrawn", record, as_json=as_json)
    if record["released"] or record["rollouts"]:
        by = "the release" if record["released"] else f"rollout {record['rollouts'][0]}"
        note(f"{by} still tells devices {version}: release another one (isthmus model release)")


@model_app.command()
@asks_cloud
def release(
    version: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="For example triage@3.")],
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Make a published version the one that devices run; they go back no further than a rollback floor says."""
    model, number = parse_version(version)
    with connection.open() as (client, _):
        before = [row for row in client.list_versions() if row["model"] == model and row["released"]]
        client.release(model, number)
    kept = [
        row["version"]
        for row in before
        if number < row["version"] and (row["rollback_floor"] is None or number < row["rollback_floor"])
    ]
    if as_json:
        replaced = [row["version"] for row in before]
        show_record("released", {"model": model, "version": number, "replaced": replaced, "kept": kept}, as_json=True)
        return
    note(f"devices move to {model}@{number}")
    for old in kept:
        note(
            f"devices that ran {model}@{old} refuse to go back so far and keep it; "
            "to undo a version, publish the older model under a new one"
        )


@model_app.command()
@asks_cloud
def export(
    version: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="For example triage@3.")],
    output: Annotated[Path, typer.Option(help="Folder to make; a tar file where it ends in .tar.", metavar="DIR")],
    from_version: Annotated[
        list[int] | None, typer.Option(help="A version that devices have: adds deltas from it; repeat.", metavar="N")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="A variant to write; all by default; repeat.")] = None,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Write a version to a folder or USB stick, for devices without a network: isthmus edge import installs it."""
    from cloud.client import Progress

    model, number = parse_version(version)
    with connection.open() as (client, _), progress() as display:
        task = display.add_task("export", total=None)
        told = Progress(
            found=lambda total: display.update(task, total=max(total, 1)),
            sent=lambda count: display.advance(task, count),
        )
        record = client.export(model, number, output, bases=from_version or (), variants=variant or (), progress=told)
    show_record("exported", record, as_json=as_json)


@model_app.command("list")
@asks_cloud
def list_models(
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """List the published versions of all models."""
    with connection.open() as (client, _):
        show_table("published versions", client.list_versions(), as_json=as_json)


@device_app.command()
@asks_cloud
def invite(
    device: Annotated[str, typer.Argument(help="How the device shall be called.")],
    ttl: Annotated[str, typer.Option(help="How long the code is valid: 15m, 12h, 30d.")] = "1h",
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Make a one-time enrolment code for DEVICE."""
    from security.durations import parse_duration

    ttl_s = int(parse_duration(ttl).total_seconds())
    with connection.open() as (client, _):
        record = client.invite(device, ttl_s=ttl_s)
    show_record("invitation", record, as_json=as_json)


@device_app.command()
@asks_cloud
def revoke(
    device: Annotated[str, typer.Argument(help="The device's name; may be left out with --key.")] = "",
    key: Annotated[
        str, typer.Option(help="SHA-256 of one public key, as isthmus device show prints it.", metavar="DIGEST")
    ] = "",
    reason: Annotated[str, typer.Option(help="Why, for the record.", metavar="TEXT")] = "",
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Refuse DEVICE and its key within seconds, what it has open included. It comes back by a new invitation only."""
    if not device and not key:
        raise InputError("expected a device or --key", hint="isthmus device revoke camera-1 --reason stolen")
    with connection.open() as (client, _):
        record = client.revoke(device, key_sha256=key, reason=reason)
    show_record("revoked", record, as_json=as_json)


@device_app.command("list")
@asks_cloud
def list_devices(
    selector: Annotated[str, typer.Option(help="Only devices with these labels: group=line-3,site=a.")] = "",
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """List the devices with what they are told and what they last reported."""
    labels = parse_labels([selector] if selector else [])
    with connection.open() as (client, _):
        show_table("devices", client.list_devices(labels), as_json=as_json)


def _operator(settings: OperatorSettings) -> Path:
    if settings.operator is None:
        raise ConfigError(
            "the setting operator is not set",
            hint="--operator or ISTHMUS_OPERATOR names the workspace's operator folder, which signs bundles",
        )
    return settings.operator


def _parse_floor(text: str | None) -> int | None:
    if text is None:
        return None
    if text == "none":
        return 0
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"--rollback-floor: expected a version or none, got {text[:40]!r}")
    return int(text)


@device_app.command()
@asks_cloud
def show(
    device: DeviceArgument,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Show what DEVICE is, what it is told, what it reported and what happened to it."""
    with connection.open() as (client, _):
        record = client.device(device)
    if as_json:
        show_record("device", record, as_json=True)
        return
    models, history = record.pop("models"), record.pop("history")
    record["labels"] = ", ".join(f"{key}={value}" for key, value in record["labels"].items()) or None
    show_record("device", record)
    for model in models:
        show_record(f"model {model.pop('model')}", model)
    show_table("history, newest first", history)


@device_app.command()
@asks_cloud
def label(
    device: DeviceArgument,
    labels: Annotated[list[str], typer.Argument(help="group=line-3 sets a label, group- removes it.")],
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Set and remove labels of DEVICE; a rollout that is under way takes in, or lets go, who it is for then."""
    remove = [text[:-1] for text in labels if text.endswith("-") and "=" not in text]
    wanted = parse_labels([text for text in labels if "=" in text or not text.endswith("-")])
    with connection.open() as (client, _):
        show_record(f"labels of {device}", client.set_labels(device, wanted, remove), as_json=as_json)


@device_app.command()
@asks_cloud
def pin(
    device: DeviceArgument,
    version: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="triage@3; with --release just triage.")],
    release: Annotated[bool, typer.Option("--release", help="Follow releases and rollouts again.")] = False,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Hold DEVICE at one version of a model, whatever is released or rolled out."""
    model, number = (version.partition("@")[0], 0) if release else parse_version(version)
    with connection.open() as (client, _):
        if release:
            client.unpin(device, model)
        else:
            client.pin(device, model, number)
    if as_json:
        show_record("pin", {"device": device, "model": model, "pinned": number or None}, as_json=True)
        return
    note(f"{device} follows releases of {model}" if release else f"{device} is held at {model}@{number}")


@device_app.command()
@asks_cloud
def retry(
    device: DeviceArgument,
    model: Annotated[str, typer.Argument(help="For example triage.")],
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Have DEVICE try again the version of MODEL that failed on it."""
    with connection.open() as (client, _):
        attempt = client.retry(device, model)
    if as_json:
        show_record("retry", {"device": device, "model": model, "attempt": attempt}, as_json=True)
        return
    note(f"{device} tries {model} again (attempt {attempt})")


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """Return the labels in texts such as "group=line-3,site=a".

    Raises:
        InputError: One has no name or no value, or comes twice.
    """
    labels: dict[str, str] = {}
    for text in (part.strip() for whole in texts for part in whole.split(",")):
        key, equals, value = text.partition("=")
        if not equals or not key or not value or labels.get(key, value) != value:
            raise InputError(f"expected labels such as group=line-3, each once, got {text!r}")
        labels[key] = value
    return labels


def parse_version(text: str) -> tuple[str, int]:
    """Return model and version in a text such as "triage@3".

    Raises:
        InputError: It names none.
    """
    model, at, number = text.rpartition("@")
    if not at or not model or not number.isdecimal():
        raise InputError(
            f"expected MODEL@VERSION, for example triage@3, got {text!r}", hint="isthmus model list shows what there is"
        )
    return model, int(number)
