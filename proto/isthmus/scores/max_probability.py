"""The largest softmax probability (Hendrycks & Gimpel, ICLR 2017)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.scores import Floats, ScoreOptions
from isthmus.scores.probabilities import masked, shifted

_FEW: Final = 64  # numbers


class MaxProbability:
    """Largest probability at the record's temperature, of logits [rows, classes]."""

    def __init__(self, options: ScoreOptions) -> None:
        self._output, self._temperature = options.output, options.temperature

    def __call__(self, outputs: Mapping[str, NDArray[Any]]) -> Floats:
        """Return the score of each row."""
        logits = outputs[self._output]
        if logits.size <= _FEW and logits.ndim == 2:  # one call of numpy takes longer than all of this
            return np.array([_score_row(row, self._temperature) for row in logits.tolist()])
        rows, finite = shifted(logits, self._temperature)
        # max(softmax(z)) = 1 / sum(exp(z - max(z))): one pass.
        return masked(1.0 / np.exp(rows).sum(axis=-1), finite)


def _score_row(row: list[float], temperature: float) -> float:
    top = max(row)
    if min(row) == -math.inf:
        return math.nan
    # A NaN anywhere, or an infinite top, makes the sum NaN.
    return 1.0 / sum([math.exp((value - top) / temperature) for value in row])
