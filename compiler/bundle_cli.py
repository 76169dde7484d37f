"""`isthmus bundle`: look into a bundle, check it, and see what another one changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.bundle import CALIBRATION, REPORT, Manifest, check_calibration, open_bundle, parse_calibration
from isthmus.errors import VerificationError
from isthmus.terminal import JsonOption, note, show_record, show_table

if TYPE_CHECKING:
    from compiler.report import Report

app = typer.Typer(no_args_is_help=True, add_completion=False)

BundleArgument = Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)]


@app.command()
def inspect(
    bundle: BundleArgument,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the variants' time, size and accuracy, as PNG.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a bundle holds, what was measured of it, and what was left out."""
    manifest = open_bundle(bundle)
    report = _report(bundle)
    if picture is not None and report is not None:
        from compiler.pictures import draw_variants

        draw_variants(report, picture)
    record = _summary(manifest)
    rows = _variants(manifest, report)
    left_out = [] if report is None else [entry.model_dump(mode="json") for entry in report.left_out]
    if as_json:
        recommended = {} if report is None else report.recommended
        more = {"variants": rows, "left_out": left_out, "recommended": recommended, "varies": manifest.varies}
        show_record("", record | more, as_json=True)
        return
    show_record(f"{manifest.name}@{manifest.version}", record)
    show_table("Variants", [{key: value for key, value in row.items() if key != "entry"} for row in rows])
    for entry in left_out:
        note(f"{entry['id']}: left out, for {entry['reason']}")
    for device, variant in ({} if report is None else report.recommended).items():
        note(f"recommended for {device}: {variant}")
    for path, reason in manifest.varies.items():
        note(f"another build may differ in {path}: {reason}")


