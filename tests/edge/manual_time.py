"""Time that passes when somebody waits for it, so that an hour of a trial takes no time at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class ManualTime:
    """`clock` and `pause` of an updater; at each pause the device may serve some requests."""

    def __init__(self, at_pause: Callable[[], Awaitable[None]] | None = None) -> None:
        self.seconds = 1000.0
        self.at_pause = at_pause

    def clock(self) -> float:
        return self.seconds

    async def pause(self, seconds: float) -> None:
        self.seconds += seconds
        if self.at_pause is not None:
            await self.at_pause()
        await asyncio.sleep(0)
