"""Exact binomial bounds: what can be said of a rate from so many hits in so many trials, for every sample size.

No approximation by a normal distribution: with few errors, which is where risk bounds live, it promises too much.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

_STEPS: Final = 60  # of a bisection: more than a double has bits


@lru_cache(maxsize=8)
def _log_factorials(count: int) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1, dtype=np.float64)))])


def binomial_cdf(hits: int, trials: int, rate: float) -> float:
    """Return P(Binomial(trials, rate) <= hits)."""
    if hits < 0:
        return 0.0
    if hits >= trials or rate <= 0.0:
        return 1.0
    if rate >= 1.0:
        return 0.0
    logs = _log_factorials(trials)
    k = np.arange(hits + 1)
    terms = logs[trials] - logs[k] - logs[trials - k] + k * math.log(rate) + (trials - k) * math.log1p(-rate)
    largest = float(terms.max())
    return min(1.0, math.exp(largest) * float(np.exp(terms - largest).sum()))


def upper_bound(hits: int, trials: int, delta: float) -> float:
    """Return the rate that the true one exceeds with probability `delta` at most (Clopper & Pearson, 1934)."""
    if trials == 0 or hits >= trials:
        return 1.0
    low, high = hits / trials, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        low, high = (low, middle) if binomial_cdf(hits, trials, middle) <= delta else (middle, high)
    return high


def lower_bound(hits: int, trials: int, delta: float) -> float:
    """Return the rate below which the true one lies with probability `delta` at most."""
    return 1.0 - upper_bound(trials - hits, trials, delta)


def largest_count(count: int, rate: float, delta: float) -> int:
    """Return the largest k with P(Binomial(count, rate) <= k) <= delta, or -1 when there is none."""
    step, total, best = count * math.log1p(-rate), 0.0, -1
    odds = math.log(rate) - math.log1p(-rate)
    for successes in range(count + 1):
        total += math.exp(step)
        if total > delta:
            break
        best = successes
        if successes < count:
            step += math.log(count - successes) - math.log(successes + 1) + odds
    return best
