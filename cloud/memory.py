"""Keeps the memory of a process with thousands of connections close to what they need.

glibc gives threads heaps of their own and keeps what was freed in them: each TLS handshake leaves holes that the next
connection does not fill. Two heaps, and giving free pages back now and then, save a tenth. Elsewhere nothing happens.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
from typing import Any, Final

_ARENA_MAX: Final = -8  # M_ARENA_MAX of mallopt(3)
_HEAPS: Final = 2
_EVERY_S: Final = 10.0


def limit_heaps() -> None:
    """Limit the number of heaps; counts only before threads have theirs."""
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_ARENA_MAX, _HEAPS)


async def give_back() -> None:
    """Give free pages back to the system, for ever."""
    trim = _function("malloc_trim")
    while trim is not None:
        await asyncio.sleep(_EVERY_S)
        await asyncio.to_thread(trim, 0)


def _function(name: str) -> Any:
    """Return a function of the C library, or None where it has no such."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
