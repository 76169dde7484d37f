"""Threads for work that a caller can make long, such as reading a log or many large files.

Everything else that blocks (the database, mostly) takes short turns in the event loop's own threads, of which there
are few: who filled these would stop tokens, revocations and rollouts of everybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

_THREADS: Final = 2
_T = TypeVar("_T")


class LongWork:
    """A few threads of one service's own, first come, first served; what nobody waits for any more is not begun."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="long-work")

    async def run(self, work: Callable[[], _T]) -> _T:
        """Return what `work` returns, once it was its turn."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
