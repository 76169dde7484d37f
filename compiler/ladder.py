"""One variant, from the fastest setting of its target down to the gentlest, until the guard is content.

Each rung is a build and a proof in a process of its own; what was built before comes from the cache. What was tried,
and why it was refused, goes into the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from safetensors.numpy import load_file

from compiler.capture import CapturedModel
from compiler.evaluate import Comparison, Labels, Logits, compare
from compiler.grid import PreviousGrid
from compiler.processes import CancelledError
from compiler.recipe import GuardSection
from compiler.report import Attempt, LeftOut, VariantReport
from compiler.targets import Target, Tuning, UnsupportedModelError
from compiler.verify import Materials, Proof, tolerance, verdict
from compiler.worker import ARTEFACT, GOLDEN, LOGITS, RESULT, BuildJob, BuildResult
from compiler.workshop import Workshop
from isthmus.bundle import Ceilings
from isthmus.decoding import Decoding
from isthmus.errors import ConfigError, InputError, IsthmusError
from isthmus.machine import machine
from isthmus.tensors import Array

# How much of the old grid is kept at most, as share of the quantized tensors, rung by rung; the least damaged ones.
_SHARES: Final = {1.0: "on the old grid", 0.5: "with half of the tensors on the old grid"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant that somebody wants."""

    id: str
    target_name: str
    target: Target
    precision: str
    platform: str
    cpu: str = ""
    setting: str = ""  # empty: all of the target's, in order
    required: bool = True
    ceilings: Ceilings | None = None  # what it may take on a device
    tuning: Tuning = field(default_factory=Tuning)
    previous: Path | None = None  # the entry of the version before, whose grid is to be kept

    @property
    def runs_here(self) -> bool:
        """Return whether this machine can run what is built."""
        return self.target.runs_here and self.platform in ("any", machine())


@dataclass(frozen=True, slots=True)
class Subject:
    """The model, and everything that its variants are built from and compared with."""

    model: CapturedModel
    materials: Materials
    reference: Mapping[str, Array]  # the source's outputs for all samples
    golden: Mapping[str, Array]  # of them, those for the golden rows
    score_output: str  # empty: the model has none
    labels: Labels | None  # None: only parity is judged
    guard: GuardSection
    samples: Path | None  # for quantization
    name: str
    max_batch: int
    decoding: Decoding = ""  # how that output is read


@dataclass(frozen=True, slots=True)
class Accepted:
    """A variant that may go into a bundle."""

    candidate: Candidate
    folder: Path  # in the cache; the artefact is below it
    result: BuildResult
    report: VariantReport
    logits: Logits | None
    golden: Mapping[str, Array]

    @property
    def artefact(self) -> Path:
        """Return the folder that goes into the bundle."""
        return self.folder / ARTEFACT

    @property
    def entry(self) -> Path:
        """Return the file that a runtime opens."""
        return self.artefact / self.result.entry


@dataclass(frozen=True, slots=True)
class _Rung:
    setting: str
    previous: PreviousGrid | None


def climb(subject: Subject, candidate: Candidate, shop: Workshop) -> Accepted | LeftOut:
    """Return the variant with the first setting that the guard accepts, or why there is none.

    Raises:
        IsthmusError: A required variant cannot be built at all.
    """
    attempts: list[Attempt] = []
    failure: IsthmusError | None = None
    notes: list[str] = []
    renewed: set[str] = set()  # settings that were tried with new scales
    for rung in _rungs(candidate):
        if rung.setting in renewed:
            continue
        try:
            folder = _build(subject, candidate, rung, shop)
        except CancelledError:
            raise
        except (InputError, ConfigError) as error:
            failure = error
            attempts.append(Attempt(setting=rung.setting, refused=error.message))
            if isinstance(error, UnsupportedModelError):
                break
            continue
        judged = _judge(subject, candidate, rung, folder, tuple(attempts), "; ".join(notes))
        if isinstance(judged, Accepted):
            return judged
        attempts.append(judged)
        if judged.grid in ("kept", "part") and rung.previous is not None:
            notes.append(f"{_SHARES[rung.previous.share]} {judged.refused}")
            continue
        renewed.add(rung.setting)
        if rung.previous is not None:  # the version before has no grid for it
            notes.append(BuildResult.model_validate_json((folder / RESULT).read_bytes()).note)
    tried = [attempt for attempt in attempts if attempt.accuracy is not None]
    if candidate.required and failure is not None and not tried:
        raise failure
    reason = "; ".join(f"{attempt.setting}: {attempt.refused}" for attempt in attempts)
    hint = failure.hint if failure is not None and not tried else ""
    return LeftOut(id=candidate.id, required=candidate.required, reason=reason, hint=hint, attempts=tuple(attempts))


