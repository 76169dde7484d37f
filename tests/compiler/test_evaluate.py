from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.evaluate import (
    Logits,
    accuracy,
    accuracy_curve,
    agreement,
    expected_calibration_error,
    max_probability,
    negative_log_likelihood,
    oracle_curve,
    random_curve,
    route,
    routed_accuracy,
    softmax,
)


def logits_of(answers: list[int], strength: float = 2.0) -> Logits:
    return np.eye(3, dtype=np.float32)[answers] * strength


@given(st.integers(0, 2**32 - 1))
def test_curves_start_at_the_edge_and_end_in_the_cloud_and_none_beats_the_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    light, heavy = rng.normal(size=(2, 40, 3))
    labels = rng.integers(0, 3, 40)
    curve = accuracy_curve(light, heavy, labels, max_probability(light))
    oracle, chance = oracle_curve(light, heavy, labels), random_curve(light, heavy, labels)

    for each in (curve, oracle, chance):
        assert each.escalation[0] == 0.0
        assert each.escalation[-1] == 1.0
        assert each.accuracy[0] == pytest.approx(accuracy(light, labels))
        assert each.accuracy[-1] == pytest.approx(accuracy(heavy, labels))
    assert (oracle.accuracy >= curve.accuracy - 1e-12).all()


def test_the_least_sure_go_up_first() -> None:
    light = np.array([[9.0, 0, 0], [0.1, 0, 0], [5.0, 0, 0]])
    heavy, labels = logits_of([1, 1, 1]), np.array([0, 1, 0])

    curve = accuracy_curve(light, heavy, labels, max_probability(light), points=4)

    assert curve.accuracy.tolist() == pytest.approx([2 / 3, 1.0, 2 / 3, 1 / 3])


def test_a_score_at_the_threshold_stays() -> None:
    assert route(np.array([0.2, 0.5, 0.7]), 0.5).tolist() == [True, False, False]


def test_routed_accuracy_takes_the_heavy_answer_where_it_went_up() -> None:
    labels = np.array([0, 1, 2, 0])
    light, heavy = logits_of([0, 0, 2, 1]), logits_of([1, 1, 2, 1])

    assert routed_accuracy(light, heavy, labels, np.array([False, True, False, True])) == 0.75
    assert agreement(light, heavy) == 0.5


def test_temperature_flattens_and_survives_large_logits() -> None:
    logits = np.array([[1000.0, 0.0, -1000.0]], dtype=np.float32)

    assert softmax(logits)[0].tolist() == [1.0, 0.0, 0.0]
    assert max_probability(logits, 1e6)[0] == pytest.approx(1 / 3, abs=1e-3)
    assert np.isfinite(negative_log_likelihood(logits, np.array([2])))


def test_calibration_error_is_the_gap_between_score_and_accuracy() -> None:
    sure_and_wrong_half_the_time = logits_of([0, 0, 0, 0], strength=50.0)

    assert expected_calibration_error(sure_and_wrong_half_the_time, np.array([0, 0, 1, 2])) == pytest.approx(0.5)
    assert expected_calibration_error(sure_and_wrong_half_the_time, np.array([0, 0, 0, 0])) == pytest.approx(0.0)
