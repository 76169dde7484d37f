"""The lead of the first class over the second (Scheffer, Decomain & Wrobel, IDA 2001)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.scores import Floats, ScoreOptions
from isthmus.scores.probabilities import masked, softmax


class Margin:
    """Difference of the two largest probabilities, of logits [rows, classes]."""

    def __init__(self, options: ScoreOptions) -> None:
        self._output, self._temperature = options.output, options.temperature

    def __call__(self, outputs: Mapping[str, NDArray[Any]]) -> Floats:
        """Return the score of each row."""
        probabilities, finite = softmax(outputs[self._output], self._temperature)
        two = np.partition(probabilities, -2, axis=-1)[..., -2:]
        return masked(two[..., 1] - two[..., 0], finite)
