"""Answers that were given before, for requests that are equal to the byte.

Rules:
1. A key is a digest of tenant, heavy version and the request's bytes without its names, its id and the parameters that
   change no answer; nothing is decoded. So no tenant sees another one's answers, and no version another one's.
2. Only answers are kept, never errors; each for as long as its model's policy said when it was kept.
3. Memory is bounded in bytes; the tenant that holds most gives way first, its least recently used answer before others.
4. A cache that does not answer is no reason to fail: the request is computed.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from cloud.heavy import HeavyId
from isthmus.oip_head import RequestHead

_IDLE: Final = frozenset({"timeout", "priority"})  # parameters of Triton's queue
_OURS: Final = "isthmus."
_OVERHEAD: Final = 300  # bytes of memory that an entry takes beside its answer

Key = bytes


class ResponseCache(Protocol):
    """Where answers are kept."""

    async def get(self, tenant: str, key: Key) -> bytes | None:
        """Return a kept answer that is not too old, or None."""

    async def put(self, tenant: str, key: Key, answer: bytes, age_s: int) -> None:
        """Keep an answer for so long, if there is room."""


def cache_key(tenant: str, heavy: HeavyId, head: RequestHead) -> Key:
    """Return what requests that must get the same answer have in common."""
    digest = hashlib.sha256(b"".join(len(part).to_bytes(4) + part for part in (tenant.encode(), heavy.name.encode())))
    for part in head.content(_is_idle):
        digest.update(part)
    return digest.digest()


def _is_idle(parameter: str) -> bool:
    return parameter in _IDLE or parameter.startswith(_OURS)


@dataclass(frozen=True, slots=True)
class _Entry:
    answer: bytes
    until: float


class MemoryCache:
    """Answers in the memory of this process.

    Args:
        most_bytes: How much memory they may take.
        clock: Returns seconds that never go back.
    """

    def __init__(self, most_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_bytes, self._clock = most_bytes, clock
        self._tenants: dict[str, OrderedDict[Key, _Entry]] = {}
        self._held: dict[str, int] = {}  # bytes by tenant
        self.bytes = 0

    async def get(self, tenant: str, key: Key) -> bytes | None:
        """Return a kept answer that is not too old, or None."""
        entries = self._tenants.get(tenant)
        entry = None if entries is None else entries.get(key)
        if entries is None or entry is None:
            return None
        if entry.until <= self._clock():
            self._drop(tenant, key)
            return None
        entries.move_to_end(key)
        return entry.answer

    async def put(self, tenant: str, key: Key, answer: bytes, age_s: int) -> None:
        """Keep an answer for so long, if it does not take more than a quarter of the room."""
        size = len(answer) + _OVERHEAD
        if size > self._most_bytes // 4:
            return
        self._drop(tenant, key)
        self._tenants.setdefault(tenant, OrderedDict())[key] = _Entry(answer, self._clock() + age_s)
        self._held[tenant] = self._held.get(tenant, 0) + size
        self.bytes += size
        while self.bytes > self._most_bytes:
            largest = max(self._held, key=self._held.__getitem__)
            self._drop(largest, next(iter(self._tenants[largest])))

    def _drop(self, tenant: str, key: Key) -> None:
        entries = self._tenants.get(tenant)
        entry = None if entries is None else entries.pop(key, None)
        if entries is None or entry is None:
            return
        size = len(entry.answer) + _OVERHEAD
        self.bytes -= size
        self._held[tenant] -= size
        if not entries:
            del self._tenants[tenant], self._held[tenant]
