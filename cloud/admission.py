"""Lets a request in when all of its quotas allow it, and counts what runs; the gateway asks before anything costs.

A refusal says whose quota it was, never who has used it up, and when to come back: as a hint for people, and as
trailing metadata that agents obey (isthmus.status). Reasons:

    quota-exceeded      a rate of requests or bytes is used up
    too-many-requests   as many as may run at the same time do
    too-many-streams    a device has as many open streams as it may
    too-large           a request of more bytes than the quota ever allows at once
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Final

from cloud.quota_store import Grant, QuotaStore, Refusal
from cloud.quotas import QuotaBook, Rule
from isthmus.errors import InputError, QuotaError
from security.tokens import Claims

_LEAST_WAIT_S: Final = 0.05  # that a hint asks for where requests in progress are the limit
_MEAN_WEIGHT: Final = 0.1  # of the newest request in the mean duration


class Admission:
    """Decides who may ask now.

    Args:
        book: Which quotas there are.
        store: Where they are counted.
        streams: Most open streams of one device.
    """

    def __init__(self, book: QuotaBook, store: QuotaStore, *, streams: int = 2) -> None:
        self._book, self._store, self._streams = book, store, streams
        self._open: Counter[tuple[str, str]] = Counter()
        self._mean_s = 0.0  # how long requests with leases take
        self.refusals: Counter[tuple[str, str]] = Counter()  # by tenant and reason

    def admit(self, claims: Claims, model: str, size: int) -> Admitted:
        """Return what, used as `async with`, counts a request of `size` bytes while it runs.

        Entering it raises:
            QuotaError: A quota allows no more now.
            InputError: It has more bytes than a quota allows at once.
        """
        return Admitted(self, self._book.rules(claims.tenant, claims.subject, model), size)

    @asynccontextmanager
    async def stream(self, claims: Claims) -> AsyncIterator[None]:
        """Count an open stream of the caller while the block runs.

        Raises:
            QuotaError: The caller has as many as it may.
        """
        caller = (claims.tenant, claims.subject)
        if self._open[caller] >= self._streams:
            self.refusals[claims.tenant, "too-many-streams"] += 1
            raise QuotaError(
                f"{claims.subject} has {self._streams} open streams already",
                hint="end one of them; a stream whose connection was lost ends within two minutes",
                reason="too-many-streams",
                retry_after_s=5.0,
            )
        self._open[caller] += 1
        try:
            yield
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]

    async def take(self, rules: tuple[Rule, ...], size: int) -> Grant:
        """Count a request against its quotas.

        Raises:
            QuotaError: One of them allows no more now.
            InputError: It has more bytes than one of them allows at once.
        """
        outcome = await self._store.take(rules, size)
        if isinstance(outcome, Refusal):
            error = self._explain(outcome, size)
            self.refusals[outcome.rule.scope.tenant, error.reason] += 1
            raise error
        return outcome

    async def give_back(self, grant: Grant, took_s: float) -> None:
        """Note that a request that held leases has ended."""
        self._mean_s += _MEAN_WEIGHT * (took_s - self._mean_s)
        released = grant.store.release(grant)
        # A caller that goes away while this runs must not leave its place taken.
        await (asyncio.shield(released) if grant.store.remote else released)

    def _explain(self, refusal: Refusal, size: int) -> QuotaError | InputError:
        scope, limits = refusal.rule.scope, refusal.rule.limits
        if refusal.kind == "concurrency":
            return QuotaError(
                f"{scope}: {limits.concurrency} requests are in progress, which is the limit",
                hint="wait for answers, or ask for a larger quota",
                reason="too-many-requests",
                retry_after_s=max(_LEAST_WAIT_S, self._mean_s) if limits.concurrency else None,
            )
        if refusal.kind == "bytes" and limits.bytes is not None and 0 < limits.bytes.burst < size:
            return InputError(
                f"{scope}: a request of {size:,} bytes is more than the {limits.bytes.burst:,} that may come at once",
                hint="send less in one request",
                reason="too-large",
            )
        rate = limits.rate if refusal.kind == "requests" else limits.bytes_rate
        wait_s = None if refusal.wait_us is None else refusal.wait_us / 1e6
        return QuotaError(
            f"{scope}: the quota of {rate.text if rate else 'none'} for {refusal.kind} is used up",
            hint="ask for a larger quota" if wait_s is None else f"try again in {wait_s:.3g} s",
            reason="quota-exceeded",
            retry_after_s=wait_s,
        )


class Admitted:
    """A request that is let in for as long as the block runs."""

    __slots__ = ("_admission", "_grant", "_rules", "_size", "_started")

    def __init__(self, admission: Admission, rules: tuple[Rule, ...], size: int) -> None:
        self._admission, self._rules, self._size = admission, rules, size
        self._grant: Grant | None = None
        self._started = 0.0

    async def __aenter__(self) -> None:
        if self._rules:
            self._grant = await self._admission.take(self._rules, self._size)
            if self._grant.lease:
                self._started = asyncio.get_running_loop().time()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        if self._grant is not None and self._grant.lease:
            took_s = asyncio.get_running_loop().time() - self._started
            await self._admission.give_back(self._grant, took_s)
