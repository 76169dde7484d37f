"""The circuit breaker: after a few failures in a row, requests pay nothing for a dead cloud.

A pure state machine (no I/O; clock and jitter are injected). Its rules:

1. closed: every call is admitted; `failures` failures in a row open it, one success starts the count anew.
2. open: no call is admitted until a wait is over; each is twice the one before, up to a limit, less jitter.
3. half-open: one call probes at a time. Its success closes the breaker; its failure opens it for longer; when
   it is abandoned (the caller went away), the next call probes.
4. Verdicts of calls that were admitted in an earlier state change nothing: a burst counts once.
5. `nudge` ends the wait, and the next one is the first again: there is fresh evidence, such as a new connection,
   that the cloud is back, or will be soon.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]


class Breaker:
    """Admits calls, hears how they ended.

    Args:
        failures: Failures in a row that open it.
        first_wait_s: Wait before the first probe.
        longest_wait_s: No wait is longer.
        clock: Monotonic seconds.
        jitter: Numbers in [0, 1); a wait shrinks by up to a fifth, so that devices do not come back at once.
    """

    def __init__(
        self,
        *,
        failures: int = 3,
        first_wait_s: float = 1.0,
        longest_wait_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._limit = failures
        self._first_wait_s = first_wait_s
        self._longest_wait_s = longest_wait_s
        self._clock = clock
        self._jitter = jitter
        self._epoch = 0  # grows with every change of state and every probe; a ticket is the epoch of its admission
        self._failures_in_row = 0
        self._waits = 0
        self._probe_at: float | None = None  # None while closed
        self._probing = False

    @property
    def state(self) -> State:
        """Return the state as of now."""
        if self._probe_at is None:
            return "closed"
        return "half-open" if self._probing or self._clock() >= self._probe_at else "open"

    def admit(self) -> int | None:
        """Return a ticket to hand to `succeed`, `fail` or `abandon`; None when the call must not be made."""
        if self._probe_at is None:
            return self._epoch
        if self._probing or self._clock() < self._probe_at:
            return None
        self._probing = True
        self._epoch += 1
        return self._epoch

    def succeed(self, ticket: int) -> None:
        """Note that the call of this ticket got a good answer."""
        if ticket != self._epoch:
            return
        self._failures_in_row = 0
        if self._probing:
            self._probing, self._probe_at, self._waits = False, None, 0
            self._epoch += 1

    def fail(self, ticket: int) -> None:
        """Note that the call of this ticket failed in a way that speaks against the cloud."""
        if ticket != self._epoch:
            return
        self._failures_in_row += 1
        if self._probing or self._failures_in_row >= self._limit:
            self._open()

    def abandon(self, ticket: int) -> None:
        """Note that the call of this ticket ended without a verdict on the cloud."""
        if ticket == self._epoch and self._probing:
            self._probing = False
            self._epoch += 1

    def nudge(self) -> None:
        """Let the next call probe now, whatever is left of the wait; if it fails, the waits start anew."""
        if self._probe_at is not None:
            self._probe_at = min(self._probe_at, self._clock())
            self._waits = 0

    def _open(self) -> None:
        wait_s = min(self._longest_wait_s, self._first_wait_s * 2.0**self._waits)
        self._probe_at = self._clock() + wait_s * (1.0 - 0.2 * self._jitter())
        self._waits = min(self._waits + 1, 32)
        self._probing = False
        self._failures_in_row = 0
        self._epoch += 1
