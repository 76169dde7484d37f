"""Cloud answers that come too late for their callers: waited for a little longer, because they were paid for.

A request that the cloud did not answer in time has been sent all the same, and what the heavy model says to it is as
good as any other answer for captures and for the count of agreement. Nobody gets it as an answer. The rules:

1. Off unless there is a grace: the cloud is told the caller's deadline, and stops with it.
2. Only calls that ended with their budget are followed. One whose caller went away, or whose hedge was not needed, is
   cancelled at the cloud at once, and nothing is ever sent again for a straggler's sake.
3. Few are followed at a time, of few bytes together; one more is cancelled. A cloud that is too slow gets no pile of
   work that nobody waits for: the breaker opens meanwhile, as it would without them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import grpc
import structlog

_AT_MOST: Final = 4
_BYTES: Final = 16 << 20  # of their requests, which their inputs keep in memory

log = structlog.get_logger(__name__)


class Stragglers:
    """Calls whose callers have been answered.

    Args:
        grace_s: How long after its budget an answer is still taken; 0 follows none.
        at_most: Calls at a time.
        limit_bytes: Of their requests together.
    """

    def __init__(self, grace_s: float = 0.0, *, at_most: int = _AT_MOST, limit_bytes: int = _BYTES) -> None:
        self._grace_s = grace_s
        self._at_most = at_most
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._running: set[asyncio.Task[None]] = set()

    def grace_s(self, size: int) -> float:
        """Return how long after its budget a request of so many bytes would be followed now."""
        full = len(self._running) >= self._at_most or self._bytes + size > self._limit_bytes
        return 0.0 if full else self._grace_s

    def follow(self, call: asyncio.Task[bytes], size: int, use: Callable[[bytes], None]) -> None:
        """Wait for a call that took too long, and hand its answer to `use`; cancel it when there are too many."""
        if not self.grace_s(size):
            call.cancel()
            return
        task = asyncio.get_running_loop().create_task(self._wait(call, size, use))
        self._running.add(task)
        self._bytes += size
        task.add_done_callback(self._running.discard)

    async def stop(self) -> None:
        """End the calls in progress."""
        running = tuple(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _wait(self, call: asyncio.Task[bytes], size: int, use: Callable[[bytes], None]) -> None:
        try:
            use(await call)
        except grpc.aio.AioRpcError as error:
            log.debug("no late answer either", code=error.code().name)
        except Exception:  # its caller was answered long ago: nobody is there to be told
            log.exception("late answer not used")
        finally:
            self._bytes -= size
