"""Whether an escalated request is better answered by both models together, and with which weights.

The weight is chosen on rows that then have no say in whether fusion is used at all: that is decided on the others, by a
sign test on the rows where fused and heavy answer differ in being right (McNemar, 1947). Off unless it wins there.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from compiler.bounds import binomial_cdf
from compiler.evaluate import Labels, Logits, accuracy, correct, negative_log_likelihood
from isthmus.bundle import Fusion
from isthmus.fusion import fuse

_WEIGHTS: Final = tuple(round(0.05 * step, 2) for step in range(1, 13))  # of the light model
_CHANCE: Final = 0.1  # of a gain that is none


def choose_fusion(
    light: Logits,
    heavy: Logits,
    labels: Labels,
    temperature: float,
    fit: NDArray[np.int64],
    rest: NDArray[np.int64],
) -> Fusion | None:
    """Return the weight that is worth using, or None.

    Args:
        light: The variant's logits for all rows.
        heavy: The heavy model's.
        labels: The classes.
        temperature: Divides the light logits.
        fit: Rows that choose the weight.
        rest: Rows that decide whether to use it.
    """

    def fused(rows: NDArray[np.int64], weight: float) -> Logits:
        return fuse(light[rows], heavy[rows], temperature=temperature, light_weight=weight)

    def quality(weight: float) -> tuple[float, float]:
        answers = fused(fit, weight)
        return accuracy(answers, labels[fit]), -negative_log_likelihood(answers, labels[fit])

    best = max(_WEIGHTS, key=quality)
    ours, theirs = correct(fused(rest, best), labels[rest]), correct(heavy[rest], labels[rest])
    won, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    if won <= lost or binomial_cdf(lost, won + lost, 0.5) > _CHANCE:
        return None
    return Fusion(light_weight=best, gain=(won - lost) / len(rest))
