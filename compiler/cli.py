"""`isthmus compile`: parse, call the pipeline, print what came out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from isthmus.errors import InputError
from isthmus.terminal import JsonOption, note, progress, show_record, show_table

if TYPE_CHECKING:
    from compiler.pipeline import Outcome
    from compiler.report import VariantReport

_NAMED: Final = 3  # tensors that a note names

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.command("compile")
def compile_command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="The bundle's folder.", show_default="bundle, beside the recipe")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Where results of stages are kept.", show_default=".compile-cache, beside the output"),
    ] = None,
    delta_from: Annotated[
        Path | None,
        typer.Option(
            help="The bundle that devices have now, folder or archive: its INT8 grid is kept.",
            show_default="update.delta_from of the recipe",
        ),
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(help="Also write the bundle as this tar file.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the variants' time, size and accuracy, as PNG.", show_default=False)
    ] = None,
    cores: Annotated[int, typer.Option(min=0, help="Cores to use.", show_default="all")] = 0,
    memory: Annotated[
        float, typer.Option(min=0, help="GiB of memory to use.", show_default="most of what is free")
    ] = 0.0,
    jobs: Annotated[
        int, typer.Option(min=0, help="Builds at the same time.", show_default="one a core, at most 4")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Compile a light and a heavy model into a bundle: variants, calibration, golden answers, manifest."""
    from compiler.package import check_folder, write_archive
    from compiler.pipeline import GuardError, compile_bundle
    from compiler.processes import default_budget

    for option, path in (("archive", archive), ("picture", picture)):
        if path is not None:
            check_folder(path.parent, option)
            if path.is_dir():
                raise InputError(f"{path} is a folder", hint=f"give the name of a file as --{option}")
    budget = default_budget(cores, memory, jobs)
    with ended_by_signals(), stages() as advance:
        try:
            outcome = compile_bundle(
                recipe,
                output or recipe.parent / "bundle",
                cache=cache,
                budget=budget,
                delta_from=delta_from,
                progress=advance,
            )
        except GuardError as error:
            _show(error.outcome, as_json=as_json)
            raise
    if archive is not None:
        write_archive(outcome.output, archive)
    if picture is not None:
        from compiler.pictures import draw_variants

        draw_variants(outcome.report, picture)
    _show(outcome, as_json=as_json)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make a polite end of every way to be ended: unfinished work is removed, as on Ctrl-C."""

    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each stage; the function may be called from several threads."""
    with progress() as display:
        tasks: dict[str, Any] = {}
        lock = threading.Lock()

        def advance(stage: str, done: int, total: int) -> None:
            with lock:
                if stage not in tasks:
                    tasks[stage] = display.add_task(stage, total=total)
                display.update(tasks[stage], completed=done, total=total)

        yield advance


def _show(outcome: Outcome, *, as_json: bool) -> None:
    rows = [_row(entry, outcome) for entry in outcome.report.variants]
    left_out = [entry.model_dump(mode="json") for entry in outcome.report.left_out]
    summary: dict[str, Any] = {
        "bundle": str(outcome.output) if outcome.manifest else None,
        "samples": outcome.report.samples,
        "light_source_accuracy": outcome.report.light_accuracy,
        "heavy_accuracy": outcome.report.heavy_accuracy,
    }
    if as_json:
        more = {"recommended": outcome.report.recommended, "pareto": outcome.report.pareto, "reused": outcome.reused}
        show_record("", summary | more | {"variants": rows, "left_out": left_out}, as_json=True)
        return
    refused = [{**dict.fromkeys(_short(rows[0]) if rows else ["variant", "verdict"]), "variant": entry.id,
                "verdict": "refused"} for entry in outcome.report.left_out]  # fmt: skip
    show_table("Variants of the light model", [*(_short(row) for row in rows), *refused])
    show_record("Bundle", summary | {f"for {device}": name for device, name in outcome.report.recommended.items()})
    for entry in outcome.report.left_out:
        note(f"{entry.id}: left out, for {entry.reason}" + (f" ({entry.hint})" if entry.hint else ""))
    for variant in outcome.report.variants:
        _notes(variant)
    if outcome.reused:
        note("nothing has changed: the bundle is the one that was there")


def grid_notes(entry: VariantReport) -> Iterator[str]:
    """Yield what became of the INT8 grid of the version before."""
    if entry.grid in ("kept", "part") and entry.grids:
        kept, moved, scales = (sum(getattr(t, name) for t in entry.grids) for name in ("kept", "moved", "channels"))
        worst = max(entry.grids, key=lambda tensor: tensor.noise)
        yield (
            f"INT8 grid of the version before: of {scales:,} scales {kept:,} kept, {moved:,} moved with their "
            f"channels, {scales - kept - moved:,} new; rounding errors at most {worst.noise:.2f} times those on new "
            f"scales, in {worst.name}"
        )
        if entry.grid_note:
            yield f"more was tried and refused, for {entry.grid_note}"
    elif entry.grid_note:
        yield f"new INT8 grid, for {entry.grid_note}"
    unlike = [f"{tensor.name} ({tensor.reason})" for tensor in entry.grids if tensor.reason]
    if unlike:
        more = f" and {len(unlike) - _NAMED} more" if len(unlike) > _NAMED else ""
        yield f"new scales where the version before has none: {', '.join(unlike[:_NAMED])}{more}"


def _notes(entry: VariantReport) -> None:
    for attempt in entry.attempts[:-1]:
        note(f"{entry.id}: setting {attempt.setting} was refused, for {attempt.refused}")
    if len(entry.attempts) > 1:
        note(f"{entry.id}: setting {entry.setting} passes, the fastest that does")
    for line in grid_notes(entry):
        note(f"{entry.id}: {line}")
    if entry.note:
        note(f"{entry.id}: {entry.note}")
    if entry.verified == "device":
        note(f"{entry.id}: cannot run here; the device compares it with the source's answers before it serves")


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Return what fits a terminal."""
    return {
        "variant": row["variant"],
        "MB": row["bytes"] / 1e6,
        "ms": row["latency_ms"],
        "accuracy": round(row["accuracy"], 4),
        "escalated": None if row["escalated"] is None else round(row["escalated"], 4),
        "routed": None if row["routed_accuracy"] is None else round(row["routed_accuracy"], 4),
        "verdict": "best" if row["pareto"] else "good",
    }


def _row(entry: VariantReport, outcome: Outcome) -> dict[str, Any]:
    calibration = outcome.calibration.variants[entry.id] if outcome.calibration else None
    timing = entry.timing
    return {
        "variant": entry.id,
        "setting": entry.setting,
        "bytes": entry.bytes,
        "latency_ms": round(timing.p50_ms, 3) if timing else None,
        "latency_p99_ms": round(timing.p99_ms, 3) if timing else None,
        "latency_threads_ms": round(timing.p50_threads_ms, 3) if timing else None,
        "samples_per_s": round(timing.samples_per_s, 1) if timing else None,
        "peak_rss_mib": round(timing.peak_rss_mib, 1) if timing else None,
        "max_difference": entry.parity.max_absolute if entry.parity else None,
        "cosine": entry.parity.cosine if entry.parity else None,
        "accuracy": entry.accuracy,
        "interval": entry.interval,
        "threshold": calibration.threshold if calibration else None,
        "escalated": calibration.escalation_rate if calibration else None,
        "routed_accuracy": calibration.accuracy if calibration else None,
        "grid": entry.grid or None,
        "verified": entry.verified,
        "pareto": entry.id in outcome.report.pareto,
        "refused": None,
    }
