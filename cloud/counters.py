"""What the gateway counts about inference, once: metrics and `isthmus traffic show` read it.

Every request that the gateway has found a model for is either answered or failed, and counted under the version that it
was sent to. Plain numbers that are changed in one event loop only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

LATENCY_BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ANSWERED: Final = "answered"


@dataclass(slots=True)
class Latency:
    """A histogram of seconds."""

    buckets: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    total_s: float = 0.0

    def note(self, seconds: float) -> None:
        """Count one."""
        self.buckets[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self.total_s += seconds


@dataclass(slots=True)
class ShadowCounters:
    """What became of copies."""

    agreed: int = 0
    disagreed: int = 0
    failed: int = 0
    dropped: int = 0


@dataclass(slots=True)
class ModelCounters:
    """Of one model."""

    outcomes: Counter[tuple[int, str, str]] = field(default_factory=Counter)  # by version, assignment, outcome
    latency: Latency = field(default_factory=Latency)  # of those that were answered
    shadow: ShadowCounters = field(default_factory=ShadowCounters)
    cache_hits: int = 0
    cache_misses: int = 0


class GatewayCounters:
    """Of all models that were asked for and exist."""

    def __init__(self) -> None:
        self.models: dict[str, ModelCounters] = {}

    def of(self, model: str) -> ModelCounters:
        """Return the counters of a model that exists."""
        found = self.models.get(model)
        if found is None:
            found = self.models[model] = ModelCounters()
        return found
