"""What an operator asks of a rollout, how far it is, and which devices that means. Data and sums; no decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import sha256
from itertools import pairwise
from typing import Final

from isthmus.errors import InputError

POSITIONS: Final = 1 << 53  # positions lie below; every database and every float holds them exactly
MAX_STAGES: Final = 20
MAX_SOAK_S: Final = 30 * 86400


class State(IntEnum):
    """Where a rollout stands; the numbers are those of RolloutState in fleet.proto."""

    ACTIVE = 1
    PAUSED = 2
    COMPLETED = 3
    ABORTED = 4
    SUPERSEDED = 5

    @property
    def is_open(self) -> bool:
        """Return whether it may still go on."""
        return self in (State.ACTIVE, State.PAUSED)


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the devices, all stages before included: a share of them, or a number."""

    share: float = 0.0
    count: int = 0
    soak_s: int = 600

    @property
    def is_everybody(self) -> bool:
        """Return whether no device is left out."""
        return self.share >= 1.0


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits; docs/rollouts.md explains each. Zero stands for no such limit, where that makes sense."""

    max_failure_rate: float = 0.05
    max_failures: int = 0
    confidence: float = 0.99
    max_error_rate: float = 0.02
    min_agreement: float = 0.0
    max_latency_ratio: float = 0.0
    min_samples: int = 100
    done_share: float = 0.95
    stage_limit_s: int = 86400


@dataclass(frozen=True, slots=True)
class Plan:
    """What an operator asked for."""

    id: str
    model: str
    version: int
    stages: tuple[Stage, ...]
    gates: Gates = Gates()
    selector: Mapping[str, str] = field(default_factory=dict)
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is: all that a rollout remembers."""

    state: State
    stage: int
    thresholds: tuple[int, ...]  # of the stages that began; positions below the last are told the version
    started: tuple[float, ...]  # when each began, Unix seconds

    @property
    def threshold(self) -> int:
        """Return the first position that is not told."""
        return self.thresholds[-1]


def position(rollout: str, device: str) -> int:
    """Return a device's place in a rollout's order: uniform, and the same for ever."""
    return int.from_bytes(sha256(f"{rollout}\0{device}".encode()).digest()[:8], "big") >> 11


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return whether a device with these labels is meant."""
    return all(labels.get(key) == value for key, value in selector.items())


def disjoint(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Return whether no device can be meant by both: they ask for different values of one label."""
    return any(key in other and other[key] != value for key, value in one.items())


def stage_of(plan: Plan, progress: Progress, device: str) -> Stage:
    """Return the stage that a device came in with; its soak is the device's."""
    place = position(plan.id, device)
    for stage, threshold in zip(plan.stages, progress.thresholds, strict=False):
        if place < threshold:
            return stage
    return plan.stages[-1]


def check_plan(stages: Sequence[Stage], gates: Gates) -> None:
    """Check what an operator asked for.

    Raises:
        InputError: Stages do not grow up to everybody, or a limit is out of its range.
    """
    if not 1 <= len(stages) <= MAX_STAGES:
        raise InputError(f"stages: expected 1 to {MAX_STAGES}, got {len(stages)}")
    for stage in stages:
        if (stage.count > 0) == (stage.share > 0):
            raise InputError("stages: expected either a share or a number of devices, above 0")
        if not (0.0 <= stage.share <= 1.0 and 0 <= stage.soak_s <= MAX_SOAK_S):
            raise InputError(f"stages: expected shares up to 100% and a soak of at most {MAX_SOAK_S} s, got {stage}")
    for sizes in ([s.share for s in stages if s.share], [s.count for s in stages if s.count]):
        if any(later <= earlier for earlier, later in pairwise(sizes)):
            raise InputError("stages: expected each to be larger than the one before", hint="for example 1%,10%,100%")
    if not stages[-1].is_everybody or any(stage.is_everybody for stage in stages[:-1]):
        raise InputError("stages: expected the last one, and only that, to be 100%", hint="for example 1%,10%,100%")
    _check_gates(gates, max(stage.soak_s for stage in stages))


def _check_gates(gates: Gates, soak_s: int) -> None:
    # (name, value, smallest, largest); nothing but a number passes a comparison
    ranges = (
        ("max_failure_rate", gates.max_failure_rate, 0.0, 1.0), ("max_error_rate", gates.max_error_rate, 0.0, 1.0),
        ("min_agreement", gates.min_agreement, 0.0, 1.0), ("max_latency_ratio", gates.max_latency_ratio, 0.0, 1e6),
        ("confidence", gates.confidence, 0.5, 1.0 - 1e-9), ("done_share", gates.done_share, 0.01, 1.0),
        ("min_samples", gates.min_samples, 1, 1 << 31), ("stage_limit_s", gates.stage_limit_s, soak_s + 1, 1 << 31),
    )  # fmt: skip
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise InputError(f"{name}: expected {low:g} to {high:g}, got {value:g}")
