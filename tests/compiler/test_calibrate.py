from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.calibrate import (
    ALWAYS,
    NEVER,
    TooFewSamplesError,
    calibrate,
    choose_temperature,
    choose_threshold,
    divide,
    fit_temperature,
    largest_count,
    samples_needed,
)
from compiler.evaluate import Labels, Logits, max_probability, route
from isthmus.bundle import OperatingPoint

POINT = OperatingPoint(value=0.3, delta=0.1)


def binomial_cdf(count: int, rate: float, most: int) -> float:
    return sum(math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(most + 1))


def labelled_logits(count: int, *, sharpness: float, seed: int = 0) -> tuple[Logits, Labels]:
    """Return logits whose softmax, at temperature `sharpness`, are the true chances of the labels."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, 1.5, (count, 4))
    chances = np.exp(honest) / np.exp(honest).sum(axis=1, keepdims=True)
    labels = (chances.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1).clip(max=3)
    return (honest * sharpness).astype(np.float32), labels.astype(np.int64)


@given(st.integers(1, 80), st.floats(0.02, 0.95), st.floats(0.005, 0.5))
def test_largest_count_is_the_exact_binomial_bound(count: int, rate: float, delta: float) -> None:
    found = largest_count(count, rate, delta)

    assert found == -1 or binomial_cdf(count, rate, found) <= delta + 1e-9
    assert binomial_cdf(count, rate, found + 1) > delta - 1e-9


def test_large_counts_do_not_underflow() -> None:
    found = largest_count(100_000, 0.3, 0.1)

    normal = 30_000 - 1.2816 * math.sqrt(100_000 * 0.21)
    assert abs(found - normal) < 3


@pytest.mark.parametrize("plateaus", [False, True])
def test_the_bound_holds_over_many_drawings(plateaus: bool) -> None:
    """The true rate of scores uniform on [0, 1] below t is t; with plateaus it is less."""
    rng = np.random.default_rng(3)
    rounds, broken = 2000, 0
    for _ in range(rounds):
        scores = rng.random(150)
        if plateaus:
            scores = np.ceil(scores * 8) / 8
        threshold = choose_threshold(scores, POINT).value
        true_rate = math.ceil(threshold * 8 - 1) / 8 if plateaus else threshold
        broken += true_rate > POINT.value
    assert broken / rounds <= POINT.delta + 3 * math.sqrt(POINT.delta * (1 - POINT.delta) / rounds)
    assert plateaus or broken / rounds > POINT.delta / 2  # and it is not kept by being useless


@pytest.mark.slow
def test_the_bound_holds_with_the_temperature_fitted_on_the_same_file() -> None:
    logits, labels = labelled_logits(100_000, sharpness=3.0)
    rng, broken, rounds = np.random.default_rng(5), 0, 200
    for _ in range(rounds):
        rows = rng.choice(len(labels), 240, replace=False)
        record = calibrate(logits[rows], logits[rows], labels[rows], POINT)
        broken += route(max_probability(logits, record.temperature), record.threshold).mean() > POINT.value
    assert broken / rounds <= POINT.delta + 3 * math.sqrt(POINT.delta * (1 - POINT.delta) / rounds)


def test_all_scores_equal_escalate_nothing() -> None:
    scores = np.full(500, 0.6)

    assert not route(scores, choose_threshold(scores, POINT).value).any()


def test_too_few_samples_are_refused_with_the_number_needed() -> None:
    with pytest.raises(TooFewSamplesError) as caught:
        choose_threshold(np.linspace(0, 1, 10), POINT)

    found = re.search(r"(\d+) are needed", caught.value.message)
    assert found is not None
    needed = int(found[1])
    assert needed == samples_needed(POINT.value, POINT.delta) > 10
    choose_threshold(np.linspace(0, 1, needed), POINT)
    with pytest.raises(TooFewSamplesError):
        choose_threshold(np.linspace(0, 1, needed - 1), POINT)
    assert caught.value.exit_code == 6


def test_a_strict_point_needs_more() -> None:
    assert samples_needed(0.01, 0.05) > samples_needed(0.3, 0.05) > samples_needed(0.3, 0.2)


def test_all_and_nothing_need_no_samples() -> None:
    scores = np.array([0.2, 1.0])

    assert choose_threshold(scores, OperatingPoint(value=1.0, delta=0.1)).value == ALWAYS
    assert route(scores, ALWAYS).all()
    assert choose_threshold(scores, OperatingPoint(value=0.0, delta=0.1)).value == NEVER
    assert not route(scores, NEVER).any()


def test_the_temperature_is_found() -> None:
    logits, labels = labelled_logits(20_000, sharpness=2.5)

    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.1)
    assert choose_temperature(logits, labels) == pytest.approx(2.5, rel=0.1)


def test_the_temperature_stays_at_one_when_it_does_not_help() -> None:
    logits, labels = labelled_logits(400, sharpness=1.0)
    half = len(labels) // 2
    # The rows that it is fitted on are much too sure, those it is tried on are honest.
    logits[::2], labels[::2] = logits[::2] * 5, labels[::2]

    assert fit_temperature(logits[::2], labels[::2]) > 2
    assert choose_temperature(logits, labels) == 1.0
    assert half == 200


@given(st.integers(1, 50_000))
def test_every_row_is_for_the_temperature_or_for_the_threshold(count: int) -> None:
    fit, rest = divide(count)

    assert sorted([*fit.tolist(), *rest.tolist()]) == list(range(count))
    assert len(fit) <= min(1000, count / 4)


def test_the_record_agrees_with_its_curve() -> None:
    logits, labels = labelled_logits(1000, sharpness=2.0)
    heavy = np.eye(4, dtype=np.float32)[labels] * 5

    record = calibrate(logits, heavy, labels, POINT)

    assert record.ece_after < record.ece_before
    assert record.escalation_rate <= 0.33
    assert record.accuracy > record.edge_accuracy
    rates = [point.escalation_rate for point in record.curve]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, 1.0)
    assert record.curve[0].accuracy == record.edge_accuracy
    assert record.curve[-1].accuracy == 1.0
    assert 90 <= len(record.curve) <= 101
