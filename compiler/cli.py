"""`isthmus compile`: parse, call the pipeline, print what came out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.errors import InputError
from isthmus.terminal import JsonOption, note, progress, show_record, show_table

if TYPE_CHECKING:
    from compiler.pipeline import Outcome, VariantOutcome

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.command("compile")
def compile_command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="The bundle's folder.", show_default="bundle, beside the recipe")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Where answers of the heavy model are kept.", show_default=".compile-cache, beside the output"
        ),
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(help="Also write the bundle as this tar file.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compile a light and a heavy model into a bundle: variants, calibration, golden answers, manifest."""
    from compiler.package import check_folder, write_archive
    from compiler.pipeline import GuardError, compile_bundle

    if archive is not None:
        check_folder(archive.parent, "archive")
        if archive.is_dir():
            raise InputError(f"{archive} is a folder", hint="give the name of a file as --archive")

    with progress() as display:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = display.add_task(stage, total=total)
            display.update(tasks[stage], completed=done, total=total)

        try:
            outcome = compile_bundle(recipe, output or recipe.parent / "bundle", cache=cache, progress=advance)
        except GuardError as error:
            display.stop()
            _show(error.outcome, as_json=as_json)
            raise
    if archive is not None:
        write_archive(outcome.output, archive)
    _show(outcome, as_json=as_json)


def _show(outcome: Outcome, *, as_json: bool) -> None:
    rows = [_row(entry) for entry in outcome.variants]
    summary = {
        "bundle": str(outcome.output) if outcome.manifest else None,
        "samples": outcome.report.samples,
        "light_source_accuracy": outcome.report.light_accuracy,
        "heavy_accuracy": outcome.report.heavy_accuracy,
    }
    if as_json:
        show_record("", summary | {"variants": rows}, as_json=True)
        return
    show_table("Variants of the light model", [_short(row) for row in rows])
    show_record("Bundle", summary)
    for entry in outcome.variants:
        if entry.refused:
            note(f"{entry.variant.id}: refused, for {entry.refused}")
        if entry.report.grid == "kept":
            note(
                f"{entry.variant.id}: INT8 grid of the version before kept, {entry.report.clipped:.2%} clipped at most"
            )
        if entry.report.grid_note:
            note(f"{entry.variant.id}: new INT8 grid, for {entry.report.grid_note}")


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Return what fits a terminal."""
    return {
        "variant": row["variant"],
        "MB": row["bytes"] / 1e6,
        "ms": row["latency_ms"],
        "accuracy": row["accuracy"],
        "escalated": row["escalated"],
        "routed": row["routed_accuracy"],
        "verdict": "refused" if row["refused"] else "good",
    }


def _row(entry: VariantOutcome) -> dict[str, Any]:
    calibration = entry.calibration
    return {
        "variant": entry.variant.id,
        "bytes": entry.report.bytes,
        "latency_ms": round(entry.latency_ms, 3),
        "max_difference": entry.report.max_difference,
        "accuracy": entry.report.accuracy,
        "threshold": calibration.threshold if calibration else None,
        "escalated": calibration.escalation_rate if calibration else None,
        "routed_accuracy": calibration.accuracy if calibration else None,
        "grid": entry.report.grid or None,
        "refused": entry.refused or None,
    }
