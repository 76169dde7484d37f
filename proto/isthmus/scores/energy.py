"""The energy score (Liu et al., NeurIPS 2020): T * log(sum(exp(logits / T))), mapped into [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.scores import Floats, ScoreOptions
from isthmus.scores.probabilities import masked, shifted


class Energy:
    """Negative free energy of logits [rows, classes]; unlike the softmax, it sees how large the logits are."""

    def __init__(self, options: ScoreOptions) -> None:
        self._output, self._temperature = options.output, options.temperature

    def __call__(self, outputs: Mapping[str, NDArray[Any]]) -> Floats:
        """Return the score of each row."""
        logits = np.asarray(outputs[self._output], dtype=np.float64)
        rows, finite = shifted(logits, self._temperature)
        largest = np.where(finite, logits.max(axis=-1), 0.0)
        energy = largest + self._temperature * np.log(np.exp(rows).sum(axis=-1))
        # Strictly growing and without the plateau that a logistic function has from 37 on.
        return masked(0.5 + 0.5 * energy / (1.0 + np.abs(energy)), finite)
