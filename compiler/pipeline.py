"""From a recipe to a bundle, in order:

1. read the recipe, the bundle of the version before, and check that the output may be written; when nothing has
   changed since the bundle at the output was made, that is all;
2. capture: both models become ONNX, checked, with the same inputs and outputs;
3. data: calibration samples with labels, samples for quantization;
4. heavy: build its Triton folder; its answers to the calibration data;
5. reference: the light source's answers to the calibration data and to edge cases;
6. variants, several at a time: build each with the fastest setting, prove it against the reference, and go on to the
   next gentler setting while the guard refuses; INT8 first on the grid of the version before, then on half of it;
7. when a required variant was refused: stop, nothing is written;
8. measure each variant, one after the other, with nothing else running;
9. calibrate each variant, package everything, and move it into place at once.

Captures, builds, proofs and measurements are processes of their own (compiler.processes), and their results are kept
(compiler.cache): another build of the same starts from what is there.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import load_file, save_file

from compiler.cache import Cache, code_digest, key, tool_versions
from compiler.capture import CapturedModel, check_same_interface
from compiler.data import LABELS, LabelledSamples, has_labels, load_labelled, load_samples
from compiler.evaluate import Logits
from compiler.evaluate import measure as metric_of
from compiler.heavy import heavy_logits
from compiler.ladder import Accepted, Candidate, Subject, climb
from compiler.package import Contents, check_folder, check_output, move_into_place, write_bundle
from compiler.plan import Plan, make_plan
from compiler.processes import Advance, Budget, default_budget
from compiler.recipe import Recipe
from compiler.record import Stage, calibration_record
from compiler.report import LeftOut, Report, pareto, recommend
from compiler.targets import load_target
from compiler.verify import Materials, golden_rows, prepare
from compiler.worker import ARTEFACT, RESULT, BuildJob, BuildResult
from compiler.workshop import Workshop
from isthmus.bundle import (
    INT8,
    MANIFEST,
    REPORT,
    Calibration,
    Manifest,
    TensorSpec,
    Variant,
    open_bundle,
)
from isthmus.digests import sha256_file
from isthmus.errors import InputError, IsthmusError, VerificationError
from isthmus.machine import machine
from isthmus.tensors import Array

_MEASURED: Final = "times and memory are measured, not computed"
_DONE: Final = "bundle.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a compilation made; without a manifest nothing was written."""

    output: Path
    report: Report
    manifest: Manifest | None = None
    calibration: Calibration | None = None
    reused: bool = False  # nothing had changed


class GuardError(VerificationError):
    """A required variant is worse than the guard allows; `outcome` has the measurements of all of them."""

    reason = "guard-refused"

    def __init__(self, outcome: Outcome) -> None:
        refused = [f"{entry.id}: {entry.reason}" for entry in outcome.report.left_out if entry.required]
        super().__init__(
            f"no bundle was written: {'; '.join(refused) or 'no variant is left'}",
            hint="leave the variant out of the recipe or set required = false, give quantization samples that look "
            "like the real ones, or allow more under [guard]",
        )
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class _Job:
    """What all stages share."""

    plan: Plan
    light: CapturedModel
    heavy: CapturedModel
    data: LabelledSamples
    score_output: str
    shop: Workshop

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    def advance(self, stage: str) -> Callable[[int, int], None]:
        return partial(self.shop.advance, stage)


def compile_bundle(
    recipe_path: Path,
    output: Path,
    *,
    cache: Path | None = None,
    budget: Budget | None = None,
    delta_from: Path | None = None,
    progress: Advance = lambda *_: None,
) -> Outcome:
    """Compile the recipe into a bundle at `output`.

    Args:
        recipe_path: The TOML file.
        output: The bundle's folder; a bundle that is there is replaced.
        cache: Where results of stages are kept; None for `.compile-cache` beside the output.
        budget: The cores and the memory that may be used; None for all cores and most of the free memory.
        delta_from: The bundle of the version before, folder or archive, instead of the recipe's update.delta_from.
        progress: Called with (stage, done, total), from several threads.

    Raises:
        GuardError: A required variant is worse than the guard allows.
        InputError: The recipe, a model or the data are not what they must be.
        VerificationError: The data cannot support the operating point, or a source model is broken.
        ConfigError: A tool is not installed, or there is not enough memory.
    """
    # 1
    check_output(output)
    folder = output.parent / ".compile-cache" if cache is None else cache
    budget = budget or default_budget()
    check_folder(folder, "cache")
    store = Cache(folder)
    plan = make_plan(recipe_path, output, cores=budget.cores, cache=store, delta_from=delta_from)
    done = _unchanged(store, plan, output)
    if done is not None:
        return done
    shop = Workshop(store, budget, progress)
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
            outcome = _compile(plan, shop, Path(scratch), recipe_path, output)
    finally:
        budget.stop()
    _remember(store, plan, outcome)
    store.prune(time.time())
    return outcome


