"""`isthmus targets`: what can be built for, and every target tried on one model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.errors import ConflictError, InputError, MissingExtraError
from isthmus.terminal import JsonOption, note, show_record, show_table

if TYPE_CHECKING:
    from compiler.report import VariantReport
    from compiler.trial import Trial

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """List the targets: what each builds, and whether it is installed here."""
    from compiler.targets import TARGETS, load_target

    rows: list[dict[str, Any]] = []
    for name, entry in TARGETS.items():
        row: dict[str, Any] = {"target": name, "for": entry.role}
        try:
            target = load_target(name, role=entry.role)
        except MissingExtraError as error:
            rows.append({**row, "precisions": "-", "platforms": "-", "installed": error.hint})
            continue
        rows.append(
            {
                **row,
                "precisions": " ".join(target.precisions),
                "platforms": " ".join(target.platforms),
                "installed": f"yes ({entry.extra})",
            }
        )
    show_table("Targets", rows, as_json=as_json)


@app.command("try")
def try_command(
    source: Annotated[
        str,
        typer.Argument(
            help="A model: .onnx, .pt2, .safetensors (with --factory), a Hugging Face folder, models:/NAME/VERSION, "
            "timm:NAME, torchvision:NAME.",
            show_default=False,
        ),
    ],
    samples: Annotated[
        Path | None,
        typer.Option(help="A safetensors file with typical inputs, perhaps labels.", show_default="invented samples"),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="Only this target (repeatable).")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Only this precision (repeatable).")] = None,
    length: Annotated[
        list[str] | None, typer.Option(help="Fix or bound an axis: sequence=64 or sequence=8:256 (repeatable).")
    ] = None,
    constant: Annotated[list[str] | None, typer.Option(help="Bake in an input: sr=16000 (repeatable).")] = None,
    task: Annotated[str, typer.Option(help="Of a Hugging Face folder.", show_default="as its config says")] = "",
    adapter: Annotated[Path | None, typer.Option(help="A LoRA adapter to merge.", show_default=False)] = None,
    factory: Annotated[str, typer.Option(help="module:function that makes the module of a .safetensors.")] = "",
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .pt and .pth files.")] = False,
    cpu: Annotated[str, typer.Option(help="The least processor for compiled code.", show_default="x86-64-v3")] = "",
    output: Annotated[Path | None, typer.Option(help="Also write what was built here.", show_default=False)] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw time, size and accuracy, as PNG.")] = None,
    cache: Annotated[Path, typer.Option(help="Where results are kept.", show_default=".compile-cache, here")] = Path(
        ".compile-cache"
    ),
    cores: Annotated[int, typer.Option(min=0, help="Cores to use.", show_default="all")] = 0,
    memory: Annotated[float, typer.Option(min=0, help="GiB to use.", show_default="most of what is free")] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Build one model with every target and precision, and compare them side by side."""
    from compiler.cli import ended_by_signals, stages
    from compiler.package import check_folder
    from compiler.processes import default_budget
    from compiler.sources import SourceOptions, kind_of
    from compiler.trial import candidates, try_targets

    kind_of(source)
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConflictError(f"{output} exists and is not an empty folder", hint="give another --output, or remove it")
    check_folder(cache, "cache")
    options = SourceOptions(
        task=task, adapter=adapter, lengths=_lengths(length or []), constants=_constants(constant or []),
        factory=factory, allow_pickle=allow_pickle,
    )  # fmt: skip
    wanted, missing = candidates(target or [], precision or [], cpu=cpu)
    budget = default_budget(cores, memory)
    with ended_by_signals(), stages() as advance:
        try:
            trial = try_targets(source, options, wanted, cache=cache, budget=budget, samples=samples, progress=advance)
        finally:
            budget.stop()
    if output is not None:
        for entry in trial.accepted:
            shutil.copytree(entry.artefact, output / entry.candidate.id)
    if picture is not None:
        from compiler.pictures import draw

        draw(trial.variants, trial.pareto, str(source), picture)
    _show(trial, [entry.model_dump(mode="json") for entry in missing], as_json=as_json)


def _lengths(texts: list[str]) -> dict[str, int | tuple[int, int]]:
    found: dict[str, int | tuple[int, int]] = {}
    for text in texts:
        name, _, value = text.partition("=")
        parts = value.split(":")
        if not name or len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise InputError(f"--length: expected AXIS=SIZE or AXIS=SHORTEST:LONGEST, got {text!r}")
        found[name] = int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))
    return found


def _constants(texts: list[str]) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = int(value) if value.lstrip("-").isdecimal() else float(value)
        except ValueError as error:
            raise InputError(f"--constant: expected INPUT=NUMBER, got {text!r}") from error
    return found


def _show(trial: Trial, missing: list[dict[str, Any]], *, as_json: bool) -> None:
    left_out = [entry.model_dump(mode="json") for entry in trial.left_out] + missing
    if as_json:
        record = {
            "inputs": [spec.model_dump() for spec in trial.model.inputs],
            "outputs": [spec.model_dump() for spec in trial.model.outputs],
            "samples": trial.samples,
            "invented": trial.invented,
            "variants": [entry.model_dump(mode="json") for entry in trial.variants],
            "left_out": left_out,
            "pareto": trial.pareto,
        }
        show_record("", record, as_json=True)
        return
    show_table("Variants", [_row(entry, entry.id in trial.pareto) for entry in trial.variants])
    for entry in left_out:
        note(f"{entry['id']}: no, for {entry['reason']}" + (f" ({entry['hint']})" if entry["hint"] else ""))
    for variant in trial.variants:
        for attempt in variant.attempts[:-1]:
            note(f"{variant.id}: setting {attempt.setting} was refused, for {attempt.refused}")
    if trial.invented:
        note(f"compared on {trial.samples} invented samples: give --samples to see what INT8 costs on real inputs")


def _row(entry: VariantReport, best: bool) -> dict[str, Any]:
    timing, parity = entry.timing, entry.parity
    return {
        "variant": entry.id,
        "MB": entry.bytes / 1e6,
        "ms": timing.p50_ms if timing else None,
        "all cores": timing.p50_threads_ms if timing else None,
        "MiB": round(timing.peak_rss_mib) if timing else None,
        "difference": parity.max_relative if parity else None,
        "cosine": parity.cosine if parity else None,
        "agrees": entry.accuracy if parity else None,
        "verdict": "best" if best else "good" if parity else "not run",
    }
