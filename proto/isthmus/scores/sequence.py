"""Sequences of tokens: the geometric mean of the chosen tokens' probabilities. An empty sequence is hard, not easy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.scores import Floats, ScoreOptions
from isthmus.scores.probabilities import log_softmax


class Sequence:
    """exp(mean log-probability) of the likeliest tokens, of logits [rows, positions, tokens].

    The length-normalised likelihood (Malinin & Gales, ICLR 2021) of the greedy answer. Token 0 is the blank of CTC
    (Graves et al., ICML 2006) and the padding of most vocabularies: positions where it wins do not count.
    """

    def __init__(self, options: ScoreOptions) -> None:
        self._output, self._temperature = options.output, options.temperature

    def __call__(self, outputs: Mapping[str, NDArray[Any]]) -> Floats:
        """Return the score of each row."""
        logits = np.asarray(outputs[self._output], dtype=np.float64)
        if logits.shape[1] == 0:
            return np.zeros(len(logits))
        finite = np.isfinite(logits).all(axis=(1, 2))
        rows = np.where(finite[:, np.newaxis, np.newaxis], logits, 0.0)
        best = log_softmax(rows, self._temperature).max(axis=2)
        counts = rows.argmax(axis=2) != 0
        length = counts.sum(axis=1)
        mean = np.where(counts, best, 0.0).sum(axis=1) / np.maximum(length, 1)
        return np.where(finite, np.where(length > 0, np.exp(mean), 0.0), np.nan)