def _compile(plan: Plan, shop: Workshop, work: Path, recipe_path: Path, output: Path) -> Outcome:
    bundle = work / "bundle"
    bundle.mkdir()
    job = _prepare(plan, shop, recipe_path)
    # 4
    note = _build_heavy(job, bundle / "heavy")
    heavy = heavy_logits(
        job.heavy, job.data, job.score_output, shop.cache, job.advance("heavy model"), threads=shop.budget.cores
    )
    # 5
    subject = _subject(job, work)
    # 6
    results = shop.side_by_side([partial(climb, subject, candidate, shop) for candidate in _with_previous(plan)])
    accepted = [entry for entry in results if isinstance(entry, Accepted)]
    left_out = [entry for entry in results if isinstance(entry, LeftOut)]
    # 7
    if not accepted or any(entry.required for entry in left_out):
        raise GuardError(Outcome(output, _report(job, subject, accepted, left_out, heavy)))
    # 8
    if plan.recipe.measure.enabled:
        accepted = [_measured(job, entry) for entry in accepted]
    report = _report(job, subject, accepted, left_out, heavy)
    # 9
    return _finish(job, accepted, heavy, report, note, bundle, output)


def _unchanged(cache: Cache, plan: Plan, output: Path) -> Outcome | None:
    """Return the outcome again when the bundle at the output is the one that these inputs gave."""
    entry = cache.find("bundle", plan.key)
    manifest_path = output / MANIFEST
    if entry is None or not manifest_path.is_file():
        return None
    if (entry / _DONE).read_text() != sha256_file(manifest_path):
        return None
    try:
        manifest = open_bundle(output)
    except IsthmusError:  # somebody changed a file of it
        return None
    report = Report.model_validate_json((output / REPORT).read_bytes())
    calibration = Calibration.model_validate_json((output / "calibration.json").read_bytes())
    return Outcome(output, report, manifest, calibration, reused=True)


def _remember(cache: Cache, plan: Plan, outcome: Outcome) -> None:
    digest_of_manifest = sha256_file(outcome.output / MANIFEST)
    entry = cache.find("bundle", plan.key)
    if entry is not None:
        shutil.rmtree(entry)
    cache.get("bundle", plan.key, lambda folder: _write(folder / _DONE, digest_of_manifest))


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _prepare(plan: Plan, shop: Workshop, recipe_path: Path) -> _Job:
    recipe = plan.recipe
    # 2
    folder = recipe_path.resolve().parent
    light, heavy = shop.side_by_side(
        [
            partial(
                shop.capture, section.source, section.options, plan.sources[what], what=f"{what} model", path=folder
            )
            for what, section in (("light", recipe.light), ("heavy", recipe.heavy))
        ]
    )
    check_same_interface(light, heavy, features=_features(recipe, light))
    score = _score_output(recipe, light)
    labels = recipe.model.labels
    classes, sequences = score.shape[-1], bool(recipe.calibration.read_as)
    if labels and len(labels) != classes:
        what = "tokens" if sequences else "classes"
        raise InputError(f"output {score.name!r} has {classes} {what}, model.labels has {len(labels)}")
    # 3
    data = load_labelled(recipe.data.calibration, light, classes=classes, sequences=sequences)
    if recipe.data.quantization is not None:
        if has_labels(recipe.data.quantization):
            load_labelled(recipe.data.quantization, light, classes=classes, sequences=sequences)
        else:
            load_samples(recipe.data.quantization, light)
    return _Job(plan, light, heavy, data, score.name, shop)


