"""`isthmus model` and `isthmus device`: what an operator does with models and devices of a cloud."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloud.config import OperatorSettings
from isthmus.errors import ConfigError, InputError
from isthmus.settings import load_settings
from isthmus.terminal import JsonOption, note, progress, show_record, show_table

if TYPE_CHECKING:
    from cloud.client import CloudClient

model_app = typer.Typer(no_args_is_help=True, help="Publish, release and list model versions.")
device_app = typer.Typer(no_args_is_help=True, help="Invite, revoke, list, label, pin and retry devices.")

CloudOption = Annotated[str | None, typer.Option(help="HOST:PORT of the cloud.")]
TrustOption = Annotated[Path | None, typer.Option(help="Folder with ca.pem.")]
TokenOption = Annotated[Path | None, typer.Option(help="File with an operator's token.")]
TenantOption = Annotated[
    str | None, typer.Option(help="Tenant to act in, for admins of the cloud. Default: the token's own.")
]
DeviceArgument = Annotated[str, typer.Argument(help="The device's name.")]
KeyOption = Annotated[
    list[Path] | None,
    typer.Option("--key", help="Key file of another holder, where several must sign; repeat for more.", metavar="FILE"),
]
ConfigOption = Annotated[Path | None, typer.Option(help="TOML file with these settings.")]


@contextmanager
def connect(flags: Mapping[str, object], config: Path | None) -> Iterator[tuple[CloudClient, OperatorSettings]]:
    """Yield a connection that is made of flags, environment and file.

    Raises:
        ConfigError: A setting is missing.
    """
    from cloud.client import Address, CloudClient

    settings = load_settings(OperatorSettings, config, flags).value
    if settings.trust is None or settings.token_file is None:
        missing = "trust" if settings.trust is None else "token_file"
        what = "the workspace's trust folder" if settings.trust is None else "a file that isthmus token mint wrote"
        raise ConfigError(
            f"the setting {missing} is not set",
            hint=f"--{missing.replace('_', '-')} or ISTHMUS_{missing.upper()} names {what}",
        )
    with CloudClient(
        Address(settings.cloud, settings.trust, settings.token_file, settings.tenant), timeout_s=settings.timeout_s
    ) as client:
        yield client, settings


@model_app.command()
def publish(
    bundle: Annotated[Path, typer.Argument(help="Folder that `isthmus compile` made.")],
    cloud: CloudOption = None,
    operator: Annotated[Path | None, typer.Option(help="The workspace's operator folder.")] = None,
    trust: TrustOption = None,
    token_file: TokenOption = None,
    tenant: TenantOption = None,
    release: Annotated[bool, typer.Option("--release/--no-release", help="Move devices to it at once.")] = True,
    rollback_floor: Annotated[
        str | None,
        typer.Option(
            metavar="N|none",
            help="Oldest version to which devices that ran this one may go back. Default: the released one.",
        ),
    ] = None,
    key: KeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload, sign and publish BUNDLE; devices move to it unless --no-release is given."""
    from cloud.client import Progress

    flags = {"cloud": cloud, "operator": operator, "trust": trust, "token_file": token_file, "tenant": tenant}
    started = time.monotonic()
    with connect(flags, config) as (client, settings):
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
def withdraw(
    version: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="For example triage@3.")],
    reason: Annotated[str, typer.Option(help="Why; devices and logs show it.", metavar="TEXT")],
    cloud: CloudOption = None,
    operator: Annotated[Path | None, typer.Option(help="The operator folder that published it.")] = None,
    trust: TrustOption = None,
    token_file: TokenOption = None,
    tenant: TenantOption = None,
    key: KeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign that no device may install a version any more; its open rollout stops, and it is never released again."""
    model, number = parse_version(version)
    flags = {"cloud": cloud, "operator": operator, "trust": trust, "token_file": token_file, "tenant": tenant}
    with connect(flags, config) as (client, settings):
        record = client.withdraw(model, number, reason, _operator(settings), keys=key or ())
    show_record("withdrawn", record, as_json=as_json)
    if record["released"] or record["rollouts"]:
        by = "the release" if record["released"] else f"rollout {record['rollouts'][0]}"
        note(f"{by} still tells devices {version}: release another one (isthmus model release)")


@model_app.command()
def release(
    version: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="For example triage@3.")],
    cloud: CloudOption = None,
    trust: TrustOption = None,
    token_file: TokenOption = None,
    tenant: TenantOption = None,
    config: ConfigOption = None,
) -> None:
    """Make a published version the one that devices run; they go back no further than a rollback floor says."""
    model, number = parse_version(version)
    with connect({"cloud": cloud, "trust": trust, "token_file": token_file, "tenant": tenant}, config) as (client, _):
        before = [row for row in client.list_versions() if row["model"] == model and row["released"]]
        client.release(model, number)
    note(f"devices move to {model}@{number}")
    for row in before:
        if number < row["version"] and (row["rollback_floor"] is None or number < row["rollback_floor"]):
            note(
                f"devices that ran {model}@{row['version']} refuse to go back so far and keep it; "
                "to undo a version, publish the older model under a new one"
            )


@model_app.command()
def export(
    version: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="For example triage@3.")],
    output: Annotated[Path, typer.Option(help="Folder to make; a tar file where it ends in .tar.", metavar="DIR")],
    from_version: Annotated[
        list[int] | None, typer.Option(help="A version that devices have: adds deltas from it; repeat.", metavar="N")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="A variant to write; all by default; repeat.")] = None,
    cloud: CloudOption = None,
    trust: TrustOption = None,
    token_file: TokenOption = None,
    tenant: TenantOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version to a folder or USB stick, for devices without a network: isthmus edge import installs it."""
    from cloud.client import Progress

    model, number = parse_version(version)
    flags = {"cloud": cloud, "trust": trust, "token_file": token_file, "tenant": tenant}
    with connect(flags, config) as (client, _), progress() as display:
        task = display.add_task("export", total=None)
        told = Progress(
            found=lambda total: display.update(task, total=max(total, 1)),
            sent=lambda count: display.advance(task, count),
        )
        record = client.export(model, number, output, bases=from_version or (), variants=variant or (), progress=told)
    show_record("exported", record, as_json=as_json)


