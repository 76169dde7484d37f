"""The calibration record's threshold: what its guarantee is about."""

from __future__ import annotations

import random

from isthmus.bundle import VariantCalibration
from isthmus.policies import Case, within


class Threshold:
    """Escalates what scores below one number.

    Args:
        point: The calibration record, whose threshold is taken when `at` is not given.
        chance: Not used.
        at: Another threshold; the record's guarantee does not hold for it.
    """

    def __init__(self, *, point: VariantCalibration, chance: random.Random, at: float | None = None) -> None:
        del chance
        self.threshold = point.threshold if at is None else within("at", at, 0.0, 2.0)

    def escalates(self, case: Case) -> bool:
        """Return whether the score lies below the threshold; one that is equal stays."""
        return case.score < self.threshold
