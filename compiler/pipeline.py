"""From a recipe to a bundle, in order:

1. read the recipe, the bundle of the version before, and check that the output may be written;
2. capture: both models in, checked, with the same inputs and outputs;
3. data: calibration samples with labels, samples for quantization;
4. heavy: build its Triton folder; its answers to the calibration data (kept in the cache, they take longest);
5. reference: the light source's answers to the calibration data;
6. variants: build each, verify it against the reference; INT8 first on the grid of the version before, and
   on a new one when that is worse than the guard allows;
7. when the guard refused any: stop, nothing is written;
8. calibrate each variant, package everything, and move it into place at once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from compiler.calibrate import calibrate
from compiler.capture import CapturedModel, capture, check_same_interface
from compiler.data import LabelledSamples, Samples, load_labelled, load_samples, run_in_batches
from compiler.evaluate import Labels, Logits, accuracy
from compiler.heavy import heavy_logits
from compiler.package import Contents, check_folder, check_output, move_into_place, write_bundle
from compiler.recipe import Recipe, VariantSection, load_recipe
from compiler.report import Report, VariantReport
from compiler.targets import BuildOptions, Built, Serving, Target, load_target
from compiler.verify import (
    check_batching,
    check_source,
    check_variant,
    golden_rows,
    latency_ms,
    one_by_one,
    tolerance,
)
from isthmus.bundle import (
    Calibration,
    CalibrationData,
    Manifest,
    OperatingPoint,
    TensorSpec,
    Variant,
    VariantCalibration,
    open_bundle,
)
from isthmus.digests import sha256_file
from isthmus.errors import BundleError, InputError, VerificationError
from isthmus.tensors import Array

THREADS: Final = 2  # for running over the data; latency is taken with one
BATCH: Final = 64
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True, slots=True)
class VariantOutcome:
    """One variant as it was built and measured."""

    variant: Variant
    report: VariantReport
    latency_ms: float
    logits: Logits
    golden: Mapping[str, Array]
    refused: str
    calibration: VariantCalibration | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a compilation made; without a manifest nothing was written."""

    output: Path
    variants: tuple[VariantOutcome, ...]
    report: Report
    manifest: Manifest | None = None


class GuardError(VerificationError):
    """A variant is worse than the guard allows; `outcome` has the measurements of all of them."""

    reason = "guard-refused"

    def __init__(self, outcome: Outcome) -> None:
        refused = [f"{entry.variant.id}: {entry.refused}" for entry in outcome.variants if entry.refused]
        super().__init__(
            f"no bundle was written: {'; '.join(refused)}",
            hint="leave the variant out of the recipe, give quantization samples that look like the real ones, "
            "or allow more under [guard]",
        )
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class _Job:
    """What all stages share."""

    recipe: Recipe
    light: CapturedModel
    heavy: CapturedModel
    data: LabelledSamples
    quantization: Samples | None
    previous: tuple[Path, Manifest] | None
    score_output: str
    bundle: Path  # the folder that becomes the bundle
    progress: Progress


def compile_bundle(
    recipe_path: Path, output: Path, *, cache: Path | None = None, progress: Progress = lambda *_: None
) -> Outcome:
    """Compile the recipe into a bundle at `output`.

    Args:
        recipe_path: The TOML file.
        output: The bundle's folder; a bundle that is there is replaced.
        cache: Where the heavy model's answers are kept; None for `.compile-cache` beside the output.
        progress: Called with (stage, done, total).

    Raises:
        GuardError: A variant is worse than the guard allows.
        InputError: The recipe, a model or the data are not what they must be.
        VerificationError: The data cannot support the operating point, or a source model is broken.
    """
    # 1
    recipe, recipe_sha256 = load_recipe(recipe_path)
    targets = {section.id: _target(section) for section in recipe.variants}
    load_target(recipe.heavy.target, role="heavy")
    check_output(output)
    previous = _previous(recipe, output)
    cache = output.parent / ".compile-cache" if cache is None else cache
    check_folder(cache, "cache")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        work = Path(scratch)
        bundle = work / "bundle"
        bundle.mkdir()
        job = _prepare(recipe, work, bundle, previous, progress)
        # 4
        _build_heavy(job)
        heavy = heavy_logits(job.heavy, job.data, job.score_output, cache, _stage(job, "heavy model"))
        # 5
        reference = _reference(job)
        # 6
        variants = tuple(_variant(job, section, targets[section.id], reference, work) for section in recipe.variants)
        report = _report(job, variants, reference[job.score_output], heavy)
        # 7
        if any(entry.refused for entry in variants):
            raise GuardError(Outcome(output, variants, report))
        # 8
        return _finish(job, variants, heavy, report, recipe_sha256, output)


