"""Counts what is asked of the gateway: requests by outcome, bytes and time, by tenant, device, model, version and hour.

Every request that came with a valid token is counted once, when it ends, however it ends:

    answered    by a heavy model
    cached      with an answer that was given before
    limited     refused by a quota
    refused     for what it is: not a request, an unknown model or version, tensors that do not fit
    failed      no fault of the caller's: the model failed, or Triton is down or busy
    cancelled   nobody waits for the answer any more: the caller went away, or its deadline passed

`bytes_in` and `bytes_out` are the serialized messages of the requests and of the answers given. `calls` are requests
that went on to Triton, and `call_us` the time until Triton's answer was there, as the gateway saw it: it contains the
wait in Triton's queue. Triton tells the compute time of each model, not of each request (cloud.triton_usage).

Counts are exact. They are in memory and in the journal (cloud.journal) before the answer leaves, and move to the
database every few seconds, where those of all gateways add up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import structlog
from sqlalchemy.exc import SQLAlchemyError

from cloud.journal import OUTCOMES, Counts, Journal, Key, Segment, Usage
from cloud.usage_rows import UsageTable
from isthmus.errors import InputError, QuotaError, UnavailableError
from isthmus.status import TOO_LATE
from security.tokens import Claims

HOUR: Final = 3600
_ANSWERED, _CACHED, _REFUSED, _LIMITED, _FAILED, _CANCELLED = range(len(OUTCOMES))

log = structlog.get_logger(__name__)


class Meter:
    """Counts requests of one gateway.

    Args:
        table: Where counts are kept.
        journal: Where they are until then.
        flush_s: How often they are moved.
        keep_days: How long the database keeps them.
        clock: Unix seconds.
    """

    def __init__(
        self,
        table: UsageTable,
        journal: Journal,
        *,
        flush_s: float = 10.0,
        keep_days: int = 400,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._table, self._journal = table, journal
        self._flush_s, self._keep_s, self._clock = flush_s, keep_days * 86400, clock
        self._usage: Usage = {}
        self._waiting: tuple[Segment, Usage] | None = None  # of a commit that failed
        self._lock = asyncio.Lock()
        self._totals: dict[tuple[str, str, int], Counts] = {}  # of what has left `_usage`, for the metrics

    async def start(self) -> None:
        """Begin a journal, and bring what earlier runs left into the database.

        Raises:
            OSError: The journal cannot be written.
            SQLAlchemyError: The database cannot.
        """
        self._journal.open()
        await asyncio.to_thread(self._take_left_over)

    def _take_left_over(self) -> None:
        for segment, usage in self._journal.left_over():
            self._table.add(segment, usage)
            segment.remove()
            log.info("usage of an earlier run found", requests=sum(counts.requests for counts in usage.values()))

    def call(self, claims: Claims, bytes_in: int) -> Call:
        """Return what, used as `with`, counts one request when the block ends."""
        return Call(self, claims, bytes_in)

    def count(
        self, claims: Claims, model: str, version: int, outcome: int, bytes_in: int, bytes_out: int, calls: int, us: int
    ) -> None:
        """Count one request."""
        hour = int(self._clock()) // HOUR * HOUR
        key = Key(hour, claims.tenant, claims.subject, model, version)
        counts = self._usage.get(key)
        if counts is None:
            counts = self._usage[key] = Counts()
        counts.count(outcome, bytes_in, bytes_out, calls, us)
        self._journal.write(key, outcome, bytes_in, bytes_out, calls, us)

    async def run(self) -> None:
        """Move counts to the database every few seconds and forget old ones every hour, for ever."""
        forgotten_at = 0
        while True:
            await asyncio.sleep(self._flush_s)
            with suppress(SQLAlchemyError, OSError):  # `flush` has said so; they are moved the next time
                await self.flush()
                hour = int(self._clock()) // HOUR * HOUR
                if hour != forgotten_at:
                    await asyncio.to_thread(self._table.forget, hour - self._keep_s)
                    forgotten_at = hour

    async def flush(self) -> None:
        """Move all counts to the database.

        Raises:
            SQLAlchemyError: It does not take them now; they are kept.
            OSError: The journal cannot go on.
        """
        async with self._lock:
            try:
                if self._waiting is None:
                    if not self._usage:
                        return
                    self._rotate()
                await self._commit()
                if self._usage:  # what was counted while a commit of before had to be made up for
                    self._rotate()
                    await self._commit()
            except (SQLAlchemyError, OSError) as error:
                log.warning("usage not moved to the database yet", error=type(error).__name__)
                raise

    def _rotate(self) -> None:
        segment = self._journal.rotate()
        self._waiting = segment, self._usage
        for key, counts in self._usage.items():
            self._totals.setdefault((key.tenant, key.model, key.version), Counts()).add(counts)
        self._usage = {}

    async def _commit(self) -> None:
        if self._waiting is None:
            return
        segment, usage = self._waiting
        # Not to be torn off half-way: the thread would commit what is still thought to wait.
        await asyncio.shield(asyncio.to_thread(self._table.add, segment, usage))
        segment.remove()
        self._waiting = None

    async def close(self) -> None:
        """Move all counts to the database; what it does not take stays in the journal, for the next run."""
        try:
            await self.flush()
        except (SQLAlchemyError, OSError):
            return
        self._journal.close()

    def totals(self) -> dict[tuple[str, str, int], Counts]:
        """Return what was counted since the start, by tenant, model and version."""
        found = {key: Counts() for key in self._totals}
        for total, counts in self._totals.items():
            found[total].add(counts)
        for key, counts in self._usage.items():
            found.setdefault((key.tenant, key.model, key.version), Counts()).add(counts)
        return found

    @property
    def journal_errors(self) -> int:
        """Return how many counts are in memory only."""
        return self._journal.errors


class Call:
    """One request, counted when the block ends; what it is for and what came of it is told on the way."""

    __slots__ = ("_bytes_in", "_bytes_out", "_calls", "_meter", "_model", "_outcome", "_started", "_us", "_version",
                 "claims")  # fmt: skip

    def __init__(self, meter: Meter, claims: Claims, bytes_in: int) -> None:
        self._meter, self.claims, self._bytes_in = meter, claims, bytes_in
        self._model, self._version = "", 0
        self._bytes_out, self._calls, self._started, self._us = 0, 0, 0, 0
        self._outcome = _FAILED

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, trace
        if self._started:
            self._stop()
        self._meter.count(
            self.claims, self._model, self._version, self._outcome if error is None else _outcome_of(error),
            self._bytes_in, self._bytes_out if error is None else 0, self._calls, self._us,
        )  # fmt: skip

    def resolved(self, model: str, version: int) -> None:
        """Note what the request is for; until then it counts for no model, whatever it named."""
        self._model, self._version = model, version

    def sent(self) -> None:
        """Note that the request goes to Triton now."""
        self._calls += 1
        self._started = time.perf_counter_ns()

    def answered(self, bytes_out: int) -> None:
        """Note Triton's answer."""
        self._stop()
        self._outcome, self._bytes_out = _ANSWERED, bytes_out

    def cached(self, bytes_out: int) -> None:
        """Note an answer that was given before."""
        self._outcome, self._bytes_out = _CACHED, bytes_out

    def _stop(self) -> None:
        self._us += (time.perf_counter_ns() - self._started) // 1000
        self._started = 0


def _outcome_of(error: BaseException) -> int:
    if isinstance(error, asyncio.CancelledError) or (isinstance(error, UnavailableError) and error.reason == TOO_LATE):
        return _CANCELLED
    if isinstance(error, QuotaError) or (isinstance(error, InputError) and error.reason == "too-large"):
        return _LIMITED
    return _REFUSED if isinstance(error, InputError) else _FAILED
