"""Whether the light and the heavy model chose the same class, for the requests that both have answered."""

from __future__ import annotations

import numpy as np

from isthmus.tensors import Array


def count_agreement(light: Array, heavy: Array) -> tuple[int, int]:
    """Return how many rows agree, and how many there are.

    Rows agree when the largest value stands at the same place; a light row that is not finite chose nothing.

    Args:
        light: The scored output of the light model, one row for each answer, classes last.
        heavy: The same of the heavy model, finite and of the same shape.
    """
    if light.ndim == 0:
        return 0, 0
    same = (light.argmax(axis=-1) == heavy.argmax(axis=-1)) & np.isfinite(light).all(axis=-1)
    rows = same.reshape(len(light), -1).all(axis=-1) if light.ndim > 1 else same.reshape(1)
    return int(np.count_nonzero(rows)), len(rows)
