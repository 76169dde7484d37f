"""The largest softmax probability (Hendrycks & Gimpel, ICLR 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.scores import Floats, ScoreOptions
from isthmus.scores.probabilities import masked, shifted


class MaxProbability:
    """Largest probability at the record's temperature, of logits [rows, classes]."""

    def __init__(self, options: ScoreOptions) -> None:
        self._output, self._temperature = options.output, options.temperature

    def __call__(self, outputs: Mapping[str, NDArray[Any]]) -> Floats:
        """Return the score of each row."""
        rows, finite = shifted(outputs[self._output], self._temperature)
        # max(softmax(z)) = 1 / sum(exp(z - max(z))): one pass.
        return masked(1.0 / np.exp(rows).sum(axis=-1), finite)
