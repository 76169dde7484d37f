"""Where buckets and running requests are counted: in this process, or in Redis for several gateways together.

The rules that every store follows:

1. A request is admitted by all of its quotas or by none: what one refuses costs the others nothing.
2. A bucket starts full. From any moment on, it admits at most what it holds then and what its rate adds: never more,
   and never less when it is asked for.
3. A running request holds a lease on each quota that limits concurrency, until it is released.
4. A refusal says after which time the same request could pass, as far as rates decide about it; None is never.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from cloud.quotas import Kind, Part, Rule

NEVER: Final = None
_Level = tuple[int, int, Part]  # units, at a time
_SWEEP_AT: Final = 10_000  # buckets in memory after which those that are full again are dropped


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request may not pass now."""

    rule: Rule
    kind: Kind
    wait_us: int | None  # until it could; NEVER, and unknown for concurrency


@dataclass(frozen=True, slots=True)
class Grant:
    """Leave to proceed; give it back with `release` once the request has ended, when it holds anything."""

    store: QuotaStore
    lease: str = ""  # "" when no quota limits how many may run
    keys: tuple[str, ...] = ()  # of the quotas that do


class QuotaStore(Protocol):
    """Counts requests against quotas."""

    @property
    def remote(self) -> bool:
        """Return whether `release` waits for another program, and so could be torn off half-way."""
        ...

    async def take(self, rules: Sequence[Rule], size: int) -> Grant | Refusal:
        """Count one request of `size` bytes against all `rules`, or against none of them."""
        ...

    async def release(self, grant: Grant) -> None:
        """Note that the request has ended."""
        ...

    async def close(self) -> None:
        """Let go of what the store holds."""
        ...


def monotonic_us() -> int:
    """Return microseconds of a clock that nobody sets."""
    return time.monotonic_ns() // 1000


class MemoryQuotas:
    """Counts in this process; for one event loop. No method waits, so each is one step for all others.

    Args:
        clock: Returns microseconds.
    """

    def __init__(self, clock: Callable[[], int] = monotonic_us) -> None:
        self._clock = clock
        self._levels: dict[str, _Level] = {}
        self._running: dict[str, int] = {}
        self._sweep_at = _SWEEP_AT
        self._nothing = Grant(self)

    @property
    def remote(self) -> bool:
        """Nothing waits."""
        return False

    async def take(self, rules: Sequence[Rule], size: int) -> Grant | Refusal:
        """Count one request of `size` bytes against all `rules`, or against none of them."""
        now, levels = self._clock(), self._levels
        left: list[tuple[Part, int]] = []
        held: tuple[str, ...] = ()
        refusal: Refusal | None = None
        for rule in rules:
            for part in rule.parts:
                if part.kind == "concurrency":
                    held += (part.key,)
                    if self._running.get(part.key, 0) >= part.most:
                        refusal = later(refusal, Refusal(rule, part.kind, NEVER))
                    continue
                cost = part.cost if part.kind == "requests" else part.cost * size
                known = levels.get(part.key)
                level = part.capacity if known is None else _level(known, part, now)
                if level >= cost:
                    left.append((part, level - cost))
                else:
                    refusal = later(refusal, Refusal(rule, part.kind, wait_us(part, level, cost)))
        if refusal is not None:
            return refusal
        for part, level in left:
            levels[part.key] = (level, now, part)
        if len(levels) >= self._sweep_at:
            self._sweep(now)
        if not held:
            return self._nothing
        for key in held:
            self._running[key] = self._running.get(key, 0) + 1
        return Grant(self, "memory", held)

    async def release(self, grant: Grant) -> None:
        """Note that the request has ended."""
        for key in grant.keys:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]

    async def close(self) -> None:
        """Nothing to let go of."""

    def _sweep(self, now: int) -> None:
        """Drop the buckets that are full: they are as good as new ones."""
        full = [key for key, known in self._levels.items() if _level(known, known[2], now) >= known[2].capacity]
        for key in full:
            del self._levels[key]
        self._sweep_at = max(_SWEEP_AT, 2 * len(self._levels))


def _level(known: _Level, part: Part, now: int) -> int:
    gained = (now - known[1]) * part.gain
    return min(part.capacity, known[0] + gained) if gained > 0 else known[0]


def wait_us(part: Part, level: int, cost: int) -> int | None:
    """Return the microseconds until a bucket that holds `level` units holds `cost`; NEVER when it cannot."""
    if cost > part.capacity or not part.gain:
        return NEVER
    return -(-(cost - level) // part.gain)


def later(first: Refusal | None, second: Refusal) -> Refusal:
    """Return the refusal that lasts longer; the first one of two that last as long."""
    if first is None:
        return second
    if first.wait_us is NEVER or (second.wait_us is not NEVER and second.wait_us <= first.wait_us):
        return first
    return second
