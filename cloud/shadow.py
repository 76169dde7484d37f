"""Copies of requests to a version that is being tried: asked behind the callers' backs, compared, counted, thrown away.

Rules:
1. A copy is sent after the caller's answer is there, and nothing of it ever reaches a caller.
2. Copies have bounds of their own, in number and in bytes; beyond them a request is not copied, and that is counted.
3. Answers agree when both have the same outputs in form and, for scores, the same best class in every row; other
   numbers agree when they are close.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Final

import numpy as np
import structlog
from google.protobuf.message import DecodeError

from cloud.counters import ShadowCounters
from cloud.heavy import HeavyId
from cloud.replicas import Replicas
from cloud.traffic import Shadow
from isthmus.errors import IsthmusError
from isthmus.oip import service_pb2
from isthmus.tensors import Array, decode_outputs

_MOST_BYTES: Final = 64 << 20  # of requests and answers that copies hold
_RELATIVE: Final = 1e-3
_ABSOLUTE: Final = 1e-5

log = structlog.get_logger(__name__)


class Shadows:
    """Sends the copies.

    Args:
        replicas: Where the versions are served.
        timeout_s: How long a copy may take.
        draw: Returns a random number in [0, 1).
    """

    def __init__(self, replicas: Replicas, *, timeout_s: float, draw: Callable[[], float] = random.random) -> None:
        self._replicas, self._timeout_s, self._draw = replicas, timeout_s, draw
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: Counter[str] = Counter()
        self._bytes = 0

    def offer(self, shadow: Shadow, heavy: HeavyId, request: bytes, answer: bytes, counters: ShadowCounters) -> None:
        """Copy a request that was answered, or not: by chance, and while there is room."""
        if self._draw() >= shadow.share:
            return
        size = len(request) + len(answer)
        if self._running[heavy.model] >= shadow.most_at_once or self._bytes + size > _MOST_BYTES:
            counters.dropped += 1
            return
        self._running[heavy.model] += 1
        self._bytes += size
        task = asyncio.create_task(self._compare(heavy, request, answer, counters), name=f"shadow-{heavy.name}")
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._running[heavy.model] -= 1
            self._bytes -= size

        task.add_done_callback(done)

    async def _compare(self, heavy: HeavyId, request: bytes, answer: bytes, counters: ShadowCounters) -> None:
        try:
            other = await self._replicas.infer(heavy, request, timeout_s=self._timeout_s)
            same = await asyncio.to_thread(agree, answer, other)
        except (IsthmusError, DecodeError) as error:
            counters.failed += 1
            log.info("shadow failed", heavy=heavy.name, reason=getattr(error, "reason", "decode"))
            return
        if same:
            counters.agreed += 1
        else:
            counters.disagreed += 1

    async def close(self) -> None:
        """Give up copies that are under way."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def agree(answer: bytes, other: bytes) -> bool:
    """Return whether two serialized answers agree.

    Raises:
        InputError: One of them holds tensors that cannot be decoded.
    """
    first, second = (decode_outputs(service_pb2.ModelInferResponse.FromString(raw)) for raw in (answer, other))
    return first.keys() == second.keys() and all(_same(first[name], second[name]) for name in first)


def _same(one: Array, two: Array) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if one.dtype.kind != "f":
        return np.array_equal(one, two)
    if one.ndim >= 2 and one.shape[-1] > 1:
        return np.array_equal(one.argmax(axis=-1), two.argmax(axis=-1))
    return np.allclose(one, two, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)
