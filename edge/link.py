"""What the way to the cloud costs: round trip and bandwidth, learnt from the escalations themselves.

Time is taken to be a round trip plus the request's bytes at some speed. Both come from a weighted least-squares line
through (bytes, seconds) of recent answers, each weighing a twentieth less than the one after it. Requests that are all
of one size say nothing about the speed: then everything is round trip. No probe is ever sent.
"""

from __future__ import annotations

from typing import Final

from isthmus.policies import Link

_FADE: Final = 0.95
_LEAST_SPREAD: Final = 1.0  # bytes squared


class LinkMeter:
    """Learns from escalations that were answered."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def note(self, size: int, seconds: float) -> None:
        """Note that a request of `size` bytes was answered after so many seconds."""
        self._weight = self._weight * _FADE + 1.0
        self._x = self._x * _FADE + size
        self._y = self._y * _FADE + seconds
        self._xx = self._xx * _FADE + size * size
        self._xy = self._xy * _FADE + size * seconds

    def link(self, *, waiting: int = 0) -> Link:
        """Return what is known; zeros before the first answer."""
        if not self._weight:
            return Link(waiting=waiting)
        x, y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - x * x
        slope = (self._xy / self._weight - x * y) / spread if spread > _LEAST_SPREAD else 0.0
        slope = min(max(slope, 0.0), y / x if x > 0 else 0.0)  # neither the line nor the round trip is negative
        return Link(rtt_s=y - slope * x, bytes_per_s=1.0 / slope if slope > 0 else 0.0, waiting=waiting)
