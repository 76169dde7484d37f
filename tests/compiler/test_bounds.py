"""Exact binomial bounds, against sums of exact terms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.bounds import binomial_cdf, largest_count, lower_bound, upper_bound


def summed(hits: int, trials: int, rate: float) -> float:
    return sum(math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(hits + 1))


@given(st.integers(1, 80), st.integers(-1, 80), st.floats(0.0, 1.0))
def test_the_distribution_is_exact(trials: int, hits: int, rate: float) -> None:
    assert binomial_cdf(hits, trials, rate) == pytest.approx(summed(min(hits, trials), trials, rate), abs=1e-9)


@given(st.integers(1, 80), st.floats(0.02, 0.95), st.floats(0.005, 0.5))
def test_the_largest_count_is_the_exact_bound(count: int, rate: float, delta: float) -> None:
    found = largest_count(count, rate, delta)

    assert found == -1 or summed(found, count, rate) <= delta + 1e-9
    assert summed(found + 1, count, rate) > delta - 1e-9


@given(st.integers(1, 200), st.data(), st.floats(0.001, 0.4))
def test_the_bounds_are_those_of_clopper_and_pearson(trials: int, data: st.DataObject, delta: float) -> None:
    hits = data.draw(st.integers(0, trials))

    above, below = upper_bound(hits, trials, delta), lower_bound(hits, trials, delta)

    assert below <= hits / trials <= above
    assert hits == trials or binomial_cdf(hits, trials, above) == pytest.approx(delta, abs=1e-6)
    assert hits == 0 or 1 - binomial_cdf(hits - 1, trials, below) == pytest.approx(delta, abs=1e-6)


def test_no_errors_in_300_is_the_rule_of_three() -> None:
    assert upper_bound(0, 300, 0.05) == pytest.approx(0.01, abs=1e-4)
    assert upper_bound(0, 0, 0.05) == 1.0


def test_large_counts_do_not_underflow() -> None:
    normal = 30_000 - 1.2816 * math.sqrt(100_000 * 0.21)

    assert abs(largest_count(100_000, 0.3, 0.1) - normal) < 3
    assert binomial_cdf(30_000, 100_000, 0.3) == pytest.approx(0.5, abs=0.01)
    assert binomial_cdf(100, 100_000, 0.3) == 0.0