def _target(section: VariantSection) -> Target:
    """Return a variant's target, before any work is done for it."""
    target = load_target(section.target, role="light")
    if section.precision not in target.precisions:
        raise InputError(
            f"target {section.target!r} has no precision {section.precision!r}; it has {', '.join(target.precisions)}",
            hint="mend the recipe",
        )
    return target


def _previous(recipe: Recipe, output: Path) -> tuple[Path, Manifest] | None:
    folder = recipe.update.delta_from
    if folder is None:
        return None
    if folder.resolve() == output.resolve():
        raise InputError(f"update.delta_from is the output itself: {output}", hint="give another --output")
    manifest = open_bundle(folder)
    if manifest.name != recipe.model.name or manifest.version >= recipe.model.version:
        raise InputError(
            f"update.delta_from: expected an older version of {recipe.model.name!r} than {recipe.model.version}, "
            f"got {manifest.name}@{manifest.version}"
        )
    return folder, manifest


def _prepare(
    recipe: Recipe, work: Path, bundle: Path, previous: tuple[Path, Manifest] | None, progress: Progress
) -> _Job:
    # 2
    progress("capture", 0, 2)
    light = capture(recipe.light.source, work / "light.onnx")
    progress("capture", 1, 2)
    heavy = capture(recipe.heavy.source, work / "heavy.onnx")
    progress("capture", 2, 2)
    check_same_interface(light, heavy)
    score = _score_output(recipe, light)
    labels = recipe.model.labels
    if labels and len(labels) != score.shape[1]:
        raise InputError(f"output {score.name!r} has {score.shape[1]} classes, model.labels has {len(labels)}")
    # 3
    data = load_labelled(recipe.data.calibration, light.inputs, classes=score.shape[1])
    needed = recipe.data.quantization
    quantization = None if needed is None else load_samples(needed, light.inputs)
    return _Job(recipe, light, heavy, data, quantization, previous, score.name, bundle, progress)


def _score_output(recipe: Recipe, light: CapturedModel) -> TensorSpec:
    by_name = {spec.name: spec for spec in light.outputs}
    name = recipe.calibration.output or ("logits" if "logits" in by_name or len(by_name) > 1 else next(iter(by_name)))
    spec = by_name.get(name)
    if spec is None or spec.datatype != "FP32" or len(spec.shape) != 2:
        raise InputError(
            f"calibration.output: expected an FP32 output with one logit per class, got {name!r}; the model has "
            + ", ".join(f"{s.name} {s.datatype}{list(s.shape)}" for s in light.outputs)
        )
    return spec


def _stage(job: _Job, name: str) -> Callable[[int, int], None]:
    return lambda done, total: job.progress(name, done, total)


def _build_heavy(job: _Job) -> None:
    section, model = job.recipe.heavy, job.recipe.model
    serving = Serving(instances=section.instances, threads=section.threads)
    options = BuildOptions(name=model.name, max_batch=model.max_batch, serving=serving)
    folder = job.bundle / "heavy"
    folder.mkdir()
    load_target(section.target, role="heavy").build(job.heavy, folder, options)


def _reference(job: _Job) -> dict[str, Array]:
    runner = load_target("onnxruntime", role="light").open(job.light.path, threads=THREADS)
    outputs = run_in_batches(runner.infer, job.data.inputs, batch=BATCH, advance=_stage(job, "light source"))
    check_source(outputs, job.light.outputs, len(job.data), what="light")
    return outputs


def _variant(
    job: _Job, section: VariantSection, target: Target, reference: Mapping[str, Array], work: Path
) -> VariantOutcome:
    """Build and verify one variant, on a new grid when the old one is worse than the guard allows."""
    options = BuildOptions(
        precision=section.precision,
        samples=None if job.quantization is None else job.quantization.inputs,
        previous=_previous_entry(job, section),
        name=job.recipe.model.name,
        max_batch=job.recipe.model.max_batch,
    )
    outcome = _build(job, section, target, options, reference, work / f"{section.id}.first")
    if outcome.refused and outcome.report.grid == "kept":
        note = f"on the old grid {outcome.refused}"
        outcome = _build(
            job, section, target, replace(options, previous=None), reference, work / f"{section.id}.second"
        )
        outcome = replace(outcome, report=outcome.report.model_copy(update={"grid_note": note}))
    return outcome


def _previous_entry(job: _Job, section: VariantSection) -> Path | None:
    if job.previous is None or section.precision != "int8":
        return None
    folder, manifest = job.previous
    try:
        return folder / manifest.variant(section.id).entry
    except BundleError:
        return None  # a variant that the version before did not have


