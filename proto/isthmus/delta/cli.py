"""`isthmus delta`: deltas of files and of folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.errors import InputError
from isthmus.terminal import JsonOption, progress, show_record, show_table

if TYPE_CHECKING:
    from isthmus.delta.folder import Entry, Progress

app = typer.Typer(no_args_is_help=True, help="Make, apply and inspect deltas of files and folders.")

Existing = typer.Argument(exists=True, readable=True)
ExistingFile = typer.Argument(exists=True, dir_okay=False, readable=True)


@app.command()
def make(
    old: Annotated[Path, Existing],
    new: Annotated[Path, Existing],
    out: Annotated[Path, typer.Argument(help="Where the delta goes.")],
    as_json: JsonOption = False,
) -> None:
    """Write to OUT the smallest delta that turns OLD into NEW: two files, or two folders."""
    from isthmus.delta import make_delta, make_folder_delta

    if old.is_dir() != new.is_dir():
        raise InputError("expected two files or two folders")
    _check_place(out)
    with _bar("make") as advance:
        if old.is_dir():
            _show_entries(out, make_folder_delta(old, new, out, advance), as_json=as_json)
            return
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
    old: Annotated[Path, Existing],
    delta: Annotated[Path, ExistingFile],
    out: Annotated[Path, typer.Argument(help="Where the rebuilt file or folder goes.")],
    as_json: JsonOption = False,
) -> None:
    """Rebuild into OUT what DELTA makes from OLD; the digests that the delta names are checked."""
    from isthmus.delta import apply_delta, apply_folder_delta, is_folder_delta, read_header

    if old.is_dir() != is_folder_delta(delta):
        raise InputError("expected a file and its delta, or a folder and its delta")
    _check_place(out)
    with _bar("apply") as advance:
        if old.is_dir():
            _show_entries(out, apply_folder_delta(old, delta, out, advance), as_json=as_json)
            return
        with delta.open("rb") as file:
            header = read_header(file)
        apply_delta(old, delta, out, sha256=header.target_sha256, length=header.target_length)
    show_record(f"{out}", {"sha256": header.target_sha256, "bytes": header.target_length}, as_json=as_json)


@app.command()
def inspect(delta: Annotated[Path, ExistingFile], as_json: JsonOption = False) -> None:
    """Show what DELTA was made from and for, and what its bytes are."""
    from isthmus.delta import describe, is_folder_delta, read_entries, read_header

    with delta.open("rb") as file:
        if is_folder_delta(delta):
            _show_entries(delta, read_entries(file), as_json=as_json)
            return
        header = read_header(file)
        parts = describe(file, header)
    record: dict[str, Any] = {
        "method": header.method.name.lower(),
        "base_sha256": header.base_sha256,
        "base_bytes": header.base_length,
        "target_sha256": header.target_sha256,
        "target_bytes": header.target_length,
        "delta_bytes": delta.stat().st_size,
    }
    if as_json:
        show_record(f"{delta}", {**record, "parts": parts}, as_json=True)
        return
    show_record(f"{delta}", record)
    if parts:
        show_table("what the target is made of", parts)


def _show_entries(path: Path, entries: list[Entry], *, as_json: bool) -> None:
    rows = [
        {"path": entry.path, "method": entry.method, "delta_bytes": entry.bytes, "file_bytes": entry.length}
        for entry in entries
    ]
    show_table(f"{path}", rows, as_json=as_json)


def _check_place(out: Path) -> None:
    """Refuse what cannot be written before any work, and any bar, is begun."""
    if not out.parent.is_dir():
        raise InputError(f"{out}: its folder is not there", hint="expected a path in a folder that exists")


@contextmanager
def _bar(what: str) -> Iterator[Progress]:
    with progress() as display:
        task = display.add_task(what, total=None)
        yield lambda done, total: display.update(task, completed=done, total=total)
        display.update(task, completed=1, total=1)
