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

from cloud.quotas import Bucket, Kind, Rule, Scope

NEVER: Final = None
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
    scopes: tuple[Scope, ...] = ()


class QuotaStore(Protocol):
    """Counts requests against quotas."""

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
        self._levels: dict[tuple[Scope, Kind, Bucket], tuple[int, int]] = {}  # units at a time
        self._running: dict[Scope, int] = {}
        self._sweep_at = _SWEEP_AT
        self._nothing = Grant(self)

    async def take(self, rules: Sequence[Rule], size: int) -> Grant | Refusal:
        """Count one request of `size` bytes against all `rules`, or against none of them."""
        now = self._clock()
        left: list[tuple[tuple[Scope, Kind, Bucket], int]] = []
        refusal: Refusal | None = None
        held: tuple[Scope, ...] = ()
        for rule in rules:
            limits = rule.limits
            if limits.concurrency is not None:
                held += (rule.scope,)
                if self._running.get(rule.scope, 0) >= limits.concurrency:
                    refusal = later(refusal, Refusal(rule, "concurrency", NEVER))
            for kind, bucket, amount in (("requests", limits.requests, 1), ("bytes", limits.bytes, size)):
                if bucket is None:
                    continue
                key: tuple[Scope, Kind, Bucket] = (rule.scope, kind, bucket)  # type: ignore[assignment]
                level, cost = self._level(key, bucket, now), amount * bucket.cost
                if level >= cost:
                    left.append((key, level - cost))
                else:
                    refusal = later(refusal, Refusal(rule, key[1], wait_us(bucket, level, cost)))
        if refusal is not None:
            return refusal
        for key, level in left:
            self._levels[key] = (level, now)
        if len(self._levels) >= self._sweep_at:
            self._sweep(now)
        if not held:
            return self._nothing
        for scope in held:
            self._running[scope] = self._running.get(scope, 0) + 1
        return Grant(self, "memory", held)

    async def release(self, grant: Grant) -> None:
        """Note that the request has ended."""
        for scope in grant.scopes:
            self._running[scope] -= 1
            if not self._running[scope]:
                del self._running[scope]

    async def close(self) -> None:
        """Nothing to let go of."""

    def _level(self, key: tuple[Scope, Kind, Bucket], bucket: Bucket, now: int) -> int:
        known = self._levels.get(key)
        if known is None:
            return bucket.capacity
        level, at = known
        return min(bucket.capacity, level + max(now - at, 0) * bucket.gain)

    def _sweep(self, now: int) -> None:
        """Drop the buckets that are full: they are as good as new ones."""
        full = [key for key in self._levels if self._level(key, key[2], now) >= key[2].capacity]
        for key in full:
            del self._levels[key]
        self._sweep_at = max(_SWEEP_AT, 2 * len(self._levels))


def wait_us(bucket: Bucket, level: int, cost: int) -> int | None:
    """Return the microseconds until a bucket that holds `level` holds `cost`; NEVER when it cannot."""
    if cost > bucket.capacity or not bucket.gain:
        return NEVER
    return -(-(cost - level) // bucket.gain)


def later(first: Refusal | None, second: Refusal) -> Refusal:
    """Return the refusal that lasts longer; the first one of two that last as long."""
    if first is None:
        return second
    if first.wait_us is NEVER or (second.wait_us is not NEVER and second.wait_us <= first.wait_us):
        return first
    return second