def _features(recipe: Recipe, light: CapturedModel) -> str:
    """Return the name of the output with features, after checking that there is one."""
    name = recipe.calibration.features
    spec = next((spec for spec in light.outputs if spec.name == name), None)
    if name and (spec is None or spec.datatype != "FP32" or len(spec.shape) < 2 or -1 in spec.shape[1:]):
        raise InputError(
            f"calibration.features: expected an FP32 output of the light model with fixed axes, got {name!r}; it has "
            + ", ".join(f"{s.name} {s.datatype}{list(s.shape)}" for s in light.outputs),
            hint="name an output with shape [batch, features], or leave it out",
        )
    return name


def _score_output(recipe: Recipe, light: CapturedModel) -> TensorSpec:
    by_name = {spec.name: spec for spec in light.outputs if spec.name != recipe.calibration.features}
    name = recipe.calibration.output or ("logits" if "logits" in by_name or len(by_name) > 1 else next(iter(by_name)))
    spec = by_name.get(name)
    axes = ("batch", "positions", "tokens") if recipe.calibration.read_as else ("batch", "classes")
    if spec is None or spec.datatype != "FP32" or len(spec.shape) != len(axes) or spec.shape[-1] < 2:
        raise InputError(
            f"calibration.output: expected an FP32 output with one logit per {'token' if axes[2:] else 'class'}, got "
            f"{name!r}; the model has " + ", ".join(f"{s.name} {s.datatype}{list(s.shape)}" for s in light.outputs),
            hint=f"name the output with shape [{', '.join(axes)}] as calibration.output",
        )
    return spec


def _build_heavy(job: _Job, folder: Path) -> str:
    """Build the heavy model's Triton folder; return why another build may give other bytes, or nothing."""
    section, model, shop = job.recipe.heavy, job.recipe.model, job.shop
    target = load_target(section.target, role="heavy")
    build = BuildJob(
        target=section.target,
        role="heavy",
        model=job.heavy,
        precision=section.precision,
        samples=job.recipe.data.quantization,
        name=model.name,
        max_batch=model.max_batch,
        serving=section.serving,
    )
    entry = shop.build(build, target.tools, name="heavy model")
    shutil.copytree(entry / ARTEFACT, folder)
    return BuildResult.model_validate_json((entry / RESULT).read_bytes()).not_reproducible


def _subject(job: _Job, work: Path) -> Subject:
    """Run the light source over data and edge cases, or take its answers from the cache."""
    recipe = job.recipe

    def run(folder: Path) -> None:
        source = load_target("onnxruntime", role="light").open(job.light.path, threads=job.shop.budget.cores)
        prepare(
            job.light, job.data.inputs, source, Materials(folder), max_batch=recipe.model.max_batch,
            advance=job.advance("light source"),
        )  # fmt: skip

    parts = key(
        model=sha256_file(job.light.path), data=job.data.sha256, batch=recipe.model.max_batch,
        tools=tool_versions(["onnxruntime", "numpy"]), code=code_digest(),
    )  # fmt: skip
    materials = Materials(job.shop.cache.get("reference", parts, run))
    reference = load_file(materials.reference)
    rows = golden_rows(len(job.data))
    return Subject(
        model=job.light,
        materials=materials,
        reference=reference,
        golden={name: array[rows] for name, array in reference.items()},
        score_output=job.score_output,
        labels=job.data.labels,
        decoding=recipe.calibration.read_as,
        guard=recipe.guard,
        samples=_quantization(job, work),
        name=recipe.model.name,
        max_batch=recipe.model.max_batch,
    )


def _quantization(job: _Job, work: Path) -> Path | None:
    """Return the samples for quantization as targets read them: the model's inputs and perhaps labels, no more."""
    path = job.recipe.data.quantization
    if path is None:
        return None
    samples = load_samples(path, job.light)
    tensors = {name: np.ascontiguousarray(array) for name, array in sorted(samples.inputs.items())}
    if has_labels(path) and not job.recipe.calibration.read_as:  # targets control the accuracy of classes only
        tensors[LABELS] = load_file(path)[LABELS]
    save_file(tensors, work / "quantization.safetensors")
    return work / "quantization.safetensors"


