from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.evaluate import (
    Logits,
    compare,
    expected_calibration_error,
    max_probability,
    measure,
    negative_log_likelihood,
    route,
)


def logits_of(answers: list[int], strength: float = 2.0) -> Logits:
    return np.eye(3, dtype=np.float32)[answers] * strength


def test_a_score_at_the_threshold_stays() -> None:
    assert route(np.array([0.2, 0.5, 0.7]), 0.5).tolist() == [True, False, False]


def test_temperature_flattens_and_survives_large_logits() -> None:
    logits = np.array([[1000.0, 0.0, -1000.0]], dtype=np.float32)

    assert max_probability(logits)[0] == 1.0
    assert max_probability(logits, 1e6)[0] == pytest.approx(1 / 3, abs=1e-3)
    assert np.isfinite(negative_log_likelihood(logits, np.array([2])))


def test_calibration_error_is_the_gap_between_score_and_accuracy() -> None:
    sure_and_wrong_half_the_time = logits_of([0, 0, 0, 0], strength=50.0)

    assert expected_calibration_error(sure_and_wrong_half_the_time, np.array([0, 0, 1, 2])) == pytest.approx(0.5)
    assert expected_calibration_error(sure_and_wrong_half_the_time, np.array([0, 0, 0, 0])) == pytest.approx(0.0)


def test_the_metrics_are_those_of_the_textbook() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    logits = logits_of([0, 0, 1, 1, 1, 0])

    assert measure("accuracy", logits, labels) == pytest.approx(4 / 6)
    assert measure("balanced-accuracy", logits, labels) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert measure("macro-f1", logits, labels) == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["accuracy", "balanced-accuracy", "macro-f1"]))
def test_a_comparison_gives_the_metrics_and_intervals_around_them(seed: int, metric: str) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = rng.normal(size=(2, 60, 3))
    labels = rng.integers(0, 3, 60)

    found = compare(metric, ours, theirs, labels)

    assert found.value == pytest.approx(measure(metric, ours, labels))
    assert found.drop == pytest.approx(measure(metric, theirs, labels) - found.value)
    assert found.interval[0] <= found.value + 0.05
    assert found.interval[1] >= found.value - 0.05
    assert found == compare(metric, ours, theirs, labels)


def test_the_interval_of_accuracy_is_that_of_the_binomial() -> None:
    labels = np.zeros(1000, np.int64)
    logits = logits_of([0] * 800 + [1] * 200)

    found = compare("accuracy", logits, logits, labels)

    assert found.interval == pytest.approx((0.8 - 0.0248, 0.8 + 0.0248), abs=0.004)
    assert found.drop_interval == (0.0, 0.0)  # the same answers: nothing was lost, whatever the sample


def test_a_difference_on_the_same_rows_has_a_narrow_interval() -> None:
    labels = np.zeros(1000, np.int64)
    source, ours = logits_of([0] * 800 + [1] * 200), logits_of([0] * 790 + [1] * 210)

    low, high = compare("accuracy", ours, source, labels).drop_interval

    assert 0.003 < low < 0.010 < high < 0.018
