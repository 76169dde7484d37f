"""When the cloud is asked again: retries stay a share of the calls, and a used-up quota is respected."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.retry import QuotaPause, RetryBudget
from tests.edge.test_breaker import Clock


@given(st.lists(st.booleans(), max_size=400), st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([0.0, 1.0, 3.0]))
def test_retries_never_exceed_their_share_of_the_calls(broken: list[bool], ratio: float, burst: float) -> None:
    budget, retries = RetryBudget(ratio=ratio, burst=burst), 0
    for calls, is_broken in enumerate(broken, start=1):
        budget.earn()
        retries += is_broken and budget.spend()
        assert retries <= burst + ratio * calls


def test_budget_that_was_spent_comes_back_with_calls() -> None:
    budget = RetryBudget(ratio=0.25, burst=2)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    for _ in range(4):
        budget.earn()
    assert [budget.spend() for _ in range(2)] == [True, False]


def make(clock: Clock, jitter: float = 0.0) -> QuotaPause:
    return QuotaPause(first_s=1.0, longest_s=4.0, clock=clock, jitter=lambda: jitter)


def test_pauses_double_up_to_the_limit_and_an_answer_resets_them() -> None:
    clock = Clock()
    pause = make(clock)
    for seconds in (1, 2, 4, 4):
        pause.begin()
        clock.now += seconds - 0.001
        assert pause.active
        clock.now += 0.002
        assert not pause.active
    pause.reset()
    pause.begin()
    clock.now += 1.001
    assert not pause.active


def test_burst_of_refusals_is_one_pause() -> None:
    clock = Clock()
    pause = make(clock)
    for _ in range(20):
        pause.begin()
    clock.now += 1.001
    assert not pause.active


def test_hint_of_the_cloud_goes_first_and_never_shortens_a_pause() -> None:
    clock = Clock()
    pause = make(clock)
    pause.begin(7.0)
    pause.begin(2.0)
    pause.begin()
    clock.now += 6.999
    assert pause.active
    clock.now += 0.002
    assert not pause.active
    pause.begin(1e9)
    clock.now += 3600.001
    assert not pause.active, "no hint silences the uplink for more than an hour"


@pytest.mark.parametrize(("jitter", "seconds"), [(0.0, 1.0), (0.999, 0.81)])
def test_jitter_only_shortens_a_pause(jitter: float, seconds: float) -> None:
    clock = Clock()
    pause = make(clock, jitter)
    pause.begin()
    clock.now += seconds
    assert not pause.active