@model_app.command("list")
def list_models(
    cloud: CloudOption = None,
    trust: TrustOption = None,
    token_file: TokenOption = None,
    tenant: TenantOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the published versions of all models."""
    with connect({"cloud": cloud, "trust": trust, "token_file": token_file, "tenant": tenant}, config) as (client, _):
        show_table("published versions", client.list_versions(), as_json=as_json)


@device_app.command()
def invite(
    device: Annotated[str, typer.Argument(help="How the device shall be called.")],
    ttl: Annotated[str, typer.Option(help="How long the code is valid: 15m, 12h, 30d.")] = "1h",
    cloud: CloudOption = None,
    trust: TrustOption = None,
    token_file: TokenOption = None,
    tenant: TenantOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a one-time enrolment code for DEVICE."""
    from security.durations import parse_duration

    ttl_s = int(parse_duration(ttl).total_seconds())
    with connect({"cloud": cloud, "trust": trust, "token_file": token_file, "tenant": tenant}, config) as (client, _):
        record = client.invite(device, ttl_s=ttl_s)
    show_record("invitation", record, as_json=as_json)


@device_app.command()
def revoke(
    device: Annotated[str, typer.Argument(help="The device's name; may be left out with --key.")] = "",
    key: Annotated[
        str, typer.Option(help="SHA-256 of one public key, as isthmus device show prints it.", metavar="DIGEST")
    ] = "",
    reason: Annotated[str, typer.Option(help="Why, for the record.", metavar="TEXT")] = "",
    cloud: CloudOption = None,
    trust: TrustOption = None,
    token_file: TokenOption = None,
    tenant: TenantOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Refuse DEVICE and its key within seconds, what it has open included. It comes back by a new invitation only."""
    if not device and not key:
        raise InputError("expected a device or --key", hint="isthmus device revoke camera-1 --reason stolen")
    with connect({"cloud": cloud, "trust": trust, "token_file": token_file, "tenant": tenant}, config) as (client, _):
        record = client.revoke(device, key_sha256=key, reason=reason)
    show_record("revoked", record, as_json=as_json)


@device_app.command("list")
def list_devices(
    selector: Annotated[str, typer.Option(help="Only devices with these labels: group=line-3,site=a.")] = "",
    cloud: CloudOption = None,
    trust: TrustOption = None,
    token_file: TokenOption = None,
    tenant: TenantOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the devices with what they are told and what they last reported."""
    labels = parse_labels([selector] if selector else [])
    with connect({"cloud": cloud, "trust": trust, "token_file": token_file, "tenant": tenant}, config) as (client, _):
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
def show(
    device: DeviceArgument,
    cloud: CloudOption = None,
    trust: TrustOption = None,
    token_file: TokenOption = None,
    tenant: TenantOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what DEVICE is, what it is told, what it reported and what happened to it."""
    with connect({"cloud": cloud, "trust": trust, "token_file": token_file, "tenant": tenant}, config) as (client, _):
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
def label(
    device: DeviceArgument,
    labels: Annotated[list[str], typer.Argument(help="group=line-3 sets a label, group- removes it.")],
    cloud: CloudOption = None,
    trust: TrustOption = None,
    token_file: TokenOption = None,
    tenant: TenantOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set and remove labels of DEVICE; a rollout that is under way takes in, or lets go, who it is for then."""
    remove = [text[:-1] for text in labels if text.endswith("-") and "=" not in text]
    wanted = parse_labels([text for text in labels if "=" in text or not text.endswith("-")])
    with connect({"cloud": cloud, "trust": trust, "token_file": token_file, "tenant": tenant}, config) as (client, _):
        show_record(f"labels of {device}", client.set_labels(device, wanted, remove), as_json=as_json)


@device_app.command()
def pin(
    device: DeviceArgument,
    version: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="triage@3; with --release just triage.")],
    release: Annotated[bool, typer.Option("--release", help="Follow releases and rollouts again.")] = False,
    cloud: CloudOption = None,
    trust: TrustOption = None,
    token_file: TokenOption = None,
    tenant: TenantOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold DEVICE at one version of a model, whatever is released or rolled out."""
    model, number = (version.partition("@")[0], 0) if release else parse_version(version)
    with connect({"cloud": cloud, "trust": trust, "token_file": token_file, "tenant": tenant}, config) as (client, _):
        if release:
            client.unpin(device, model)
        else:
            client.pin(device, model, number)
    if as_json:
        show_record("pin", {"device": device, "model": model, "pinned": number or None}, as_json=True)
        return
    note(f"{device} follows releases of {model}" if release else f"{device} is held at {model}@{number}")


@device_app.command()
def retry(
    device: DeviceArgument,
    model: Annotated[str, typer.Argument(help="For example triage.")],
    cloud: CloudOption = None,
    trust: TrustOption = None,
    token_file: TokenOption = None,
    tenant: TenantOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have DEVICE try again the version of MODEL that failed on it."""
    with connect({"cloud": cloud, "trust": trust, "token_file": token_file, "tenant": tenant}, config) as (client, _):
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