def _with_previous(plan: Plan) -> list[Candidate]:
    """Return the candidates with the entry of the version before, for those whose grid may be kept."""
    if plan.previous is None:
        return list(plan.candidates)
    folder, manifest = plan.previous
    entries = {variant.id: folder / variant.entry for variant in manifest.variants}
    return [
        replace(candidate, previous=entries.get(candidate.id)) if candidate.precision in INT8 else candidate
        for candidate in plan.candidates
    ]


def _measured(job: _Job, entry: Accepted) -> Accepted:
    """Return the variant with its times, where it runs here."""
    if not entry.candidate.runs_here:
        return entry
    timing = job.shop.measure(
        entry.candidate.target_name,
        entry.entry,
        job.light,
        job.data.inputs,
        tools=entry.candidate.target.tools,
        name=entry.candidate.id,
        max_batch=job.recipe.model.max_batch,
        seconds=job.recipe.measure.seconds,
    )
    return replace(entry, report=entry.report.model_copy(update={"timing": timing}))


def _report(job: _Job, subject: Subject, accepted: list[Accepted], left_out: list[LeftOut], heavy: Logits) -> Report:
    metric, labels, decoding = job.recipe.guard.metric, job.data.labels, job.recipe.calibration.read_as
    variants = tuple(entry.report for entry in accepted)
    return Report(
        samples=len(job.data),
        light_accuracy=metric_of(metric, subject.reference[job.score_output], labels, decoding),
        heavy_accuracy=metric_of(metric, heavy, labels, decoding),
        guard=job.recipe.guard,
        variants=variants,
        left_out=tuple(left_out),
        pareto=pareto(variants),
        recommended=recommend(variants, machine()),
    )


def _finish(
    job: _Job, accepted: list[Accepted], heavy: Logits, report: Report, heavy_varies: str, bundle: Path, output: Path
) -> Outcome:
    for entry in accepted:
        shutil.copytree(entry.artefact, bundle / "variants" / entry.candidate.id)
    stage = Stage(job.recipe, job.light, job.heavy, job.score_output, job.data, heavy, job.shop)
    calibration = calibration_record(stage, accepted, bundle)
    contents = Contents(
        recipe=job.recipe,
        recipe_sha256=job.plan.recipe_sha256,
        light=job.light,
        sources=job.plan.sources,
        variants=[_variant(entry) for entry in accepted],
        calibration=calibration,
        report=report,
        golden=_golden(job, accepted),
        tools=[tool for entry in accepted for tool in entry.candidate.target.tools],
        varies=_varies(accepted, heavy_varies, bundle, measured=job.recipe.measure.enabled),
    )
    job.shop.advance("package", 0, 1)
    manifest = write_bundle(bundle, contents)
    move_into_place(bundle, output)
    job.shop.advance("package", 1, 1)
    return Outcome(output, report, manifest, calibration)


def _variant(entry: Accepted) -> Variant:
    candidate, report = entry.candidate, entry.report
    return Variant(
        id=candidate.id,
        runtime=candidate.target_name,
        precision=candidate.precision,
        platform=candidate.platform,
        inference_precision=entry.result.inference_precision,
        entry=f"variants/{candidate.id}/{entry.result.entry}",
        tolerance=report.tolerance,
        verified=report.verified,
        accuracy=report.accuracy,
        latency_ms=None if report.timing is None else report.timing.p50_ms,
        ceilings=candidate.ceilings,
    )


def _varies(accepted: list[Accepted], heavy: str, bundle: Path, *, measured: bool) -> dict[str, str]:
    """Return the files that another build of the same may make otherwise, and why."""
    reasons = {f"variants/{entry.candidate.id}": entry.result.not_reproducible for entry in accepted} | {"heavy": heavy}
    found = {
        path.relative_to(bundle).as_posix(): reason
        for folder, reason in reasons.items()
        if reason
        for path in sorted((bundle / folder).rglob("*"))
        if path.is_file()
    }
    return found | ({REPORT: _MEASURED} if measured else {})


def _golden(job: _Job, accepted: list[Accepted]) -> dict[str, Array]:
    rows = golden_rows(len(job.data))
    golden = {f"input.{name}": array[rows] for name, array in job.data.inputs.items()}
    for entry in accepted:
        golden |= {f"output.{entry.candidate.id}.{name}": array for name, array in entry.golden.items()}
    return golden
