"""When the cloud is asked again: at once after a broken connection, within a budget; later after a used-up quota.

Pure state (no I/O; clock and jitter are injected). The rules:

1. Retries are a small share of the calls: each call earns a part of a retry, and unspent ones add up to a few.
   Devices whose connections break all at once so send little more than the calls that they would send anyway.
2. After "quota", nothing is sent until the time that the cloud asked for is over; without such a hint, each wait in
   a row is twice the one before, up to a limit, less jitter. An answer ends the row.
3. Calls that were on their way when the wait began, and meet the same end, do not lengthen the row.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

_LONGEST_HINT_S: Final = 3600.0  # a cloud that says more is not believed


class RetryBudget:
    """A bucket of retries that calls fill.

    Args:
        ratio: Retries that one call earns.
        burst: Retries that the bucket holds; it starts full.
    """

    def __init__(self, *, ratio: float = 0.1, burst: float = 3.0) -> None:
        self._ratio = ratio
        self._burst = burst
        self._left = burst

    def earn(self) -> None:
        """Note a call."""
        self._left = min(self._burst, self._left + self._ratio)

    def spend(self) -> bool:
        """Take one retry; return whether there was one."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class QuotaPause:
    """The wait after the cloud has said that a quota is used up.

    Args:
        first_s: First wait without a hint.
        longest_s: No wait without a hint is longer.
        clock: Monotonic seconds.
        jitter: Numbers in [0, 1); a wait shrinks by up to a fifth, so that devices do not come back at once.
    """

    def __init__(
        self,
        *,
        first_s: float = 1.0,
        longest_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._clock = clock
        self._jitter = jitter
        self._until = 0.0
        self._waits = 0

    @property
    def active(self) -> bool:
        """Return whether the cloud is to be left alone."""
        return self._clock() < self._until

    def begin(self, hint_s: float | None = None) -> None:
        """Wait from now on, as long as the cloud asked for when it did."""
        if hint_s is not None:
            self._until = max(self._until, self._clock() + min(hint_s, _LONGEST_HINT_S))
        elif not self.active:
            wait_s = min(self._longest_s, self._first_s * 2.0**self._waits)
            self._waits = min(self._waits + 1, 32)
            self._until = self._clock() + wait_s * (1.0 - 0.2 * self._jitter())

    def reset(self) -> None:
        """Note an answer: the next wait is the first again."""
        self._waits = 0
