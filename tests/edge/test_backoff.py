"""Pauses grow, stay within their limit, and end early on good news."""

from __future__ import annotations

import asyncio
import time

import pytest

from edge.backoff import Backoff


class Recording(Backoff):
    """Notes its pauses instead of waiting."""

    def __init__(self, jitter: float) -> None:
        super().__init__(first_s=0.2, longest_s=2.0, jitter=lambda: jitter)
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.mark.parametrize(("jitter", "factor"), [(0.0, 1.0), (1.0, 0.5)])
def test_pauses_double_up_to_the_limit_and_start_again_after_a_success(jitter: float, factor: float) -> None:
    async def scenario() -> None:
        backoff = Recording(jitter)
        for _ in range(6):
            await backoff.pause()
        assert backoff.slept == [pytest.approx(s * factor) for s in (0.2, 0.4, 0.8, 1.6, 2.0, 2.0)]
        backoff.reset()
        await backoff.pause()
        assert backoff.slept[-1] == pytest.approx(0.2 * factor)

    asyncio.run(scenario())


def test_waking_ends_the_pause_or_the_next_one_once() -> None:
    async def scenario() -> None:
        backoff = Backoff()
        started = time.monotonic()
        pause = asyncio.ensure_future(backoff.sleep(60))
        await asyncio.sleep(0)
        backoff.wake()
        await pause
        backoff.wake()
        await backoff.sleep(60)
        assert time.monotonic() - started < 5
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await backoff.sleep(60)

    asyncio.run(scenario())
