"""`isthmus delta`: deltas of plain files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.terminal import JsonOption, show_record

app = typer.Typer(no_args_is_help=True, help="Make, apply and inspect deltas of files.")

ExistingFile = typer.Argument(exists=True, dir_okay=False, readable=True)


@app.command()
def make(
    old: Annotated[Path, ExistingFile],
    new: Annotated[Path, ExistingFile],
    out: Annotated[Path, typer.Argument(help="Where the delta goes.")],
    as_json: JsonOption = False,
) -> None:
    """Write to OUT the smallest delta that turns OLD into NEW."""
    from isthmus.delta import make_delta

    info = make_delta(old, new, out)
    share = round(info.length / info.target_length, 4) if info.target_length else None
    record = {
        "method": info.method.name.lower(),
        "delta_bytes": info.length,
        "target_bytes": info.target_length,
        "share": share,
    }
    show_record(f"{out}", record, as_json=as_json)


@app.command()
def apply(
    old: Annotated[Path, ExistingFile],
    delta: Annotated[Path, ExistingFile],
    out: Annotated[Path, typer.Argument(help="Where the rebuilt file goes.")],
    as_json: JsonOption = False,
) -> None:
    """Rebuild into OUT the file that DELTA makes from OLD; the digest that the delta names is checked."""
    from isthmus.delta import apply_delta, read_header

    with delta.open("rb") as file:
        header = read_header(file)
    apply_delta(old, delta, out, sha256=header.target_sha256, length=header.target_length)
    show_record(f"{out}", {"sha256": header.target_sha256, "bytes": header.target_length}, as_json=as_json)


@app.command()
def inspect(delta: Annotated[Path, ExistingFile], as_json: JsonOption = False) -> None:
    """Show what DELTA was made from and for."""
    from isthmus.delta import read_header

    with delta.open("rb") as file:
        header = read_header(file)
    record = {
        "method": header.method.name.lower(),
        "base_sha256": header.base_sha256,
        "base_bytes": header.base_length,
        "target_sha256": header.target_sha256,
        "target_bytes": header.target_length,
        "delta_bytes": delta.stat().st_size,
    }
    show_record(f"{delta}", record, as_json=as_json)
