"""Requests drawn by lot: the line that any policy has to beat."""

from __future__ import annotations

import random

from isthmus.bundle import VariantCalibration
from isthmus.policies import Case, within


class Chance:
    """Escalates a share of requests at random.

    Args:
        point: The calibration record; its escalation rate is the default.
        chance: Where lots are drawn from.
        rate: Share of requests that escalate.
    """

    threshold: float | None = None

    def __init__(self, *, point: VariantCalibration, chance: random.Random, rate: float | None = None) -> None:
        self._rate = within("rate", point.escalation_rate if rate is None else rate, 0.0, 1.0)
        self._chance = chance

    def escalates(self, case: Case) -> bool:
        """Return what the lot says."""
        del case
        return self._chance.random() < self._rate
