"""Whether the light and the heavy model chose the same class or sequence, for the requests that both have answered."""

from __future__ import annotations

import numpy as np

from isthmus.decoding import Decoding, decode, same_answers
from isthmus.tensors import Array


def count_agreement(light: Array, heavy: Array, decoding: Decoding = "") -> tuple[int, int]:
    """Return how many rows agree, and how many there are.

    Rows agree when the largest value stands at the same place, or when the sequences are the same; a light row that is
    not finite chose nothing.

    Args:
        light: The scored output of the light model, one row for each answer, classes last.
        heavy: The same of the heavy model, finite and of the same shape.
        decoding: How the calibration record says that the output is read.
    """
    if light.ndim == 0:
        return 0, 0
    if decoding:
        finite = np.isfinite(light).reshape(len(light), -1).all(axis=-1)
        same = same_answers(decode(light, decoding), decode(heavy, decoding)) & finite
        return int(np.count_nonzero(same)), len(light)
    same = (light.argmax(axis=-1) == heavy.argmax(axis=-1)) & np.isfinite(light).all(axis=-1)
    rows = same.reshape(len(light), -1).all(axis=-1) if light.ndim > 1 else same.reshape(1)
    return int(np.count_nonzero(rows)), len(rows)
