"""Classes whose errors cost more: a score that is lower where being wrong is dearer.

With p the chance of being right, keeping an answer of class k costs cost[k] * (1 - p) on average (Elkan, IJCAI 2001).
One threshold t on 1 - (1 - score) * cost[k] / max(cost) is therefore a threshold of its own for every class,
1 - (1 - t) * max(cost) / cost[k], and all guarantees that hold for one threshold go on holding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.scores import Floats, Score, ScoreOptions


class ByCost:
    """A score of logits [rows, classes], weighted by the cost of the class that is answered."""

    def __init__(self, score: Score, options: ScoreOptions) -> None:
        self._score, self._output = score, options.output
        self._shares = np.asarray(options.costs, dtype=np.float64) / max(options.costs)

    def __call__(self, outputs: Mapping[str, NDArray[Any]]) -> Floats:
        """Return the score of each row."""
        share = self._shares[np.argmax(outputs[self._output], axis=-1)]
        return np.asarray(1.0 - (1.0 - self._score(outputs)) * share)


def class_thresholds(threshold: float, costs: Sequence[float]) -> tuple[float, ...]:
    """Return the threshold of each class on the score itself that one on the weighted score amounts to."""
    return tuple(1.0 - (1.0 - threshold) * max(costs) / cost for cost in costs)
