"""`isthmus cloud`: run the cloud, and ask a running one how it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloud.connection import Connection, asks_cloud
from isthmus.settings import load_settings
from isthmus.terminal import JsonOption, note, show_record, show_table

app = typer.Typer(no_args_is_help=True, help="Run the gateway, registry and Triton.")

ConfigOption = Annotated[Path | None, typer.Option(help="TOML file with settings.")]


@app.command()
def serve(
    home: Annotated[Path | None, typer.Option(help="The workspace's cloud folder.")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT; port 0 takes a free one.")] = None,
    device_listen: Annotated[
        str | None, typer.Option(help="HOST:PORT that asks for device certificates; default: the port after --listen.")
    ] = None,
    blobs: Annotated[
        str | None, typer.Option(help="Folder or fsspec address, such as s3://bucket/folder, for bundles.")
    ] = None,
    triton: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of a running Triton instead of a child; repeat for more.")
    ] = None,
    triton_children: Annotated[int | None, typer.Option(help="How many Tritons to start here.", metavar="N")] = None,
    database: Annotated[str | None, typer.Option(help="postgresql://USER@HOST/NAME instead of SQLite.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Gets address and process ids once serving.")] = None,
    config: ConfigOption = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests end and exit with 0."""
    from cloud.bootstrap import open_runner, serve_until_signal
    from cloud.config import CloudSettings

    flags: dict[str, object] = {"home": home, "listen": listen, "device_listen": device_listen, "blobs": blobs}
    flags |= {"database": database, "triton": ",".join(triton) if triton else None, "triton_children": triton_children}
    flags |= {"ready_file": ready_file}
    with open_runner() as runner:
        runner.run(serve_until_signal(load_settings(CloudSettings, config, flags).value))


@app.command()
@asks_cloud
def accept(
    files: Annotated[list[Path], typer.Argument(help="N.root.json, targets.json or publisher-NAME.json.")],
    *,
    connection: Connection,
    as_json: JsonOption = False,
) -> None:
    """Hand signed metadata to the cloud: a new root, delegations. All FILES take effect, or none."""
    from security.keyfiles import read_file

    offered = {path.name: read_file(path, hint="isthmus keys makes these files") for path in files}
    with connection.open() as (client, _):
        client.submit(offered)
    if as_json:
        show_record("accepted", {"files": list(offered)}, as_json=True)
        return
    note(f"the cloud serves {', '.join(offered)}")


@app.command()
@asks_cloud
def status(*, connection: Connection, as_json: JsonOption = False) -> None:
    """Show Triton's version, the loaded heavy models and their counters."""
    with connection.open() as (client, _):
        record = client.status()
    if as_json:
        show_record("cloud", record, as_json=True)
        return
    models = record.pop("models")
    show_record("cloud", record)
    show_table("heavy models", models)
