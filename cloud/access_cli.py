"""`isthmus role` and `isthmus apikey`: what an admin says about who may do what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cloud.connection import Connection, asks_cloud
from isthmus.errors import InputError
from isthmus.terminal import JsonOption, note, show_record, show_table

role_app = typer.Typer(no_args_is_help=True, help="Grant, revoke and list roles.")
apikey_app = typer.Typer(no_args_is_help=True, help="Create, rotate, revoke and list API keys of plain clients.")

PrincipalArgument = Annotated[
    str,
    typer.Argument(metavar="PRINCIPAL", help="subject:NAME, apikey:NAME, oidc:ISSUER:SUBJECT or group:ISSUER:GROUP."),
]
ModelOption = Annotated[
    list[str] | None, typer.Option("--model", help="A model that it is for; repeat for more. Default: all.")
]
KeyNameArgument = Annotated[str, typer.Argument(metavar="NAME", help="What the client is called.")]
TtlOption = Annotated[str, typer.Option(help="How long the key is valid: 12h, 90d; at most 366d.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write the key here (0600), not to stdout.", metavar="FILE")
]


@role_app.command()
@asks_cloud
def grant(
    principal: PrincipalArgument,
    role: Annotated[str, typer.Argument(metavar="ROLE", help="admin, operator, auditor, client or device.")],
    model: ModelOption = None,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Give PRINCIPAL a role, for some models or all; holds within seconds."""
    from cloud.access_client import AccessClient

    with connection.open() as (client, _):
        record = AccessClient(client).grant(principal, role, model or ())
    show_record("granted", record, as_json=as_json)


@role_app.command()
@asks_cloud
def revoke(
    principal: PrincipalArgument,
    role: Annotated[str, typer.Argument(metavar="[ROLE]", help="Which; all of them where it is not given.")] = "",
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Take a role from PRINCIPAL; holds within seconds."""
    from cloud.access_client import AccessClient

    with connection.open() as (client, _):
        count = AccessClient(client).revoke(principal, role)
    if as_json:
        show_record("revoked", {"principal": principal, "revoked": count}, as_json=True)
        return
    note(f"took {count} role{'s' * (count > 1)} from {principal}")


@role_app.command("list")
@asks_cloud
def list_roles(
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """List the roles that were granted."""
    from cloud.access_client import AccessClient

    with connection.open() as (client, _):
        show_table("granted roles", AccessClient(client).grants(), as_json=as_json)


@apikey_app.command()
@asks_cloud
def create(
    name: KeyNameArgument,
    role: Annotated[str, typer.Option(help="What the key is good for.")] = "client",
    model: ModelOption = None,
    ttl: TtlOption = "90d",
    output: OutputOption = None,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Make an API key; it is shown this once. Clients send it as `authorization: Bearer KEY`."""
    from cloud.access_client import AccessClient

    _check_output(output)
    with connection.open() as (client, _):
        key, record = AccessClient(client).create_key(name, role, model or (), _seconds(ttl))
    _show_key(key, record, output, as_json=as_json)


@apikey_app.command()
@asks_cloud
def rotate(
    name: KeyNameArgument,
    ttl: TtlOption = "90d",
    overlap: Annotated[str, typer.Option(help="How long the old key goes on: 1h, 7d; 0s ends it now.")] = "24h",
    output: OutputOption = None,
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Make the next key of a client; both are valid until the overlap is over."""
    from cloud.access_client import AccessClient

    _check_output(output)
    with connection.open() as (client, _):
        key, record = AccessClient(client).rotate_key(name, _seconds(ttl), _seconds(overlap))
    _show_key(key, record, output, as_json=as_json)


@apikey_app.command("revoke")
@asks_cloud
def revoke_key(
    name: KeyNameArgument,
    prefix: Annotated[str, typer.Option(help="Only the key with this prefix.")] = "",
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Take back a client's keys; holds within seconds."""
    from cloud.access_client import AccessClient

    with connection.open() as (client, _):
        count = AccessClient(client).revoke_key(name, prefix)
    if as_json:
        show_record("revoked", {"name": name, "revoked": count}, as_json=True)
        return
    note(f"revoked {count} key{'s' * (count > 1)} of {name}")


@apikey_app.command("list")
@asks_cloud
def list_keys(
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """List the API keys by prefix: who has them, until when, last used. Their roles: isthmus role list."""
    from cloud.access_client import AccessClient

    with connection.open() as (client, _):
        show_table("API keys", AccessClient(client).keys(), as_json=as_json)


def _check_output(output: Path | None) -> None:
    """Check that the key can be written before it is made: it cannot be had a second time."""
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise InputError(f"cannot write {output}", hint="--output needs a file in a folder that exists")


def _show_key(key: str, record: dict[str, Any], output: Path | None, *, as_json: bool) -> None:
    from security.keyfiles import PRIVATE_MODE, replace_file

    if output is not None:
        replace_file(output, key.encode() + b"\n", mode=PRIVATE_MODE)
        record["file"] = str(output)
    elif as_json:
        record["key"] = key
    else:
        typer.echo(key)
    if as_json:
        show_record("API key", record, as_json=True)
        return
    where = "shown once, here" if output is None else f"in {output}"
    note(f"key {record['prefix']} of {record['name']}, valid until {record['expires']}: {where}")
    if "old_expires" in record:
        note(f"the old key {record['old_prefix']} goes on until {record['old_expires']}")


def _seconds(text: str) -> int:
    from security.durations import parse_duration

    return 0 if text in ("0", "0s") else int(parse_duration(text).total_seconds())
