"""Every target on one model: which take it, how fast each is, and how near to the source. Nothing is packaged.

Without labels, the source's own answers are the truth: what a variant loses is where it disagrees with the source.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import load_file, save_file

from compiler.cache import Cache
from compiler.capture import CapturedModel
from compiler.data import has_labels, load_labelled, load_samples
from compiler.evaluate import Labels
from compiler.invention import invent_samples
from compiler.ladder import Accepted, Candidate, Subject, climb
from compiler.processes import Advance, Budget
from compiler.recipe import GuardSection
from compiler.report import LeftOut, VariantReport, pareto
from compiler.sources import SourceOptions, digest
from compiler.targets import TARGETS, load_target
from compiler.verify import Materials, golden_rows, prepare
from compiler.workshop import Workshop
from isthmus.errors import InputError, MissingExtraError
from isthmus.tensors import Array

INVENTED: Final = 32  # samples, when none are given


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of it."""

    model: CapturedModel
    samples: int
    invented: bool  # nobody gave samples
    variants: tuple[VariantReport, ...]
    left_out: tuple[LeftOut, ...]
    pareto: tuple[str, ...]
    accepted: tuple[Accepted, ...]


def candidates(
    targets: Sequence[str] = (), precisions: Sequence[str] = (), *, cpu: str = ""
) -> tuple[list[Candidate], list[LeftOut]]:
    """Return all variants of these targets and precisions (empty: all), and those whose library is not installed.

    Raises:
        InputError: There is no such target or precision.
    """
    found: list[Candidate] = []
    missing: list[LeftOut] = []
    for name in targets or [name for name, entry in TARGETS.items() if entry.role == "light"]:
        try:
            target = load_target(name, role="light")
        except MissingExtraError as error:
            missing.append(LeftOut(id=name, required=False, reason=error.message, hint=error.hint))
            continue
        for precision in target.precisions:
            if precisions and precision not in precisions:
                continue
            found.append(
                Candidate(
                    id=f"{name}-{precision}", target_name=name, target=target, precision=precision,
                    platform=target.platforms[0], cpu=cpu, required=False,
                )
            )  # fmt: skip
    if not found and precisions:
        raise InputError(f"no target has precision {', '.join(precisions)}", hint="`isthmus targets list` shows them")
    return found, missing


def try_targets(
    source: str | Path,
    options: SourceOptions,
    wanted: Sequence[Candidate],
    *,
    cache: Path,
    budget: Budget,
    samples: Path | None = None,
    max_batch: int = 8,
    seconds: float = 0.5,
    progress: Advance = lambda *_: None,
) -> Trial:
    """Build, prove and measure every candidate for one model.

    Args:
        source: What `compiler.sources` can read.
        options: How it is to be read.
        wanted: From `candidates`.
        cache: Where results are kept.
        budget: Cores and memory that may be used.
        samples: A safetensors file with inputs, and "labels" where there are some; None: samples are invented.
        max_batch: The largest batch that is tried.
        seconds: How long each figure is measured.
        progress: Called with (stage, done, total).

    Raises:
        InputError: The source or the samples are not what they must be.
    """
    shop = Workshop(Cache(cache), budget, progress)
    with tempfile.TemporaryDirectory(prefix="isthmus-") as scratch:
        work = Path(scratch)
        model = shop.capture(str(source), options, digest(source, options), path=Path.cwd())
        inputs, labels = _samples(model, samples)
        subject = _subject(model, inputs, labels, work, max_batch, shop)
        results = shop.side_by_side([partial(climb, subject, candidate, shop) for candidate in wanted])
        accepted = [
            _measured(entry, model, inputs, seconds, max_batch, shop)
            for entry in results
            if isinstance(entry, Accepted)
        ]
    variants = tuple(entry.report for entry in accepted)
    return Trial(
        model=model,
        samples=len(next(iter(inputs.values()))),
        invented=samples is None,
        variants=variants,
        left_out=tuple(entry for entry in results if isinstance(entry, LeftOut)),
        pareto=pareto(variants),
        accepted=tuple(accepted),
    )


def _samples(model: CapturedModel, path: Path | None) -> tuple[dict[str, Array], Labels | None]:
    if path is None:
        return invent_samples(model, INVENTED), None
    if has_labels(path):
        outputs = [spec.shape[1] for spec in model.outputs if len(spec.shape) == 2 and spec.shape[1] > 1]
        if outputs:
            labelled = load_labelled(path, model, classes=outputs[0])
            return labelled.inputs, labelled.labels
    return load_samples(path, model).inputs, None


def _subject(
    model: CapturedModel,
    inputs: dict[str, Array],
    labels: Labels | None,
    work: Path,
    max_batch: int,
    shop: Workshop,
) -> Subject:
    source = load_target("onnxruntime", role="light").open(model.path, threads=shop.budget.cores)
    materials = Materials(work / "materials")
    reference = prepare(model, inputs, source, materials, max_batch=max_batch, advance=partial(shop.advance, "source"))
    score = next(
        (spec.name for spec in model.outputs if spec.datatype == "FP32" and len(spec.shape) == 2 and spec.shape[1] > 1),
        "",
    )
    if labels is None and score:
        labels = reference[score].argmax(axis=1)
    samples = work / "samples.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in sorted(inputs.items())}, samples)
    rows = golden_rows(len(next(iter(inputs.values()))))
    return Subject(
        model=model,
        materials=materials,
        reference=reference,
        golden={name: array[rows] for name, array in load_file(materials.reference).items()},
        score_output=score,
        labels=labels if score else None,
        guard=GuardSection(),
        samples=samples,
        name="model",
        max_batch=max_batch,
    )


def _measured(
    entry: Accepted, model: CapturedModel, inputs: dict[str, Array], seconds: float, max_batch: int, shop: Workshop
) -> Accepted:
    if not entry.candidate.runs_here:
        return entry
    candidate = entry.candidate
    timing = shop.measure(
        candidate.target_name, entry.entry, model, inputs, tools=candidate.target.tools, name=candidate.id,
        max_batch=max_batch, seconds=seconds,
    )  # fmt: skip
    return replace(entry, report=entry.report.model_copy(update={"timing": timing}))
