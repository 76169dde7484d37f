"""Binomial intervals and exact tests, on plain integers: what few requests say about a rate, and what they do not."""

from __future__ import annotations

import math

_NEGLIGIBLE = 1e-18  # of the sum so far


def wilson(hits: int, count: int, z: float) -> tuple[float, float]:
    """Return the interval of a rate (Wilson, 1927).

    Args:
        hits: Of `count`.
        count: Trials; the interval of none is everything.
        z: Half its width in standard errors: 1.96 for 95 %.
    """
    if not count:
        return 0.0, 1.0
    rate, square = hits / count, z * z
    middle = (rate + square / (2 * count)) / (1 + square / count)
    half = z * math.sqrt(rate * (1 - rate) / count + square / (4 * count * count)) / (1 + square / count)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def chance_of(hits: int, count: int, rate: float) -> float:
    """Return how likely at least `hits` of `count` are, were the true rate `rate` (exact binomial tail)."""
    if hits <= count * rate:  # at or below the mean no test rejects, and the terms would not fall yet
        return 1.0
    if rate <= 0.0:
        return 0.0
    odds = rate / (1.0 - rate)  # `hits` > count * rate, so the rate is below 1
    term = math.exp(
        math.lgamma(count + 1)
        - math.lgamma(hits + 1)
        - math.lgamma(count - hits + 1)
        + hits * math.log(rate)
        + (count - hits) * math.log1p(-rate)
    )
    total = term
    for found in range(hits, count):
        term *= (count - found) / (found + 1) * odds
        total += term
        if term <= total * _NEGLIGIBLE:
            break
    return min(total, 1.0)


def difference(hits: int, count: int, other_hits: int, other_count: int, z: float) -> tuple[float, float]:
    """Return the interval of the first rate minus the second (Newcombe, 1998, method 10)."""
    low, high = wilson(hits, count, z)
    other_low, other_high = wilson(other_hits, other_count, z)
    rate = hits / count if count else 0.5
    other = other_hits / other_count if other_count else 0.5
    below = math.hypot(rate - low, other_high - other)
    above = math.hypot(high - rate, other - other_low)
    return rate - other - below, rate - other + above
