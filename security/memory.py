"""Gives back to the system what the allocator keeps after a burst of calls.

Requests are buffered by gRPC's core in many small pieces, from several threads. When a flood of them is over, glibc has
the memory back and keeps it; on a device that runs for months the largest burst ever would be what the process uses.
"""

from __future__ import annotations

import asyncio
import ctypes
from pathlib import Path
from typing import Any, Final

_EVERY_S: Final = 5.0
_WORTH_IT: Final = 32 << 20  # bytes more than the least
_TRIES: Final = 12  # a flood's last calls end some time after it
_PAGE: Final = 4096
_STATM: Final = Path("/proc/self/statm")


def _trimmer() -> Any:
    """Return glibc's malloc_trim, or None where the C library has no such thing."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None


def resident_bytes() -> int:
    """Return the memory that this process has."""
    return int(_STATM.read_text().split()[1]) * _PAGE


async def give_back() -> None:
    """Give back memory now and then, until cancelled; returns at once where that cannot be done."""
    trim = _trimmer()
    if trim is None or not _STATM.exists():
        return
    floor, tries = resident_bytes(), 0
    while True:
        await asyncio.sleep(_EVERY_S)
        if resident_bytes() <= floor + _WORTH_IT:
            floor, tries = min(floor, resident_bytes()), 0
            continue
        await asyncio.to_thread(trim, 0)
        tries += 1
        if tries == _TRIES:  # it is in use: a model was loaded
            floor, tries = resident_bytes(), 0
