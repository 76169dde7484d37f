"""What one version did with the requests that it computed: counted from the moment that it serves, for its trial.

`edge.counters` counts for people and adds up over versions; this counts one version, with times fine enough to compare
two of them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

# Bounds of the latency buckets, milliseconds: 10 us to 100 s, each 12 % above the one before.
_STEP: Final = 1.12
_BOUNDS: Final = tuple(0.01 * _STEP**power for power in range(math.ceil(math.log(1e7, _STEP)) + 1))
BUCKETS: Final = len(_BOUNDS) + 1


class Seen(BaseModel):
    """Counts of one version over a stretch of time; they add up over restarts."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    requests: int = Field(default=0, ge=0)
    errors: int = Field(default=0, ge=0)  # the light model failed, or its answer was not finite
    escalated: int = Field(default=0, ge=0)  # because of the score
    audited: int = Field(default=0, ge=0)  # rows that were compared with the heavy model's
    disagreed: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    buckets: dict[int, int] = {}  # light model's latencies: how many, by bucket

    def plus(self, other: Seen) -> Seen:
        """Return the sum."""
        buckets = {key: self.buckets.get(key, 0) + other.buckets.get(key, 0) for key in {*self.buckets, *other.buckets}}
        return Seen(
            requests=self.requests + other.requests,
            errors=self.errors + other.errors,
            escalated=self.escalated + other.escalated,
            audited=self.audited + other.audited,
            disagreed=self.disagreed + other.disagreed,
            seconds=self.seconds + other.seconds,
            buckets=dict(sorted(buckets.items())),
        )

    def quantile_ms(self, share: float) -> float:
        """Return a quantile of the latencies, milliseconds, to 12 %; 0 when there are none."""
        left = share * sum(self.buckets.values())
        for bucket, count in sorted(self.buckets.items()):
            left -= count
            if left <= 0:
                return _BOUNDS[min(bucket, len(_BOUNDS) - 1)]
        return 0.0

    def slower_than(self, limit_ms: float) -> tuple[int, int]:
        """Return how many latencies are surely above a limit, and how many there are."""
        first = bisect_right(_BOUNDS, limit_ms) + 1
        slower = sum(count for bucket, count in self.buckets.items() if bucket >= first)
        return slower, sum(self.buckets.values())


@dataclass(slots=True)
class Tally:
    """Counts one version while it serves; on the event loop only."""

    requests: int = 0
    errors: int = 0
    escalated: int = 0
    _buckets: dict[int, int] = field(default_factory=dict)

    def computed(self, seconds: float) -> None:
        """Count one inference of the light model."""
        self.requests += 1
        bucket = bisect_right(_BOUNDS, seconds * 1e3)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def failed(self) -> None:
        """Count one that raised an error."""
        self.requests += 1
        self.errors += 1

    def seen(self, *, audited: int = 0, disagreed: int = 0, seconds: float = 0.0) -> Seen:
        """Return the counts, with those that others keep."""
        return Seen(
            requests=self.requests,
            errors=self.errors,
            escalated=self.escalated,
            audited=audited,
            disagreed=disagreed,
            seconds=seconds,
            buckets=dict(self._buckets),
        )
