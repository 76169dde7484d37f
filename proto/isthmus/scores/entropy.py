"""How far the probabilities are from all alike: 1 - H(p) / ln(classes)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.scores import Floats, ScoreOptions
from isthmus.scores.probabilities import masked, shifted


class Entropy:
    """1 less the normalised entropy (Shannon), of logits [rows, classes]."""

    def __init__(self, options: ScoreOptions) -> None:
        self._output, self._temperature = options.output, options.temperature

    def __call__(self, outputs: Mapping[str, NDArray[Any]]) -> Floats:
        """Return the score of each row."""
        logits = outputs[self._output]
        rows, finite = shifted(logits, self._temperature)
        logarithms = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
        entropy = -(np.exp(logarithms) * logarithms).sum(axis=-1)
        return masked(np.clip(1.0 - entropy / np.log(logits.shape[-1]), 0.0, 1.0), finite)
