"""Figures of scores and policies, against what can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.evaluate import area_under_risk
from compiler.replay import Rows, draws, judge_policy, judge_score, oracle_scores, replay
from isthmus.policies import POLICIES, Link
from tests.isthmus.policies.test_policies import POINT

LINK = Link(rtt_s=0.1, bytes_per_s=1e6)


def rows(count: int, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    scores = rng.random(count)
    return Rows(
        scores=scores,
        light_right=rng.random(count) < scores,
        cloud_right=rng.random(count) < 0.9,
        probabilities=np.stack([0.5 + scores / 2, 0.5 - scores / 2], axis=1),
        bytes_up=np.full(count, 1000),
    )


def test_area_under_risk_is_the_mean_over_all_coverages() -> None:
    right = np.array([True, False, True, False])
    scores = np.array([0.9, 0.8, 0.7, 0.6])

    assert area_under_risk(scores, right) == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)


def test_figures_of_a_score_can_be_counted_by_hand() -> None:
    light = np.array([False, True, False, True, True])
    cloud = np.array([True, True, True, True, False])
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.5])

    found = judge_score(scores, light, cloud, draws(5, 20), (0.2, 0.6))

    # Right after sending up 0 to 5 rows: 3, 4, 4, 5, 5, 4; the gap is 1.
    assert found.apgr.value == pytest.approx((0 + 1 + 1 + 2 + 2 + 1) / 6)
    assert [figure.value for figure in found.cpt.values()] == [0.2, 0.2, 0.2]
    assert [figure.value for figure in found.accuracy.values()] == [0.8, 1.0]


@given(st.integers(0, 1000))
def test_no_score_beats_the_oracle(seed: int) -> None:
    data = rows(400, seed)
    samples = draws(400, 10)

    found = judge_score(data.scores, data.light_right, data.cloud_right, samples, (0.2,))
    best = judge_score(
        oracle_scores(data.light_right, data.cloud_right), data.light_right, data.cloud_right, samples, (0.2,)
    )

    assert best.accuracy[0.2].value is not None
    assert found.accuracy[0.2].value is not None
    assert best.accuracy[0.2].value >= found.accuracy[0.2].value


def test_lots_recover_half_of_the_gap() -> None:
    data, rng, samples = rows(2000), np.random.default_rng(0), draws(2000, 10)

    found = [
        judge_score(rng.random(2000), data.light_right, data.cloud_right, samples, (0.2,)).apgr.value for _ in range(30)
    ]

    assert np.mean([value for value in found if value is not None]) == pytest.approx(0.5, abs=0.02)


def test_intervals_hold_the_value_and_shrink_with_the_rows() -> None:
    widths = []
    for count in (200, 5000):
        data = rows(count)
        found = judge_score(data.scores, data.light_right, data.cloud_right, draws(count, 200), (0.2,)).accuracy[0.2]
        assert found.low is not None
        assert found.high is not None
        assert found.value is not None
        assert found.low <= found.value <= found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 3


def test_models_alike_have_no_gap_to_recover() -> None:
    data = rows(100)

    found = judge_score(data.scores, data.light_right, data.light_right, draws(100, 10), (0.5,))

    assert found.apgr.value is None
    assert found.accuracy[0.5].value == pytest.approx(data.light_right.mean())


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_can_be_replayed_and_judged(name: str) -> None:
    data = rows(500)
    samples = draws(500, 20)

    escalated = replay(name, POINT, data, LINK)
    found = judge_policy(escalated, data, samples, link=LINK, light_ms=2.0)

    rate = float(escalated.mean())
    assert found.escalated.value == pytest.approx(rate)
    assert found.accuracy.value == pytest.approx(np.where(escalated, data.cloud_right, data.light_right).mean())
    assert found.bytes_per_request == pytest.approx(1000 * rate)
    assert found.latency_ms == pytest.approx(2.0 + 101.0 * rate)


def test_the_oracle_sends_what_is_mended_and_nothing_else() -> None:
    data = rows(500)

    found = judge_policy(replay("oracle", POINT, data, LINK), data, draws(500, 20), link=LINK, light_ms=None)

    assert found.accuracy.value == pytest.approx((data.light_right | data.cloud_right).mean())
    assert found.latency_ms is None