def _build(
    job: _Job,
    section: VariantSection,
    target: Target,
    options: BuildOptions,
    reference: Mapping[str, Array],
    work: Path,
) -> VariantOutcome:
    work.mkdir()
    job.progress(f"build {section.id}", 0, 1)
    built = target.build(job.light, work, options)
    job.progress(f"build {section.id}", 1, 1)
    measured = _measure(job, section, target, built, reference, work)
    if not measured.refused:
        (job.bundle / "variants").mkdir(exist_ok=True)
        work.rename(job.bundle / "variants" / section.id)
    return measured


def _measure(
    job: _Job, section: VariantSection, target: Target, built: Built, reference: Mapping[str, Array], folder: Path
) -> VariantOutcome:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    entry = folder / built.entry
    runner = target.open(entry, threads=THREADS)
    outputs = run_in_batches(runner.infer, job.data.inputs, batch=BATCH, advance=_stage(job, f"verify {section.id}"))
    measured = check_variant(
        outputs,
        reference,
        job.data,
        specs=job.light.outputs,
        score_output=job.score_output,
        precision=section.precision,
        guard=job.recipe.guard,
    )
    alone = target.open(entry, threads=1)
    rows = golden_rows(len(job.data))
    golden = one_by_one(alone, job.data.inputs, rows)
    limit = tolerance(golden, section.precision)
    refused = measured.refused or check_batching(golden, outputs, rows, limit)
    source_accuracy = accuracy(reference[job.score_output], job.data.labels)
    return VariantOutcome(
        variant=Variant(
            id=section.id,
            runtime=section.target,
            precision=section.precision,
            entry=f"variants/{section.id}/{built.entry}",
            tolerance=limit,
            accuracy=measured.accuracy,
        ),
        report=VariantReport(
            id=section.id,
            bytes=size,
            accuracy=measured.accuracy,
            accuracy_drop=source_accuracy - measured.accuracy,
            max_difference=measured.max_difference,
            tolerance=limit,
            grid=built.grid,
            grid_note=built.note,
            clipped=built.clipped,
        ),
        latency_ms=latency_ms(alone, job.data.inputs),
        logits=outputs[job.score_output],
        golden=golden,
        refused=refused,
    )


def _report(job: _Job, variants: tuple[VariantOutcome, ...], light: Logits, heavy: Logits) -> Report:
    labels: Labels = job.data.labels
    return Report(
        samples=len(job.data),
        light_accuracy=accuracy(light, labels),
        heavy_accuracy=accuracy(heavy, labels),
        guard=job.recipe.guard,
        variants=tuple(entry.report for entry in variants),
    )


def _finish(
    job: _Job, variants: tuple[VariantOutcome, ...], heavy: Logits, report: Report, recipe_sha256: str, output: Path
) -> Outcome:
    section, model = job.recipe.calibration, job.recipe.model
    point = OperatingPoint(value=section.max_escalation, delta=section.delta)
    done = tuple(
        replace(entry, calibration=calibrate(entry.logits, heavy, job.data.labels, point)) for entry in variants
    )
    calibration = Calibration(
        model=model.name,
        version=model.version,
        output=job.score_output,
        operating_point=point,
        data=CalibrationData(sha256=job.data.sha256, samples=len(job.data)),
        heavy_accuracy=report.heavy_accuracy,
        variants={entry.variant.id: entry.calibration for entry in done if entry.calibration is not None},
    )
    contents = Contents(
        recipe=job.recipe,
        recipe_sha256=recipe_sha256,
        light=job.light,
        sources=_sources(job),
        variants=[entry.variant for entry in done],
        calibration=calibration,
        report=report,
        golden=_golden(job, done),
    )
    job.progress("package", 0, 1)
    manifest = write_bundle(job.bundle, contents)
    move_into_place(job.bundle, output)
    job.progress("package", 1, 1)
    return Outcome(output, done, report, manifest)


def _sources(job: _Job) -> dict[str, str]:
    sources = {"light": job.light.sha256, "heavy": job.heavy.sha256, "calibration": job.data.sha256}
    if job.quantization is not None:
        sources["quantization"] = job.quantization.sha256
    if job.previous is not None:
        sources["delta_from"] = sha256_file(job.previous[0] / "manifest.json")
    return sources


def _golden(job: _Job, variants: tuple[VariantOutcome, ...]) -> dict[str, Array]:
    rows = golden_rows(len(job.data))
    golden = {f"input.{name}": array[rows] for name, array in job.data.inputs.items()}
    for entry in variants:
        golden |= {f"output.{entry.variant.id}.{name}": array for name, array in entry.golden.items()}
    return golden
