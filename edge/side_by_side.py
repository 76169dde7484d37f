"""Two versions timed side by side: is the new one slower, or is the machine busier than it was?

What a trial sees of the version before is of an earlier hour. A machine that has become busy since then makes every
version slow, and a good one must not go back for that. So before a device believes that a version is too slow, both
compute the golden row in turns, on the machine as it is now.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge.model import LiveModel
from edge.selftest import one_row
from isthmus.bundle import GOLDEN
from isthmus.tensors import Array

# Were the ratio of the medians within the limit, at most every second pair would be above it, and 19 of 20 of them
# with a chance of 2e-5.
PAIRS: Final = 20
_SPARED: Final = 1  # pairs within the limit that change nothing


@dataclass(frozen=True, slots=True)
class Side:
    """A version that is open, and the folder that it is from."""

    live: LiveModel
    slot: Path

    def golden_row(self) -> Mapping[str, Array]:
        """Return what it computes; reads the disk."""
        return one_row(self.live.manifest, self.slot / GOLDEN)


async def is_slower(now: Side, before: Side, most: float) -> bool:
    """Return whether one version takes longer than the other: ends as soon as that is decided, for a good one soon.

    Args:
        now: The version in question.
        before: What it is compared with.
        most: Largest ratio of their times, new over old.

    Raises:
        InputError: One cannot compute its golden row.
        VerificationError: A golden file is malformed.
    """
    inputs, others = await asyncio.to_thread(now.golden_row), await asyncio.to_thread(before.golden_row)
    spared = 0
    for _ in range(PAIRS):
        seconds, seconds_before = await now.live.time_beside(before.live, inputs, others)
        spared += seconds <= most * seconds_before
        if spared > _SPARED:
            return False
    return True
