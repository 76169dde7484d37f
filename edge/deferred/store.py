"""The durable store of deferred requests and their results. Blocks; one thread changes it, any thread may ask.

The rules:

1. A request is kept once for each (queue, id): while it waits, while its result waits, and after its result was
   acknowledged for as long as the request might have lived; one that ended without an answer may come again.
2. `put` returns after the request's file is on the disk, under its name, in a folder that is on the disk.
3. A request ends by one result, written before the request's file is removed; what a crash left between the two is
   recognised by the request's number in the result's header. A result can be read only after both are on the disk.
4. Sequences grow for ever: numbers are reserved in blocks on the disk before they are used, and none is used twice.
5. A result disappears when it is acknowledged, after that is on the disk; or at the end of its life.
6. Bytes are charged in blocks of the disk, and a request is charged what its answer will take, so that there is room
   for the answer when it comes. When there is none for a request, the newest of the lowest priority below its own gives
   way and ends as `evicted`.
7. Results without an answer (`expired`, `evicted`, …) are not charged; as many are kept as requests may wait.
8. What is not a file of this store, or was altered, is set aside and logged.

Lives are counted on the monotonic clock while the agent runs; only across a restart does the wall clock decide.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Final, Literal

import structlog

from edge.deferred.disk import Disk
from edge.deferred.entries import (
    TEMPORARY,
    RequestHeader,
    ResultHeader,
    encode,
    file_name,
    join_body,
    read_entry,
    split_body,
)
from edge.deferred.index import Index, Pending, Result
from edge.deferred.replay import BLOCK, charged, key_of, replay
from edge.deferred.sealing import Sealer
from edge.deferred.sequences import Sequences
from edge.deferred.settled import Settled
from edge.deferred.wish import NotKept, QueueName, Wish
from isthmus.errors import TrustError

# Why a request has no answer.
Ended = Literal["refused", "expired", "evicted", "damaged"]
_LOST: Final = frozenset({errno.EIO, errno.ENOENT})  # what speaks against the file, not against the moment
_RETRY_S: Final = 60.0  # before an end that the disk could not take is tried again
_EXPLAINED: Final = {
    "expired": "the cloud could not be reached during the request's life",
    "evicted": "the request gave way to one of higher priority",
    "damaged": "the stored request cannot be read any more",
}

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the store."""

    bytes: int
    entries: int


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request to keep."""

    wish: Wish
    request: bytes
    template: bytes  # of the late answer
    answer_bytes: int  # about


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ends: with an answer, or with the reason why there is none."""

    number: int
    answer: bytes = b""
    reason: Ended | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A request as it was kept."""

    template: bytes
    request: bytes


@dataclass(frozen=True, slots=True)
class ReadResult:
    """A result as it is delivered."""

    sequence: int
    id: str
    answer: bytes
    reason: str
    message: str


@dataclass(slots=True)
class DeferredCounters:
    """What happened since the agent started.

    stored + found_pending = answered + refused + expired + evicted + damaged + purged_pending + those that wait;
    those ended + found_results = acknowledged + dropped + purged_results + results that wait.
    """

    stored: int = 0
    not_stored: int = 0  # asked for, and no promise was made
    found_pending: int = 0  # that an earlier run left
    found_results: int = 0
    answered: int = 0
    refused: int = 0
    expired: int = 0
    evicted: int = 0
    damaged: int = 0
    acknowledged: int = 0
    dropped: int = 0  # results that nobody acknowledged in time
    purged_pending: int = 0
    purged_results: int = 0
    attempts: int = 0  # escalations of kept requests, among those of the uplink
    delivered: int = 0  # results sent to subscribers, counted for each of them

    def as_fields(self) -> dict[str, int]:
        """Return the counters by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class DeferredStore:
    """The files of one folder.

    Args:
        disk: The folder.
        sealer: The device's key.
        limits: Bounds.
        clock: Monotonic seconds.
        now_ms: Wall clock.

    Raises:
        OSError: The folder cannot be read.
    """

    def __init__(
        self,
        disk: Disk,
        sealer: Sealer,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._disk = disk
        self._sealer = sealer
        self._limits = limits
        self._clock = clock
        self._now_ms = now_ms
        self.counters = DeferredCounters()
        self.index = Index()
        self._settled = Settled(disk, sealer, limit=4 * limits.entries, now_ms=now_ms())
        found = replay(disk, sealer, self._settled, now=clock(), now_ms=now_ms())
        for result in found.results:
            self.index.add(result)
        for pending in found.pending:
            self.index.add(pending)
        self.counters.found_pending, self.counters.found_results = len(found.pending), len(found.results)
        self._sequences = Sequences(disk, sealer, highest=found.highest)

    @property
    def id(self) -> str:
        """Return what tells this store's sequences from those of another."""
        return self._sequences.store

    def knows(self, queue: QueueName, request_id: str) -> bool:
        """Return whether the request waits, its result does, or it was answered and acknowledged."""
        return (queue, request_id) in self.index or key_of(queue, request_id) in self._settled

    def put(self, batch: Sequence[NewRequest]) -> list[NotKept | None]:
        """Keep requests; return for each None when it is on the disk, else why not."""
        verdicts: dict[tuple[QueueName, str], NotKept | None] = {}
        placed: list[tuple[Pending, NewRequest]] = []
        self.expire()
        for new in batch:
            key = (new.wish.queue, new.wish.id)
            if key in verdicts or self.knows(*key):
                verdicts.setdefault(key, None)
                continue
            try:
                entry = self._place(new, placed)
                verdicts[key] = entry if isinstance(entry, str) else None
                if isinstance(entry, Pending):
                    self._write_request(entry, new)
                    placed.append((entry, new))
            except OSError as error:
                log.warning("deferred request not stored", error=str(error))
                verdicts[key] = "disk"
        if not self._publish([file_name(entry.number, "request") for entry, _ in placed]):
            verdicts |= {(entry.queue, entry.id): "disk" for entry, _ in placed}
            placed = []
        for entry, _ in placed:
            self.index.add(entry)
        self.counters.stored += len(placed)
        return [verdicts[new.wish.queue, new.wish.id] for new in batch]

    def end(self, endings: Sequence[Ending]) -> None:
        """Write results in place of requests; an ending of a request that is gone is ignored.

        Raises:
            OSError: The disk cannot take them; the requests wait as before.
        """
        wait = {ending.number: ending for ending in endings if self.index.pending(ending.number) is not None}
        if not wait:
            return
        made = [self._make_result(ending) for ending in wait.values()]
        try:
            for result, data in made:
                self._write(file_name(result.number, "result"), data)
            self._rename([file_name(result.number, "result") for result, _ in made])
        except OSError:
            self._discard(file_name(result.number, "result") for result, _ in made)
            raise
        # From here on the results count, whatever happens to the requests' files.
        with suppress(OSError):
            self._disk.remove(file_name(number, "request") for number in wait)
            self._disk.sync()
        for ending, (result, _) in zip(wait.values(), made, strict=True):
            pending = self.index.pending(ending.number)
            if pending is not None:
                self.index.drop(pending)
            self.index.add(result)
            name = ending.reason or "answered"
            setattr(self.counters, name, getattr(self.counters, name) + 1)
        self._bound_notices()

    def acknowledge(self, queue: QueueName, sequence: int) -> int:
        """Remove a queue's results up to `sequence`; return how many there were.

        Raises:
            OSError: The disk cannot take that; the results are still there.
        """
        results = self.index.results(queue, sequence)
        if not results:
            return 0
        now_ms = self._now_ms()
        # A request that ended without an answer may be asked again, so only answers are remembered.
        until = {key_of(r.queue, r.id): now_ms + r.ttl_s * 1000 for r in results if not r.notice}
        if until:
            self._settled.add(until, now_ms=now_ms)
        self._forget(results)
        if len(until) < len(results):
            self._disk.sync()
        self.counters.acknowledged += len(results)
        return len(results)

    def expire(self) -> None:
        """End what has reached the end of its life."""
        due = self.index.due(self._clock())
        if not due:
            return
        requests = [entry for entry in due if isinstance(entry, Pending)]
        results = [entry for entry in due if isinstance(entry, Result)]
        self._forget(results)
        self.counters.dropped += len(results)
        if results:
            log.warning("results of deferred requests dropped unread", results=len(results))
        try:
            self.end([self._without_answer(entry.number, "expired") for entry in requests])
        except OSError as error:
            log.warning("expired requests cannot be ended", requests=len(requests), error=str(error))
            for entry in requests:
                self.index.put_off(entry, self._clock() + _RETRY_S)

    def purge(self, queue: QueueName) -> tuple[int, int]:
        """Forget all that a queue holds; return how many requests and results.

        Raises:
            OSError: The disk cannot take that; what was not removed is still there.
        """
        entries = self.index.of_queue(queue)
        requests = sum(isinstance(entry, Pending) for entry in entries)
        self._forget(entries)
        self._disk.sync()
        self.counters.purged_pending += requests
        self.counters.purged_results += len(entries) - requests
        return requests, len(entries) - requests

    def read_request(self, number: int) -> ReadRequest | None:
        """Return a request that waits; None when it is gone, or cannot be read and so ended as `damaged`.

        Raises:
            OSError: The system refuses to read it now, or to write the end.
        """
        name = file_name(number, "request")
        try:
            _, body = read_entry(self._disk, self._sealer, name, RequestHeader)
        except (TrustError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _LOST:
                raise
            if self.index.pending(number) is not None:
                log.warning("deferred request cannot be read", file=name, error=str(error))
                self._disk.set_aside(name)
                self.end([self._without_answer(number, "damaged")])
            return None
        return ReadRequest(*split_body(body))

    def read_result(self, sequence: int) -> ReadResult | None:
        """Return a result; None when it was acknowledged or expired meanwhile.

        Raises:
            OSError: The system refuses to read it now.
        """
        name = file_name(sequence, "result")
        try:
            header, answer = read_entry(self._disk, self._sealer, name, ResultHeader)
        except (TrustError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _LOST:
                raise
            entry = self.index.result(sequence)
            if entry is None:
                return None
            log.warning("result of a deferred request cannot be read", file=name, error=str(error))
            return ReadResult(sequence, entry.id, b"", "damaged", "the stored answer cannot be read any more")
        return ReadResult(sequence, header.id, answer, header.reason, header.message)

    def _place(self, new: NewRequest, placed: Sequence[tuple[Pending, NewRequest]]) -> Pending | NotKept:
        charge = charged(max(len(new.request) + len(new.template) + BLOCK // 4, new.answer_bytes))
        if charge > self._limits.bytes:
            return "too-large"
        planned = sum(entry.charge for entry, _ in placed)
        while (
            self.index.bytes + planned + charge > self._limits.bytes
            or self.index.pending_count + len(placed) >= self._limits.entries
        ):
            victim = self.index.victim(new.wish.priority)
            if victim is None:
                return "quota"
            self.end([self._without_answer(victim.number, "evicted")])
        wish = new.wish
        return Pending(
            number=self._sequences.next(),
            queue=wish.queue,
            id=wish.id,
            ttl_s=wish.ttl_s,
            due=self._clock() + wish.ttl_s,
            charge=charge,
            priority=wish.priority,
        )

    def _write_request(self, entry: Pending, new: NewRequest) -> None:
        header = RequestHeader(
            owner=entry.queue.owner,
            queue=entry.queue.name,
            id=entry.id,
            stored_ms=self._now_ms(),
            ttl_s=entry.ttl_s,
            priority=entry.priority,
            answer_bytes=new.answer_bytes,
        )
        name = file_name(entry.number, "request")
        self._write(name, encode(self._sealer, name, header, join_body(new.template, new.request)))

    def _make_result(self, ending: Ending) -> tuple[Result, bytes]:
        pending = self.index.pending(ending.number)
        if pending is None:  # only this thread removes requests
            raise AssertionError(f"request {ending.number} is gone")
        number = self._sequences.next()
        name = file_name(number, "result")
        header = ResultHeader(
            owner=pending.queue.owner,
            queue=pending.queue.name,
            id=pending.id,
            stored_ms=self._now_ms(),
            ttl_s=pending.ttl_s,
            request=pending.number,
            reason=ending.reason or "",
            message=ending.message[:500],
        )
        data = encode(self._sealer, name, header, ending.answer)
        result = Result(
            number=number,
            queue=pending.queue,
            id=pending.id,
            ttl_s=pending.ttl_s,
            due=self._clock() + pending.ttl_s,
            charge=0 if ending.reason else charged(len(data)),
            request=pending.number,
            notice=ending.reason is not None,
        )
        return result, data

    @staticmethod
    def _without_answer(number: int, reason: Literal["expired", "evicted", "damaged"]) -> Ending:
        return Ending(number, reason=reason, message=_EXPLAINED[reason])

    def _bound_notices(self) -> None:
        excess = self.index.oldest_notices(self.index.notices - self._limits.entries)
        if excess:
            self._forget(excess)
            self.counters.dropped += len(excess)
            log.warning("results of deferred requests dropped unread", results=len(excess))

    def _forget(self, entries: Sequence[Pending | Result]) -> None:
        names: list[str] = []
        for entry in entries:
            self.index.drop(entry)
            if isinstance(entry, Pending):
                names.append(file_name(entry.number, "request"))
            else:  # the request first, in case that its removal failed: it must not come back
                names += [file_name(entry.request, "request"), file_name(entry.number, "result")]
        try:
            self._disk.remove(names)
        except OSError as error:  # they will be found, and judged anew, at the next start
            log.warning("deferred entries not removed", error=str(error))

    def _write(self, name: str, data: bytes) -> None:
        try:
            self._disk.write(name + TEMPORARY, data)
        except OSError:
            self._discard([name])
            raise

    def _rename(self, names: Sequence[str]) -> None:
        for name in names:
            self._disk.rename(name + TEMPORARY, name)
        if names:
            self._disk.sync()

    def _publish(self, names: Sequence[str]) -> bool:
        try:
            self._rename(names)
        except OSError as error:
            log.warning("deferred requests not stored", requests=len(names), error=str(error))
            self._discard(names)
            return False
        return True

    def _discard(self, names: Iterable[str]) -> None:
        with suppress(OSError):
            self._disk.remove(form for name in names for form in (name, name + TEMPORARY))
