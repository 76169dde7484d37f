"""The contract of every policy in the table, and what each one promises."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.bundle import CurvePoint, GainStep, VariantCalibration
from isthmus.errors import ConfigError
from isthmus.policies import POLICIES, SERVING, Case, Link, check_serving, make_policy
from isthmus.tensors import Array

POINT = VariantCalibration(
    temperature=1.0,
    threshold=0.6,
    escalation_rate=0.25,
    accuracy=0.8,
    edge_accuracy=0.7,
    agreement=0.8,
    ece_before=0.1,
    ece_after=0.1,
    scores=tuple(np.linspace(0.2, 1.0, 101).tolist()),
    gains=(GainStep(score=0.0, gain=0.4), GainStep(score=0.5, gain=0.1), GainStep(score=0.8, gain=-0.02)),
    curve=(CurvePoint(threshold=0.6, escalation_rate=0.25, accuracy=0.8),),
)


def case(score: float, **more: object) -> Case:
    return Case(score, probabilities=np.array([score, 1 - score]), gain=0.0, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_decides_about_every_score_and_the_same_way_for_the_same_history(name: str) -> None:
    rng = np.random.default_rng(0)
    scores = [0.0, 1.0, *rng.random(500).tolist()]

    first, second = (
        [made.escalates(case(score)) for score in scores]
        for made in (make_policy(name, POINT, chance=random.Random(3)) for _ in range(2))
    )

    assert first == second
    assert set(first) <= {True, False}


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_parameter_that_it_does_not_have_is_refused_with_those_it_has(name: str) -> None:
    with pytest.raises(ConfigError, match="no parameter 'nonsense'"):
        make_policy(f"{name}:nonsense=1", POINT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("luck", "there are threshold"),
        ("budget:rate=lots", "expected a number"),
        ("budget:rate=1.5", "expected 0 to 1"),
        ("budget:low=0.9,high=0.2", "expected 0.9 to 1"),
        ("random:rate=-1", "expected 0 to 1"),
        ("cost:second=nan", "expected 0 to"),
        ("threshold:at=3", "expected 0 to 2"),
    ],
)
def test_what_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(text, POINT)


def test_what_a_device_runs_needs_no_truth() -> None:
    for name in SERVING:
        make_policy(name, POINT).escalates(Case(0.5))


def test_a_device_refuses_at_once_what_it_cannot_run() -> None:
    for text in ("threshold", "budget:rate=0.1,low=0.2,high=0.9", "cost:second=1"):
        check_serving(text)
    for text in ("oracle", "sedna-ibt", "luck", "budget:rate=7", "budget:rat=0.1", "cost:second=x"):
        with pytest.raises(ConfigError):
            check_serving(text)


def test_the_records_threshold_is_the_default_and_a_score_at_it_stays() -> None:
    policy = make_policy("threshold", POINT)

    assert policy.threshold == 0.6
    assert [policy.escalates(Case(score)) for score in (0.59, 0.6, 0.61)] == [True, False, False]
    assert make_policy("threshold:at=0.9", POINT).escalates(Case(0.8))


def drifting(kind: str, count: int, seed: int) -> Array:
    rng, t = np.random.default_rng(seed), np.linspace(0, 1, count)
    scores: dict[str, Array] = {
        "jump": np.where(t < 0.5, rng.beta(8, 2, count), rng.beta(2, 6, count)),
        "drift": rng.beta(8 - 6 * t, 2),
        "waves": np.clip(rng.normal(0.6 + 0.3 * np.sin(t * 40), 0.1), 0, 1),
        "plateaus": np.round(rng.random(count) * 4) / 4,
        "sorted": np.sort(rng.random(count))[::-1],
        "constant": np.full(count, 0.7),
    }
    return scores[kind]


@pytest.mark.parametrize("kind", ["jump", "drift", "waves", "plateaus", "sorted", "constant"])
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.9])
def test_the_budget_holds_over_any_thousand_requests(kind: str, rate: float) -> None:
    policy = make_policy(f"budget:rate={rate}", POINT)

    sent = np.array([policy.escalates(Case(float(score))) for score in drifting(kind, 8000, 1)])

    totals = np.concatenate([[0], np.cumsum(sent)])
    shares = (totals[1000:] - totals[:-1000]) / 1000
    assert np.abs(shares - rate).max() <= 0.01 + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=300), st.floats(0, 1))
def test_the_budgets_account_never_leaves_its_band(scores: list[float], rate: float) -> None:
    policy = make_policy(f"budget:rate={rate}", POINT)

    totals = np.concatenate([[0], np.cumsum([policy.escalates(Case(score)) for score in scores])])

    debts = totals - rate * np.arange(len(totals))
    assert debts.max() - debts.min() <= 10 + 1e-6


def test_the_budget_still_sends_the_least_certain() -> None:
    """What following the rate costs, on scores without drift: hardly anything against the best threshold."""
    scores = np.random.default_rng(2).beta(6, 2, 6000)
    policy = make_policy("budget:rate=0.2", POINT)

    sent = np.array([policy.escalates(Case(float(score))) for score in scores])

    best = scores < np.quantile(scores, 0.2)
    assert (sent & best).sum() / best.sum() > 0.9


def test_reviewed_bounds_win_over_the_rate() -> None:
    policy = make_policy("budget:rate=0.2,low=0.3,high=0.7", POINT)

    assert all(policy.escalates(Case(0.1)) for _ in range(200))
    assert not any(policy.escalates(Case(0.8)) for _ in range(200))
    assert policy.threshold is not None
    assert 0.3 <= policy.threshold <= 0.7


def test_a_slow_link_lets_only_what_gains_much_go_up() -> None:
    policy = make_policy("cost:second=0.2,megabyte=0.1", POINT)
    quick, slow = Link(rtt_s=0.01, bytes_per_s=1e7), Link(rtt_s=1.0, bytes_per_s=1e5)
    scores = (0.1, 0.6, 0.9)

    assert [policy.escalates(Case(score, 1000, quick)) for score in scores] == [True, True, False]
    assert [policy.escalates(Case(score, 1000, slow)) for score in scores] == [True, False, False]
    assert not policy.escalates(Case(0.1, 5_000_000, quick))


def test_a_record_without_gains_cannot_price_anything() -> None:
    with pytest.raises(ConfigError, match="compile the bundle anew"):
        make_policy("cost", POINT.model_copy(update={"gains": ()}))


def test_chance_draws_its_share() -> None:
    policy = make_policy("random:rate=0.4", POINT, chance=random.Random(1))

    assert sum(policy.escalates(Case(0.5)) for _ in range(5000)) / 5000 == pytest.approx(0.4, abs=0.03)


def test_the_oracle_needs_the_truth() -> None:
    policy = make_policy("oracle", POINT)

    assert policy.escalates(Case(0.99, gain=1.0))
    assert not policy.escalates(Case(0.01, gain=-1.0))
    with pytest.raises(ValueError, match="labels"):
        policy.escalates(Case(0.5))


def test_sednas_filters_call_nothing_found_easy() -> None:
    for name in ("sedna-threshold", "sedna-cross-entropy", "sedna-ibt"):
        policy = make_policy(name, POINT)
        assert not policy.escalates(Case(0.0, probabilities=np.zeros(0)))
        assert not policy.escalates(Case(0.0))
        assert policy.escalates(Case(0.25, probabilities=np.full(4, 0.25)))
        assert not policy.escalates(Case(1.0, probabilities=np.array([1.0, 0.0, 0.0])))


def test_the_threshold_in_force_moves_with_the_scores() -> None:
    policy = make_policy("budget:rate=0.2", POINT)
    seen = []
    for score in [0.9] * 600 + [0.3] * 600:
        policy.escalates(Case(score))
        seen.append(policy.threshold)

    assert any(before != after for before, after in pairwise(seen))
