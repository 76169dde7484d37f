from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.calibrate import Answers, Wish, calibrate, choose_temperature, divide, fit_temperature
from compiler.evaluate import Labels, Logits, max_probability, route
from isthmus.bundle import OperatingPoint

POINT = OperatingPoint(value=0.3, delta=0.1)


def labelled_logits(count: int, *, sharpness: float, seed: int = 0) -> tuple[Logits, Labels]:
    """Return logits whose softmax, at temperature `sharpness`, are the true chances of the labels."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, 1.5, (count, 4))
    chances = np.exp(honest) / np.exp(honest).sum(axis=1, keepdims=True)
    labels = (chances.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1).clip(max=3)
    return (honest * sharpness).astype(np.float32), labels.astype(np.int64)


@pytest.mark.slow
def test_the_bound_holds_with_the_temperature_fitted_on_the_same_file() -> None:
    logits, labels = labelled_logits(100_000, sharpness=3.0)
    rng, broken, rounds = np.random.default_rng(5), 0, 200
    for _ in range(rounds):
        rows = rng.choice(len(labels), 240, replace=False)
        record = calibrate(Answers({"logits": logits[rows]}, logits[rows], labels[rows]), Wish(POINT))
        broken += route(max_probability(logits, record.temperature), record.threshold).mean() > POINT.value
    assert broken / rounds <= POINT.delta + 3 * math.sqrt(POINT.delta * (1 - POINT.delta) / rounds)


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

    record = calibrate(Answers({"logits": logits}, heavy, labels), Wish(POINT))

    assert record.ece_after < record.ece_before
    assert record.escalation_rate <= 0.33
    assert record.accuracy > record.edge_accuracy
    rates = [point.escalation_rate for point in record.curve]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, 1.0)
    assert record.curve[0].accuracy == record.edge_accuracy
    assert record.curve[-1].accuracy == 1.0
    assert 90 <= len(record.curve) <= 101


def test_the_record_describes_the_scores_the_risk_and_the_gains() -> None:
    logits, labels = labelled_logits(2000, sharpness=1.0)
    heavy = np.eye(4, dtype=np.float32)[labels] * 5

    record = calibrate(Answers({"logits": logits}, heavy, labels), Wish(POINT))

    assert len(record.scores) == 101
    assert list(record.scores) == sorted(record.scores)
    assert record.aurc is not None
    assert 0 < record.aurc < 1 - record.edge_accuracy  # better than an order by lot
    assert record.curve[0].risk == pytest.approx(1 - record.edge_accuracy)
    assert record.curve[-1].risk is None
    gains = [step.gain for step in record.gains]
    assert gains == sorted(gains, reverse=True)
    assert record.bound is not None
    assert record.bound <= POINT.value
    assert record.edge_agreement is not None
    assert record.edge_agreement > record.agreement


def test_a_bound_on_the_risk_is_kept_by_the_record() -> None:
    logits, labels = labelled_logits(6000, sharpness=1.0)
    wish = Wish(OperatingPoint(kind="max_risk", value=0.15, delta=0.05), costs=(1.0, 2.0, 1.0, 1.0))

    record = calibrate(Answers({"logits": logits}, logits, labels), wish)

    kept = max(point.risk for point in record.curve if point.risk is not None and point.threshold >= record.threshold)
    assert kept <= 0.15
    assert record.class_thresholds[1] > record.class_thresholds[0]
    assert record.fusion is None  # both models are the same: nothing to win


def test_fusion_is_used_where_both_together_are_better_and_only_there() -> None:
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 4, 4000)
    one, other = (np.eye(4)[labels] * 1.5 + rng.normal(0, 1.5, (4000, 4)) for _ in range(2))

    both = calibrate(Answers({"logits": one}, other, labels), Wish(POINT))
    alone = calibrate(Answers({"logits": one}, other, labels), Wish(POINT, fusion="off"))
    perfect = calibrate(Answers({"logits": one}, np.eye(4)[labels] * 9.0, labels), Wish(POINT))

    assert both.fusion is not None
    assert both.fusion.gain > 0.02
    assert both.accuracy > alone.accuracy
    assert alone.fusion is None
    assert perfect.fusion is None
