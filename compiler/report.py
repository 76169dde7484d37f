"""report.json: what the compiler tried and measured, for people and for the next stage of a rollout.

Everything in it but the `timing` of variants follows from the sources, the data and the recipe alone.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from compiler.grid import TensorGrid
from compiler.measure import Timing
from compiler.parity import Parity
from compiler.recipe import GuardSection
from compiler.verify import EdgeResult
from isthmus.bundle import BFLOAT16


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Attempt(_Part):
    """One setting that was tried for a variant; `refused` says why it was not good enough, or is empty."""

    setting: str
    grid: Literal["", "kept", "part", "new"] = ""  # int8: scales of the version before, of some tensors, or new ones
    accuracy: float | None = None  # of the guard's metric; None: it was not run
    refused: str = ""


class VariantReport(_Part):
    """One variant against the source of the light model."""

    id: str
    target: str
    precision: str
    platform: str
    setting: str
    bytes: int
    verified: Literal["compiler", "device"]
    accuracy: float  # of the guard's metric; of the source where the variant could not run here
    interval: tuple[float, float]  # 95 %
    accuracy_drop: float  # against the source; negative when it is better
    drop_interval: tuple[float, float]  # 95 %, of the difference on the same samples
    parity: Parity | None  # None: it could not run here
    edges: tuple[EdgeResult, ...]
    tolerance: float
    grid: Literal["", "kept", "part", "new"]
    grid_note: str  # why the grid is new, or less of it kept, although there is a version before
    clipped: float  # kept grid: largest share of one tensor's weights that had to be clipped
    grids: tuple[TensorGrid, ...] = ()  # int8 with a version before: what each quantized tensor kept, and its cost
    note: str
    attempts: tuple[Attempt, ...]
    timing: Timing | None = None


class LeftOut(_Part):
    """A variant that is not in the bundle: its target cannot take the model, or the guard refused every setting."""

    id: str
    required: bool
    reason: str
    hint: str
    attempts: tuple[Attempt, ...] = ()


class Report(_Part):
    """The whole report."""

    schema_version: Literal[2] = 2
    samples: int
    light_accuracy: float  # of the source, by the guard's metric
    heavy_accuracy: float
    guard: GuardSection
    variants: tuple[VariantReport, ...]
    left_out: tuple[LeftOut, ...] = ()
    pareto: tuple[str, ...] = ()  # no other variant is at once as fast, as small and as accurate
    recommended: dict[str, str] = {}  # what a class of devices should take

    def to_json(self) -> bytes:
        """Return canonical JSON."""
        return self.model_dump_json(indent=2).encode() + b"\n"


def pareto(variants: tuple[VariantReport, ...]) -> tuple[str, ...]:
    """Return the ids of the measured variants that no other one beats in time, size and accuracy at once."""
    measured = [(entry, entry.timing.p50_ms) for entry in variants if entry.timing is not None]
    return tuple(
        entry.id
        for entry, ms in measured
        if not any(
            other is not entry
            and theirs <= ms
            and other.bytes <= entry.bytes
            and other.accuracy >= entry.accuracy
            and (theirs, other.bytes, -other.accuracy) != (ms, entry.bytes, -entry.accuracy)
            for other, theirs in measured
        )
    )


def recommend(variants: tuple[VariantReport, ...], machine: str) -> dict[str, str]:
    """Return the variant that each class of devices should take, by what was measured on this machine.

    The classes: `<machine>` and `<machine>, all cores` (fastest, one sample), `little memory`, `little storage`, `other
    processors` (the fastest here that runs on any), and `nvidia gpu` for engines that could not be measured; `<machine>
    without bfloat16` where the fastest needs that.
    """
    measured = [(entry, entry.timing) for entry in variants if entry.timing is not None]
    found: dict[str, str] = {}
    if measured:
        found[machine] = min(measured, key=lambda pair: pair[1].p50_ms)[0].id
        found[f"{machine}, all cores"] = min(measured, key=lambda pair: pair[1].p50_threads_ms)[0].id
        found["little memory"] = min(measured, key=lambda pair: pair[1].peak_rss_mib)[0].id
        found["little storage"] = min(measured, key=lambda pair: (pair[0].bytes, pair[1].p50_ms))[0].id
        plain = [pair for pair in measured if pair[0].precision not in BFLOAT16]
        if plain and found[machine] not in {entry.id for entry, _ in plain}:
            found[f"{machine} without bfloat16"] = min(plain, key=lambda pair: pair[1].p50_ms)[0].id
        portable = [pair for pair in plain if pair[0].platform == "any"]
        if portable:
            found["other processors"] = min(portable, key=lambda pair: pair[1].p50_ms)[0].id
    engines = [entry.id for entry in variants if entry.target == "tensorrt-rtx"]
    if engines:
        found["nvidia gpu"] = engines[0]
    return found
