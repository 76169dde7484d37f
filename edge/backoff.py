"""Pauses between failed attempts: each longer than the one before, with jitter, cut short by good news."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable


class Backoff:
    """The pauses of one loop that must not give up.

    Args:
        first_s: First pause.
        longest_s: No pause is longer.
        jitter: Numbers in [0, 1); a pause shrinks by up to half, so that devices do not come back at once.
    """

    def __init__(
        self,
        *,
        first_s: float = 0.2,
        longest_s: float = 30.0,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._jitter = jitter
        self._pauses = 0
        self._woken = asyncio.Event()

    def reset(self) -> None:
        """Note a success: the next pause is the first again."""
        self._pauses = 0

    def wake(self) -> None:
        """End the current pause, or the next one, at once: there is reason to try now."""
        self._woken.set()

    async def pause(self) -> None:
        """Wait as long as is due, or until woken."""
        longest_s = min(self._longest_s, self._first_s * 2.0 ** min(self._pauses, 32))
        self._pauses += 1
        await self.sleep(longest_s * (1.0 - 0.5 * self._jitter()))

    async def sleep(self, seconds: float) -> None:
        """Wait this long, or until woken."""
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return
        self._woken.clear()
