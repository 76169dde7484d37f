"""What became of a model's requests: the one place that counts them.

ModelStatistics, GetStatus and the metrics all read these numbers, so they cannot disagree. Every request ends in
exactly one of two ways: answered, under its route and reason, or failed, under its reason.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from edge.policy import ROUTES, Route
from isthmus.errors import IsthmusError

# Upper bounds of the latency histograms' buckets; one more bucket takes what is slower.
LATENCY_BOUNDS_S: Final = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
_BOUNDS_NS: Final = tuple(round(bound * 1e9) for bound in LATENCY_BOUNDS_S)


@dataclass(slots=True)
class RouteCount:
    """Answers of one route."""

    answers: int = 0
    cached: int = 0  # of them, those that were given before
    rows: int = 0
    total_ns: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # adds up to `answers`
    buckets: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS_NS) + 1))  # adds up to `answers`


@dataclass(slots=True)
class Counters:
    """What became of a model's requests since the agent started; every request is counted once."""

    routes: dict[Route, RouteCount] = field(default_factory=lambda: {route: RouteCount() for route in ROUTES})
    failures: Counter[str] = field(default_factory=Counter)  # by reason
    error_ns: int = 0
    in_progress: int = 0
    cache_misses: int = 0
    light_inferences: int = 0
    light_ns: int = 0
    compared_rows: int = 0  # rows that both models answered
    agreed_rows: int = 0  # those for which both chose the same class
    last_ms: int = 0  # wall clock of the last answer

    @property
    def errors(self) -> int:
        """Return the requests that got no answer."""
        return self.failures.total()

    def answered(self, route: Route, reason: str, rows: int, elapsed_ns: int, now_ms: int) -> None:
        """Count one answer."""
        count = self.routes[route]
        count.answers += 1
        count.rows += rows
        count.total_ns += elapsed_ns
        count.reasons[reason] += 1
        count.buckets[bisect_left(_BOUNDS_NS, elapsed_ns)] += 1
        self.last_ms = now_ms

    def failed(self, error: BaseException, elapsed_ns: int) -> None:
        """Count one request that got no answer."""
        self.failures[_reason(error)] += 1
        self.error_ns += elapsed_ns


def _reason(error: BaseException) -> str:
    if isinstance(error, IsthmusError):
        return error.reason
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "internal"
