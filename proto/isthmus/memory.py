"""Keeps the memory of a process close to what it needs: glibc has back what a burst of calls took, and keeps it.

Requests are buffered by gRPC's core in many small pieces, from several threads, each TLS handshake leaves holes that
the next connection does not fill, and versions of models come and go. In a process that runs for months, the largest
burst ever would be what it uses. Where the C library is another one, nothing happens.
"""

from __future__ import annotations

import asyncio
import ctypes
from pathlib import Path
from typing import Any, Final

_ARENA_MAX: Final = -8  # M_ARENA_MAX of mallopt(3)
_HEAPS: Final = 2
_EVERY_S: Final = 5.0
_WORTH_IT: Final = 32 << 20  # bytes more than the least
_TRIES: Final = 12  # a flood's last calls end some time after it
_PAGE: Final = 4096
_STATM: Final = Path("/proc/self/statm")


def limit_heaps() -> None:
    """Limit the number of heaps, of which each thread would have one; counts only before threads have theirs."""
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_ARENA_MAX, _HEAPS)


def trim() -> None:
    """Give free pages back to the system now."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


async def give_back() -> None:
    """Give memory back when a burst is over, until cancelled; returns at once where that cannot be done."""
    if _function("malloc_trim") is None or not _STATM.exists():
        return
    floor, tries = _resident_bytes(), 0
    while True:
        await asyncio.sleep(_EVERY_S)
        if _resident_bytes() <= floor + _WORTH_IT:
            floor, tries = min(floor, _resident_bytes()), 0
            continue
        await asyncio.to_thread(trim)
        tries += 1
        if tries == _TRIES:  # it is in use: a model was loaded
            floor, tries = _resident_bytes(), 0


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * _PAGE


def _function(name: str) -> Any:
    """Return a function of the C library, or None where it has no such."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # no library to look into
        return None
