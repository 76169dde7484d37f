"""Escalate where the expected gain is worth what it costs on this link, now.

The calibration record says how much being right gains from escalating at each score. The link says how long that would
take and the request how many bytes; the operator says what a second and a megabyte are worth, in points of accuracy.
On a slow or crowded link only what gains much goes up, on a quick one all that gains anything does.
"""

from __future__ import annotations

import random
from bisect import bisect_right

from isthmus.bundle import VariantCalibration
from isthmus.policies import Case, Link, within


class Cost:
    """Escalates when gain > second * (expected seconds) + megabyte * (megabytes) + request.

    Args:
        point: The calibration record, for the gain at each score.
        chance: Not used.
        second: What one second of waiting costs, as a share of a right answer.
        megabyte: What sending one megabyte costs.
        request: What an escalation costs besides.
    """

    threshold: float | None = None  # it moves with every request

    def __init__(
        self,
        *,
        point: VariantCalibration,
        chance: random.Random,
        second: float = 0.1,
        megabyte: float = 0.0,
        request: float = 0.0,
    ) -> None:
        del chance
        if not point.gains:
            raise ValueError("the calibration record says nothing about gains: compile the bundle anew")
        self._second = within("second", second, 0.0, 1e6)
        self._megabyte = within("megabyte", megabyte, 0.0, 1e6)
        self._request = within("request", request, 0.0, 1.0)
        self._from = [step.score for step in point.gains]
        self._gains = [step.gain for step in point.gains]

    def escalates(self, case: Case) -> bool:
        """Return whether the expected gain is more than the price."""
        gain = self._gains[max(bisect_right(self._from, case.score) - 1, 0)]
        price = self._second * expected_seconds(case.link, case.bytes_up) + self._megabyte * case.bytes_up / 1e6
        return gain > price + self._request


def expected_seconds(link: Link, bytes_up: int) -> float:
    """Return how long an escalation takes: a round trip, the bytes, and those that are before it in the queue."""
    sending = bytes_up / link.bytes_per_s if link.bytes_per_s > 0 else 0.0
    return link.rtt_s + sending * (1 + link.waiting)
