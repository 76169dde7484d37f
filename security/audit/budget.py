"""How many refusals are written one by one: an attacker who is refused must not be able to fill the disk.

Each source (a device, or the address of a caller) has a bucket of its own, so that a noisy one does not hide the
others, and all of them share a larger one. What finds its bucket empty is counted, by source, action and reason, and
the counts are recorded together every `SUMMARY_S`. Plain state: no I/O; the clock is handed in.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from security.audit.records import Event

SUMMARY_S: Final = 10.0
_SOURCES: Final = 4096  # buckets that are remembered
_COUNTED: Final = 64  # kinds of counted refusals in one summary; the rest is counted as one


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float


class Budget:
    """Decides which events are written, and sums up the others.

    Args:
        per_s: Events of one source that are written per second, on average.
        burst: Events of one source that are written at once.
        total: How many times as many all sources together get.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        per_s: float = 2.0,
        burst: int = 50,
        total: int = 20,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_s, self._burst, self._total, self._clock = per_s, burst, total, clock
        self._all = _Bucket(float(burst * total), clock())
        self._sources: OrderedDict[str, _Bucket] = OrderedDict()
        self._counted: Counter[tuple[str, str]] = Counter()
        self._since = clock()

    def admits(self, source: str, event: Event) -> bool:
        """Return whether the event is written; it is counted otherwise."""
        now = self._clock()
        bucket = self._sources.setdefault(source, _Bucket(float(self._burst), now))
        self._sources.move_to_end(source)
        if len(self._sources) > _SOURCES:
            self._sources.popitem(last=False)
        self._fill(bucket, now, 1)
        self._fill(self._all, now, self._total)
        if bucket.left >= 1 and self._all.left >= 1:
            bucket.left -= 1
            self._all.left -= 1
            return True
        key = (event.action, event.reason)
        self._counted[key if key in self._counted or len(self._counted) < _COUNTED else ("other", "other")] += 1
        return False

    def summary(self, *, at_once: bool = False) -> list[Event]:
        """Return one event for each kind that was counted, when it is time; they are forgotten then."""
        now = self._clock()
        if not self._counted or (now - self._since < SUMMARY_S and not at_once):
            return []
        counted, seconds = self._counted, round(now - self._since)
        self._counted, self._since = Counter(), now
        return [
            Event(action, "refused", reason=reason, detail={"counted": number, "seconds": seconds})
            for (action, reason), number in sorted(counted.items())
        ]

    def _fill(self, bucket: _Bucket, now: float, times: int) -> None:
        bucket.left = min(bucket.left + (now - bucket.at) * self._per_s * times, float(self._burst * times))
        bucket.at = now
