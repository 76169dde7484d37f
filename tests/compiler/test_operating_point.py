"""What an operating point promises, and what is refused because the data cannot support it."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from compiler.evaluate import route
from compiler.operating_point import (
    ALWAYS,
    NEVER,
    Evidence,
    Threshold,
    TooFewSamplesError,
    choose,
    choose_by_rate,
    samples_needed,
)
from isthmus.bundle import OperatingPoint

POINT = OperatingPoint(value=0.3, delta=0.1)
ROUNDS = 400


def draw(count: int, rng: np.random.Generator, *, heavy: float = 0.97) -> Evidence:
    """Scores uniform on [0, 1]; a light answer is right with chance 0.5 + score / 2: the risk at t is (1 - t) / 4."""
    scores = rng.random(count)
    return Evidence(scores, rng.random(count) < 0.5 + scores / 2, rng.random(count) < heavy)


def divided(rows: Evidence) -> tuple[Evidence, Evidence]:
    quarter = np.arange(len(rows)) % 4 == 0
    return rows.take(np.flatnonzero(quarter)), rows.take(np.flatnonzero(~quarter))


def chosen(point: OperatingPoint, rows: Evidence) -> Threshold | None:
    try:
        return choose(point, *divided(rows), samples=len(rows))
    except TooFewSamplesError:
        return None


def true_risk(threshold: float) -> float:
    return (1 - threshold) / 4


def true_accuracy(threshold: float, heavy: float) -> float:
    t = min(threshold, 1.0)
    return t * heavy + (1 - t) * (1 - true_risk(t))


def tolerance(delta: float) -> float:
    return delta + 3 * math.sqrt(delta * (1 - delta) / ROUNDS)


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_the_risk_is_kept_over_many_drawings_and_not_by_being_useless(delta: float) -> None:
    rng, point = np.random.default_rng(1), OperatingPoint(kind="max_risk", value=0.1, delta=delta)

    found = [threshold for _ in range(ROUNDS) if (threshold := chosen(point, draw(1600, rng))) is not None]

    assert len(found) > 0.85 * ROUNDS  # the others were refused: no promise, none broken
    broken = np.mean([true_risk(threshold.value) > point.value for threshold in found])
    assert broken <= tolerance(delta)
    coverage = np.mean([1 - threshold.value for threshold in found])
    assert coverage > 0.25  # of the 0.4 that an oracle of thresholds would keep
    assert all(threshold.bound is not None and threshold.bound <= point.value for threshold in found)


@pytest.mark.slow
def test_the_target_of_accuracy_is_kept_over_many_drawings() -> None:
    rng, point = np.random.default_rng(2), OperatingPoint(kind="target_accuracy", value=0.9, delta=0.1)

    found = [threshold for _ in range(ROUNDS) if (threshold := chosen(point, draw(2000, rng))) is not None]

    assert len(found) > 0.85 * ROUNDS
    broken = np.mean([true_accuracy(threshold.value, 0.97) < point.value for threshold in found])
    assert broken <= tolerance(point.delta)
    assert np.mean([threshold.value for threshold in found]) < 0.9  # not everything goes up


def test_what_the_edge_reaches_alone_escalates_nothing() -> None:
    rows = draw(4000, np.random.default_rng(3))

    found = choose(OperatingPoint(kind="target_accuracy", value=0.6, delta=0.05), *divided(rows), samples=len(rows))

    assert found.value == NEVER


def test_a_risk_that_no_data_can_support_is_refused() -> None:
    rng = np.random.default_rng(4)
    rows = Evidence(rng.random(4000), rng.random(4000) < 0.8, rng.random(4000) < 0.9)  # the score says nothing

    with pytest.raises(TooFewSamplesError, match="more of them would not: even of the surest answers") as caught:
        choose(OperatingPoint(kind="max_risk", value=0.02, delta=0.05), *divided(rows), samples=len(rows))

    assert caught.value.exit_code == 6


def test_an_accuracy_beyond_both_models_is_refused() -> None:
    rows = draw(4000, np.random.default_rng(5), heavy=0.9)

    with pytest.raises(TooFewSamplesError, match=r"the best that any threshold reaches is 9\d"):
        choose(OperatingPoint(kind="target_accuracy", value=0.99, delta=0.05), *divided(rows), samples=len(rows))


def test_the_number_of_samples_that_would_do_is_told_and_does() -> None:
    rng, point = np.random.default_rng(6), OperatingPoint(kind="max_risk", value=0.07, delta=0.05)
    with pytest.raises(TooFewSamplesError) as caught:
        choose(point, *divided(draw(600, rng)), samples=600)

    found = re.search(r"give about (\d+) labelled samples", caught.value.hint or "")
    assert found is not None
    needed = int(found[1])
    assert needed > 600
    few, enough = (np.mean([chosen(point, draw(count, rng)) is not None for _ in range(40)]) for count in (600, needed))
    assert few < 0.5 < enough


def test_a_plateau_stays_whole() -> None:
    rng = np.random.default_rng(7)
    rows = draw(3000, rng)
    plateau = Evidence(np.ceil(rows.scores * 8) / 8, rows.light_right, rows.cloud_right)

    found = choose(OperatingPoint(kind="max_risk", value=0.1, delta=0.1), *divided(plateau), samples=3000)

    assert found.value in set(plateau.scores)


@pytest.mark.parametrize("plateaus", [False, True])
def test_the_bound_holds_over_many_drawings(plateaus: bool) -> None:
    """The true rate of scores uniform on [0, 1] below t is t; with plateaus it is less."""
    rng = np.random.default_rng(3)
    rounds, broken = 2000, 0
    for _ in range(rounds):
        scores = rng.random(150)
        if plateaus:
            scores = np.ceil(scores * 8) / 8
        threshold = choose_by_rate(scores, POINT).value
        true_rate = math.ceil(threshold * 8 - 1) / 8 if plateaus else threshold
        broken += true_rate > POINT.value
    assert broken / rounds <= POINT.delta + 3 * math.sqrt(POINT.delta * (1 - POINT.delta) / rounds)
    assert plateaus or broken / rounds > POINT.delta / 2  # and it is not kept by being useless


def test_all_scores_equal_escalate_nothing() -> None:
    scores = np.full(500, 0.6)

    assert not route(scores, choose_by_rate(scores, POINT).value).any()


def test_too_few_samples_are_refused_with_the_number_needed() -> None:
    with pytest.raises(TooFewSamplesError) as caught:
        choose_by_rate(np.linspace(0, 1, 10), POINT)

    found = re.search(r"(\d+) are needed", caught.value.message)
    assert found is not None
    needed = int(found[1])
    assert needed == samples_needed(POINT.value, POINT.delta) > 10
    choose_by_rate(np.linspace(0, 1, needed), POINT)
    with pytest.raises(TooFewSamplesError):
        choose_by_rate(np.linspace(0, 1, needed - 1), POINT)
    assert caught.value.exit_code == 6


def test_a_strict_point_needs_more() -> None:
    assert samples_needed(0.01, 0.05) > samples_needed(0.3, 0.05) > samples_needed(0.3, 0.2)


def test_all_and_nothing_need_no_samples() -> None:
    scores = np.array([0.2, 1.0])

    assert choose_by_rate(scores, OperatingPoint(value=1.0, delta=0.1)).value == ALWAYS
    assert route(scores, ALWAYS).all()
    assert choose_by_rate(scores, OperatingPoint(value=0.0, delta=0.1)).value == NEVER
    assert not route(scores, NEVER).any()
