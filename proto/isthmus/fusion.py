"""One answer from two: the weighted mean of both models' log-probabilities (a logarithmic opinion pool; Heskes, 1997).

An escalated request has been answered by the light model already. Where the calibration record found that both together
are right more often than the heavy one alone, the device fuses them: it costs nothing but two short vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.scores.probabilities import log_softmax


def fuse(
    light: NDArray[Any], heavy: NDArray[Any], *, temperature: float, light_weight: float
) -> NDArray[np.floating[Any]]:
    """Return log-probabilities [rows, classes], normalised, of the light logits' own dtype.

    Args:
        light: The light model's logits.
        heavy: The heavy model's logits, of the same shape.
        temperature: Divides the light logits.
        light_weight: Between 0 and 1; the rest is the heavy model's.
    """
    mean = light_weight * log_softmax(light, temperature) + (1.0 - light_weight) * log_softmax(heavy)
    return log_softmax(mean).astype(light.dtype)
