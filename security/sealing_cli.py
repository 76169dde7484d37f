"""`isthmus keys sealing`: the gateway's keys for sealed inputs."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.terminal import JsonOption, note, show_table

app = typer.Typer(no_args_is_help=True, help="Keys for inputs that only the gateway may read.")

Root = Annotated[Path, typer.Argument(metavar="DIR", help="The workspace.")]


@app.command()
def rotate(
    root: Root,
    drop_older: Annotated[
        bool, typer.Option("--drop-older", help="Older keys end: what was sealed for them does not open any more.")
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option("--key", help="Key of the authority in trust/ca.pem, where it is your own.", metavar="FILE"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a new key and put it first; older ones go on opening what was sealed for them."""
    from security.sealing import rotate_sealing_keys

    keys = rotate_sealing_keys(root, datetime.now(UTC), drop_older=drop_older, authority_key=key)
    show_table("sealing keys", _rows([key.id for key in keys.keys]), as_json=as_json)
    if not as_json:
        note(f"copy {root}/cloud/sealing to the cloud's machine; it takes new keys in within a minute, devices follow")


@app.command()
def show(root: Root, as_json: JsonOption = False) -> None:
    """List the keys, the one that is used first; never a secret."""
    from isthmus.envelopes import KEYS_FILE, parse_keys
    from security.keyfiles import read_file

    document = read_file(root / "trust" / KEYS_FILE, hint=f"isthmus keys sealing rotate {root} makes a key")
    keys = parse_keys(document, read_file(root / "trust" / "ca.pem"))
    show_table("sealing keys", _rows([key.id for key in keys.keys]), as_json=as_json)


def _rows(ids: list[str]) -> list[dict[str, Any]]:
    uses = ["seals", *["opens what is older"] * (len(ids) - 1)]
    return [{"key": key_id, "use": use} for key_id, use in zip(ids, uses, strict=True)]