def _rungs(candidate: Candidate) -> Iterator[_Rung]:
    settings = (candidate.setting,) if candidate.setting else candidate.target.settings(candidate.precision)
    if candidate.previous is not None:
        for share in _SHARES:
            yield _Rung(settings[0], PreviousGrid(candidate.previous, share))
    for setting in settings:
        yield _Rung(setting, None)


def _build(subject: Subject, candidate: Candidate, rung: _Rung, shop: Workshop) -> Path:
    job = BuildJob(
        target=candidate.target_name,
        role=candidate.target.role,
        model=subject.model,
        precision=candidate.precision,
        setting=rung.setting,
        platform=candidate.platform,
        cpu=candidate.cpu,
        samples=subject.samples,
        score_output=subject.score_output,
        previous=rung.previous,
        name=subject.name,
        max_batch=subject.max_batch,
        max_accuracy_drop=subject.guard.max_accuracy_drop,
        tuning=replace(candidate.tuning, database=shop.cache.folder / "tuning"),
        materials=subject.materials.folder if candidate.runs_here else None,
        threads=shop.budget.threads,
    )
    return shop.build(job, candidate.target.tools, name=candidate.id)


def _judge(
    subject: Subject, candidate: Candidate, rung: _Rung, folder: Path, attempts: tuple[Attempt, ...], note: str
) -> Accepted | Attempt:
    result = BuildResult.model_validate_json((folder / RESULT).read_bytes())
    logits: Logits | None
    if result.proof is None:  # it cannot run here: the device's self-test compares it with the source's answers
        logits, golden = subject.reference.get(subject.score_output), subject.golden
    elif result.proof.parity is None:
        logits, golden = None, {}
    else:
        logits, golden = load_file(folder / LOGITS).get(subject.score_output), load_file(folder / GOLDEN)
    comparison = _compare(subject, logits)
    refused = "" if result.proof is None else _verdict(subject, candidate, result.proof, comparison)
    value = comparison.value if comparison is not None else None
    if refused:
        return Attempt(setting=rung.setting, grid=result.grid, accuracy=value or 0.0, refused=refused)
    limit = tolerance(golden, candidate.precision, seen=result.proof is not None)
    report = _report(candidate, rung, result, comparison, limit, attempts, note)
    return Accepted(candidate, folder, result, report, logits, golden)


def _compare(subject: Subject, logits: Logits | None) -> Comparison | None:
    if subject.labels is None or logits is None:
        return None
    source = subject.reference[subject.score_output]
    return compare(subject.guard.metric, logits, source, subject.labels, subject.decoding)


def _verdict(subject: Subject, candidate: Candidate, proof: Proof, comparison: Comparison | None) -> str:
    value = comparison.value if comparison is not None else 0.0
    source = value + comparison.drop if comparison is not None else 0.0
    return verdict(proof, candidate.precision, subject.guard, source_value=source, value=value)


def _report(
    candidate: Candidate,
    rung: _Rung,
    result: BuildResult,
    comparison: Comparison | None,
    limit: float,
    attempts: tuple[Attempt, ...],
    note: str,
) -> VariantReport:
    if comparison is None:
        comparison = Comparison(1.0, (0.0, 1.0), 0.0, (0.0, 0.0))
    last = Attempt(setting=rung.setting, grid=result.grid, accuracy=comparison.value)
    return VariantReport(
        id=candidate.id,
        target=candidate.target_name,
        precision=candidate.precision,
        platform=candidate.platform,
        setting=rung.setting,
        bytes=result.bytes,
        verified="device" if result.proof is None else "compiler",
        accuracy=comparison.value,
        interval=comparison.interval,
        accuracy_drop=comparison.drop,
        drop_interval=comparison.drop_interval,
        parity=None if result.proof is None else result.proof.parity,
        edges=() if result.proof is None else result.proof.edges,
        tolerance=limit,
        grid=result.grid,
        grid_note=note or (result.note if result.grid else ""),
        clipped=max((tensor.clipped for tensor in result.tensors), default=0.0),
        grids=result.tensors,
        note="" if result.grid else result.note,
        attempts=(*attempts, last),
    )
