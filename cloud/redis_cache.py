"""Kept answers in Redis, for clouds that share them; see cloud.response_cache for the rules.

Redis bounds its memory by itself (`maxmemory`, with a policy such as `allkeys-lru`); each entry ends with its age. A
Redis that does not answer costs a request `timeout` at most, and after that nothing for a while: requests are computed.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Any, Final

import structlog
from redis.exceptions import RedisError

from cloud.response_cache import Key

_PREFIX: Final = b"isthmus:answer:"
_PAUSE_S: Final = 5.0  # in which a Redis that did not answer is not asked
_MOST_WRITES: Final = 64  # under way at once; answers beyond that are not kept
_MOST_BYTES: Final = 4 << 20  # of one answer

log = structlog.get_logger(__name__)


class RedisCache:
    """Answers in Redis.

    Args:
        client: From cloud.redis_quotas.connect.
        of: What the clouds that share answers have in common, and no others: names of models and versions are not
            enough where several clouds use one Redis.
        clock: Returns seconds that never go back.
    """

    def __init__(self, client: Any, *, of: bytes = b"", clock: Callable[[], float] = time.monotonic) -> None:
        self._client, self._clock = client, clock
        self._prefix = _PREFIX + hashlib.sha256(of).digest()[:8] + b":"
        self._resume_at = 0.0
        self._writes: set[asyncio.Task[None]] = set()

    async def get(self, tenant: str, key: Key) -> bytes | None:
        """Return a kept answer, or None."""
        del tenant  # a part of the key
        if self._clock() < self._resume_at:
            return None
        try:
            found: bytes | None = await self._client.get(self._prefix + key)
        except (RedisError, OSError) as error:
            self._pause(error)
            return None
        return found

    async def put(self, tenant: str, key: Key, answer: bytes, age_s: int) -> None:
        """Keep an answer for so long; the caller does not wait for it."""
        del tenant
        if self._clock() < self._resume_at or len(self._writes) >= _MOST_WRITES or len(answer) > _MOST_BYTES:
            return
        task = asyncio.create_task(self._write(key, answer, age_s), name="redis-answer")
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _write(self, key: Key, answer: bytes, age_s: int) -> None:
        try:
            await self._client.set(self._prefix + key, answer, ex=age_s)
        except (RedisError, OSError) as error:
            self._pause(error)

    def _pause(self, error: Exception) -> None:
        if self._clock() >= self._resume_at:
            log.warning("Redis keeps no answers for now", error=type(error).__name__)
        self._resume_at = self._clock() + _PAUSE_S

    async def close(self) -> None:
        """Let writes that are under way end, and disconnect."""
        await asyncio.gather(*self._writes, return_exceptions=True)
        await self._client.aclose()
