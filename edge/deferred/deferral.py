"""The store as the event loop sees it: one thread writes, what arrives meanwhile is written together.

Nothing here blocks the loop. A request waits for its commit no longer than its deadline allows: a disk that is too
slow costs the promise of a late answer, not the answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog

from edge.deferred.index import Pending, QueueCount
from edge.deferred.store import DeferredStore, Ending, NewRequest, ReadRequest, ReadResult
from edge.deferred.wish import DEFER, NotKept, QueueName, Wish, read_wish

# Reasons of a failed escalation that the cloud would give again; with all others it is worth to ask again later.
FINAL: Final = frozenset({"refused", "bad-response"})
_BATCH: Final = 64  # requests in one commit
_RETURN_S: Final = 0.005  # kept of the deadline for returning the answer
_TIDY_S: Final = 1.0  # between looks for what has expired

T = TypeVar("T")
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Put:
    new: NewRequest
    future: Future[NotKept | None]


class Deferral:
    """Keeps requests and hands out results; implements `edge.deferred.wish.Keeper`. Made inside the event loop.

    Args:
        store: The store; nobody else uses it.
        longest_ttl_s: Longest life that a request may ask for.
        owner: Returns the subject of the caller of the current rpc; empty on this machine's own addresses.
        clock: Monotonic seconds; the store's.
    """

    def __init__(
        self,
        store: DeferredStore,
        *,
        longest_ttl_s: int,
        owner: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._longest_ttl_s = longest_ttl_s
        self._owner = owner
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="deferred")
        self._waiting: deque[_Put] = deque()
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self.counters = store.counters
        self.id = store.id

    def read(self, parameters: Mapping[str, Any], request_id: str) -> Wish | None:
        """See `Keeper.read`."""
        owner = self._owner() if DEFER in parameters else ""
        return read_wish(parameters, request_id, owner=owner, longest_ttl_s=self._longest_ttl_s)

    def knows(self, wish: Wish) -> bool:
        """See `Keeper.knows`."""
        return self._store.knows(wish.queue, wish.id)

    def queue(self, name: str) -> QueueName:
        """Return a queue of the caller of the current rpc."""
        return QueueName(self._owner(), name)

    async def keep(
        self, wish: Wish, *, request: bytes, template: Any, answer_bytes: int, failure: str, remaining_s: float
    ) -> NotKept | None:
        """See `Keeper.keep`."""
        refusal = "final" if failure in FINAL else await self._put(wish, request, template, answer_bytes, remaining_s)
        self.counters.not_stored += refusal is not None
        return refusal

    async def _put(
        self, wish: Wish, request: bytes, template: Any, answer_bytes: int, remaining_s: float
    ) -> NotKept | None:
        new = NewRequest(wish, request, bytes(template.SerializeToString()), answer_bytes)
        put = _Put(new, Future())
        put.future.add_done_callback(self._tell)
        self._waiting.append(put)
        self._thread.submit(self._commit)
        try:
            async with asyncio.timeout(max(remaining_s - _RETURN_S, _RETURN_S)):
                return await asyncio.wrap_future(put.future)
        except TimeoutError:
            log.warning("deferred request not stored in time", request_id=wish.id)
            return "disk-slow"

    async def end(self, ending: Ending) -> None:
        """Put a result in place of a request.

        Raises:
            OSError: The disk cannot take it; the request waits as before.
        """
        await self._do(lambda: self._store.end([ending]))

    async def acknowledge(self, queue: QueueName, sequence: int) -> int:
        """Remove a queue's results up to `sequence`; return how many there were.

        Raises:
            OSError: The disk cannot take that.
        """
        return await self._do(lambda: self._store.acknowledge(queue, sequence))

    async def purge(self, queue: QueueName) -> tuple[int, int]:
        """Forget all that a queue holds; return how many requests and results.

        Raises:
            OSError: The disk cannot take that.
        """
        return await self._do(lambda: self._store.purge(queue))

    def take(self) -> Pending | None:
        """Return the request to send next, which nobody else gets until it is given back."""
        return self._store.index.take()

    def give_back(self, entry: Pending) -> None:
        """Let a request be taken again, unless it has ended."""
        self._store.index.give_back(entry.number)

    async def read_request(self, entry: Pending) -> ReadRequest | None:
        """Return a request's bytes; None when it has ended.

        Raises:
            OSError: The system refuses to read it now.
        """
        return await asyncio.wrap_future(self._thread.submit(self._store.read_request, entry.number))

    async def next_result(self, queue: QueueName, after: int) -> ReadResult | None:
        """Return a queue's first result after a sequence; None when there is none yet.

        Raises:
            OSError: The system refuses to read it now.
        """
        while (sequence := self._store.index.next_result(queue, after)) is not None:
            result = await asyncio.to_thread(self._store.read_result, sequence)
            if result is not None:
                return result
            after = sequence  # it went away while it was read
        return None

    def has_work(self) -> bool:
        """Return whether a request waits that nobody sends."""
        return self._store.index.may_send()

    async def wait_for_work(self) -> None:
        """Return when there is a request to send."""
        while not self._store.index.may_send():
            await self._changed.wait()

    @property
    def changed(self) -> asyncio.Event:
        """Return what is set at the next change: take it, look, and then wait for it."""
        return self._changed

    def counts(self) -> list[QueueCount]:
        """Return what the queues of the caller of the current rpc hold."""
        return self._store.index.counts(self._owner())

    def totals(self) -> tuple[int, int, int]:
        """Return requests that wait, results that wait, and bytes of the quota that are taken."""
        index = self._store.index
        return index.pending_count, index.result_count, index.bytes

    async def tidy(self) -> None:
        """End what has expired, as it does; runs until cancelled."""
        while True:
            if self._store.index.next_due() is None:
                await self._changed.wait()
            await asyncio.sleep(_TIDY_S)
            if (due := self._store.index.next_due()) is not None and due <= self._clock():
                await self._do(self._store.expire)

    def close(self) -> None:
        """Finish what was begun; nothing can be kept afterwards."""
        self._thread.shutdown(wait=True)

    async def _do(self, action: Callable[[], T]) -> T:
        future = self._thread.submit(action)
        future.add_done_callback(self._tell)  # also when the caller has gone away by then
        return await asyncio.wrap_future(future)

    def _commit(self) -> None:
        """Write what waits, together; each request submits one call of this, most of which find nothing to do."""
        batch = [
            put
            for _ in range(min(len(self._waiting), _BATCH))
            if (put := self._waiting.popleft()).future.set_running_or_notify_cancel()
        ]
        if not batch:
            return
        try:
            answers: list[NotKept | None] = self._store.put([put.new for put in batch])
        except Exception:  # serving comes first: there is an answer, only no promise of a better one
            log.exception("deferred requests not stored")
            answers = ["disk"] * len(batch)
        for put, answer in zip(batch, answers, strict=True):
            put.future.set_result(answer)

    def _tell(self, future: Future[Any]) -> None:
        del future
        self._loop.call_soon_threadsafe(self._announce)

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
