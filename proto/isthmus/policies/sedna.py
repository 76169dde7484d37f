"""The filters of KubeEdge Sedna's hard example mining, as baselines, with what they answer to nothing found.

Written from the formulas of sedna.algorithms.hard_example_mining (2025): each returns False, "easy", for an empty or
invalid answer, and each threshold is 0.5 unless somebody sets it. Their box filters see a classification as one box
whose score is the largest probability.
"""

from __future__ import annotations

import random
from typing import Final

import numpy as np

from isthmus.bundle import VariantCalibration
from isthmus.policies import Case, within
from isthmus.scores import Floats

_DEFAULT: Final = 0.5


def _boxes(case: Case) -> Floats:
    if case.probabilities is None or not case.probabilities.size:
        return np.zeros(0)
    return np.asarray([case.probabilities.max()])


class SednaThreshold:
    """Mean box score below a threshold."""

    def __init__(self, *, point: VariantCalibration, chance: random.Random, threshold: float = _DEFAULT) -> None:
        del point, chance
        self.threshold: float | None = within("threshold", threshold, 0.0, 1.0)

    def escalates(self, case: Case) -> bool:
        """Return whether the filter calls it hard."""
        boxes = _boxes(case)
        return bool(boxes.size) and bool(boxes.mean() < self.threshold)


class SednaCrossEntropy:
    """1 + sum(p ln p) / ln(classes) below a threshold; a probability of 0, on which the original fails, counts 0."""

    def __init__(self, *, point: VariantCalibration, chance: random.Random, threshold: float = _DEFAULT) -> None:
        del point, chance
        self.threshold: float | None = within("threshold", threshold, 0.0, 1.0)

    def escalates(self, case: Case) -> bool:
        """Return whether the filter calls it hard."""
        if case.probabilities is None or case.probabilities.size < 2:
            return False
        positive = case.probabilities[case.probabilities > 0]
        return bool(1.0 + (positive * np.log(positive)).sum() / np.log(case.probabilities.size) < self.threshold)


class SednaIbt:
    """Image-box thresholds: the share of boxes at or below one threshold reaches 1 less another."""

    threshold: float | None = None

    def __init__(
        self, *, point: VariantCalibration, chance: random.Random, img: float = _DEFAULT, box: float = _DEFAULT
    ) -> None:
        del point, chance
        self._img, self._box = within("img", img, 0.0, 1.0), within("box", box, 0.0, 1.0)

    def escalates(self, case: Case) -> bool:
        """Return whether the filter calls it hard."""
        boxes = _boxes(case)
        return bool(boxes.size) and bool((boxes <= self._box).mean() >= 1.0 - self._img)
