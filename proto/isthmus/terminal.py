"""What commands print: tables and records for people, JSON for scripts, notes and progress on standard error.

Standard output carries results only, so that `isthmus ... --json | jq` always works.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

_WIDEST: Final = 200  # columns of text, where nothing else bounds a table
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def show_table(title: str, rows: Sequence[Mapping[str, Any]], *, as_json: bool = False) -> None:
    """Print rows that share their keys, as a table with the keys as headings, or as a JSON list."""
    if as_json:
        typer.echo(json.dumps(list(rows), indent=2))
        return
    from rich.console import Console

    shown = table(title, rows)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:  # a file or a pipe has no width to keep to
        unbounded = console.options.update(max_width=_WIDEST)
        console.width = max(console.width, console.measure(shown, options=unbounded).maximum)
    console.print(shown)


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return rows that share their keys as a table with the keys as headings."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold", min_width=len(title))
    for place, name in enumerate(rows[0] if rows else ("nothing yet",)):
        numeric = bool(rows) and all(isinstance(row[name], int | float | None) for row in rows)
        made.add_column(
            name.replace("_", " "),
            justify="right" if numeric else "left",
            overflow="fold",
            no_wrap=place == 0,  # what a row is about stays readable however narrow the terminal
        )
    for row in rows:
        made.add_row(*(escape(_cell(value)) for value in row.values()))  # a device may report "[/x]"
    return made


def show_record(title: str, record: Mapping[str, Any], *, as_json: bool = False) -> None:
    """Print one record as two columns, or as a JSON object."""
    if as_json:
        typer.echo(json.dumps(dict(record), indent=2))
        return
    show_table(title, _lines(record))


def record_table(title: str, record: Mapping[str, Any]) -> Table:
    """Return one record as a table of two columns."""
    return table(title, _lines(record))


def _lines(record: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"what": name.replace("_", " "), "value": _cell(value)} for name, value in record.items()]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        if not value:
            return "-"
        return ", ".join(_cell(item) for item in value)
    return str(value)


def note(text: str) -> None:
    """Say something to the person at the terminal, on standard error."""
    typer.echo(text, err=True)


def progress() -> Progress:
    """Return a progress display on standard error; use it as a context manager."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=False,
    )
