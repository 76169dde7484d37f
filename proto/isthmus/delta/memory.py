"""Keeps memory that arrays of a block have left for those of the next one."""

from __future__ import annotations

from typing import Final

import numpy as np

_FREED: Final = 31 << 20  # bytes


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: it gives large blocks back, and to get them again costs a fault for every page.

    It keeps blocks up to the size of the largest one that was ever freed, at most 32 MiB. This one is never touched.
    """
    np.empty(_FREED, np.uint8)