@app.command()
def verify(
    bundle: BundleArgument,
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Also run the golden inputs through every variant that runs here.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Check every digest and, on this machine's runtimes, every golden answer."""
    manifest = open_bundle(bundle)
    calibration = parse_calibration((bundle / CALIBRATION).read_bytes())
    for variant in manifest.variants:
        check_calibration(manifest, variant, calibration)
    rows = _answers(bundle, manifest) if run else []
    record = {"bundle": str(bundle), "files": len(manifest.files), "digests": "all as the manifest says"}
    if as_json:
        show_record("", record | {"variants": rows}, as_json=True)
    else:
        show_record(f"{manifest.name}@{manifest.version}", record)
        if rows:
            show_table("Golden answers", rows)
    wrong = [row["variant"] for row in rows if row["verdict"] == "wrong"]
    if wrong:
        raise VerificationError(f"golden answers of {', '.join(wrong)} are not those of the manifest")


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(help="The bundle before.", show_default=False)],
    new: Annotated[Path, typer.Argument(help="The bundle after.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Show which files, variants and figures differ between two bundles."""
    before, after = open_bundle(old), open_bundle(new)
    files = [
        {
            "file": path,
            "change": _change(path, before, after),
            "bytes_before": before.files[path].length if path in before.files else None,
            "bytes_after": after.files[path].length if path in after.files else None,
            "bytes_that_differ": _differing(old / path, new / path),
            "why": after.varies.get(path, ""),
        }
        for path in sorted(before.files.keys() | after.files.keys())
        if before.files.get(path) != after.files.get(path)
    ]
    fields = [
        {"field": name, "before": str(ours), "after": str(theirs)}
        for name in ("name", "version", "labels", "inputs", "outputs", "max_batch", "max_length", "heavy", "provenance")
        if (ours := getattr(before, name)) != (theirs := getattr(after, name))
    ]
    variants = _compared(_variants(before, _report(old)), _variants(after, _report(new)))
    if as_json:
        show_record("", {"files": files, "fields": fields, "variants": variants}, as_json=True)
        return
    if not files and not fields:
        note("the bundles are equal, byte for byte")
        return
    if files:
        show_table("Files", files)
    if variants:
        show_table("Variants", variants)
    for field in fields:
        note(f"{field['field']}: {field['before'][:200]} -> {field['after'][:200]}")


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "version": manifest.version,
        "inputs": [f"{spec.name} {spec.datatype}{list(spec.shape)}" for spec in manifest.inputs],
        "outputs": [f"{spec.name} {spec.datatype}{list(spec.shape)}" for spec in manifest.outputs],
        "labels": len(manifest.labels),
        "max_batch": manifest.max_batch,
        "heavy": manifest.heavy.platform,
        "heavy_accuracy": manifest.heavy.accuracy,
        "files": len(manifest.files),
        "bytes": sum(entry.length for entry in manifest.files.values()),
        "tools": [f"{tool} {version}" for tool, version in manifest.provenance.tools.items()],
    }


def _report(bundle: Path) -> Report | None:
    """Return the bundle's report, or None for one that was made otherwise or by an older compiler."""
    from pydantic import ValidationError

    from compiler.report import Report

    path = bundle / REPORT
    try:
        return Report.model_validate_json(path.read_bytes()) if path.is_file() else None
    except ValidationError:
        return None


def _variants(manifest: Manifest, report: Report | None) -> list[dict[str, Any]]:
    measured = {} if report is None else {entry.id: entry for entry in report.variants}
    rows = []
    for variant in manifest.variants:
        entry = measured.get(variant.id)
        timing = entry.timing if entry is not None else None
        rows.append(
            {
                "variant": variant.id,
                "platform": variant.platform,
                "bytes": sum(file.length for _, file in manifest.files_below(f"variants/{variant.id}/")),
                "ms": variant.latency_ms,
                "peak_mib": None if timing is None else round(timing.peak_rss_mib, 1),
                "accuracy": variant.accuracy,
                "setting": "" if entry is None else entry.setting,
                "verified_by": variant.verified,
                "entry": variant.entry,
            }
        )
    return rows


def _compared(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first, second = ({row["variant"]: row for row in rows} for rows in (before, after))
    return [
        {
            "variant": name,
            "bytes": _arrow(first.get(name), second.get(name), "bytes"),
            "accuracy": _arrow(first.get(name), second.get(name), "accuracy"),
            "ms": _arrow(first.get(name), second.get(name), "ms"),
            "setting": _arrow(first.get(name), second.get(name), "setting"),
        }
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]


def _arrow(before: dict[str, Any] | None, after: dict[str, Any] | None, field: str) -> str:
    ours, theirs = ("-" if row is None else _figure(row[field]) for row in (before, after))
    return ours if ours == theirs else f"{ours} -> {theirs}"


def _figure(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _change(path: str, before: Manifest, after: Manifest) -> str:
    if path not in before.files:
        return "added"
    return "removed" if path not in after.files else "changed"


def _differing(old: Path, new: Path) -> int | None:
    """Return how many bytes differ at the same place, where both files are there and as long."""
    import numpy as np

    if not old.is_file() or not new.is_file() or old.stat().st_size != new.stat().st_size or not old.stat().st_size:
        return None
    return int((np.memmap(old, np.uint8, "r") != np.memmap(new, np.uint8, "r")).sum())


def _answers(bundle: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Return, for each variant, how far its answers here are from the golden ones."""
    import numpy as np
    from safetensors.numpy import load_file

    from compiler.targets import load_target
    from isthmus.bundle import GOLDEN
    from isthmus.errors import InputError, MissingExtraError
    from isthmus.machine import machine

    tensors = load_file(bundle / GOLDEN)
    inputs = {spec.name: tensors[f"input.{spec.name}"] for spec in manifest.inputs}
    rows = []
    for variant in manifest.variants:
        row = {"variant": variant.id, "allowed": variant.tolerance, "difference": None, "verdict": "", "why": ""}
        rows.append(row)
        try:
            if variant.platform not in ("any", machine()):
                raise InputError(f"it is for {variant.platform}")
            runner = load_target(variant.runtime, role="light").open(bundle / variant.entry, threads=1)
            outputs = runner.infer(inputs)
        except (InputError, MissingExtraError) as error:
            row |= {"verdict": "not run", "why": error.message}
            continue
        worst = max(
            float(np.abs(outputs[spec.name].astype(np.float64) - tensors[f"output.{variant.id}.{spec.name}"]).max())
            for spec in manifest.outputs
        )
        row |= {"difference": worst, "verdict": "right" if worst <= variant.tolerance else "wrong"}
    return rows
