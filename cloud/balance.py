"""Decisions between replicas of Triton, without sockets or clocks: which one answers, and whether to ask another one.

Rules:
1. The replica with the fewest requests under way answers; among equals each in turn.
2. A request is asked again once at most, and only when it certainly has not run: the caller decides that.
3. Retries are paid from a budget that fills with a tenth of the requests: a fleet that fails everywhere gets a tenth
   more requests, not twice as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_FILL: Final = 0.1  # retries that a request pays for
_MOST: Final = 100.0  # retries that can be saved up: one replica may die with this many requests on their way to it


class RetryBudget:
    """How many retries may be made now."""

    def __init__(self, *, fill: float = _FILL, most: float = _MOST) -> None:
        self._fill, self._most = fill, most
        self._left = most

    def note_request(self) -> None:
        """Count a request, which pays for a part of a retry."""
        self._left = min(self._most, self._left + self._fill)

    def take(self) -> bool:
        """Return whether a retry may be made, and count it."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


def least_loaded(under_way: Sequence[int], turn: int) -> int:
    """Return the place of the replica that answers: one with the fewest requests, the `turn`-th of those.

    Args:
        under_way: Requests under way at each candidate; not empty.
        turn: A number that grows with every request.
    """
    fewest = min(under_way)
    places = [place for place, count in enumerate(under_way) if count == fewest]
    return places[turn % len(places)]


def next_probe_s(failures: int, *, first_s: float, most_s: float) -> float:
    """Return how long to wait before an ejected replica is looked at again, after so many failed looks in a row."""
    return min(first_s * 2.0 ** min(failures, 16), most_s)
