"""Logits to probabilities, in double precision, with rows that are not finite set aside."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def shifted(logits: NDArray[Any], temperature: float) -> tuple[Floats, Flags]:
    """Return logits / temperature with a largest value of 0 in each row, and which rows are finite.

    Rows that are not finite become zeros. The difference is taken before the division: no overflow.
    """
    rows = np.asarray(logits, dtype=np.float64)
    finite = np.isfinite(rows).all(axis=-1)
    if not finite.all():
        rows = np.where(finite[..., np.newaxis], rows, 0.0)
    return (rows - rows.max(axis=-1, keepdims=True)) / temperature, finite


def softmax(logits: NDArray[Any], temperature: float = 1.0) -> tuple[Floats, Flags]:
    """Return the probabilities of each row, and which rows are finite."""
    rows, finite = shifted(logits, temperature)
    powers = np.exp(rows)
    return powers / powers.sum(axis=-1, keepdims=True), finite


def log_softmax(logits: NDArray[Any], temperature: float = 1.0) -> Floats:
    """Return the logarithms of the probabilities of each row."""
    rows, _ = shifted(logits, temperature)
    return np.asarray(rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True)))


def masked(scores: NDArray[Any], finite: Flags) -> Floats:
    """Return the scores with NaN for rows that are not finite."""
    return np.where(finite, scores, np.nan)
