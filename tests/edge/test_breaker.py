"""The breaker as a state machine: what holds whatever order calls and verdicts come in."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from edge.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def state_of(breaker: Breaker) -> str:
    return breaker.state


def make(clock: Clock, jitter: float = 0.0) -> Breaker:
    return Breaker(failures=3, first_wait_s=1.0, longest_wait_s=30.0, clock=clock, jitter=lambda: jitter)


def fail_times(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        ticket = breaker.admit()
        assert ticket is not None
        breaker.fail(ticket)


def test_opens_after_three_failures_in_a_row() -> None:
    breaker = make(Clock())
    fail_times(breaker, 2)
    assert state_of(breaker) == "closed"
    fail_times(breaker, 1)
    assert state_of(breaker) == "open"
    assert breaker.admit() is None


def test_success_starts_the_count_anew() -> None:
    breaker = make(Clock())
    for _ in range(10):
        fail_times(breaker, 2)
        ticket = breaker.admit()
        assert ticket is not None
        breaker.succeed(ticket)
    assert state_of(breaker) == "closed"


def test_one_probe_at_a_time_and_its_success_closes() -> None:
    clock = Clock()
    breaker = make(clock)
    fail_times(breaker, 3)
    clock.now += 0.999
    assert breaker.admit() is None
    clock.now += 0.002
    probe = breaker.admit()
    assert probe is not None
    assert state_of(breaker) == "half-open"
    assert [breaker.admit() for _ in range(5)] == [None] * 5
    breaker.succeed(probe)
    assert state_of(breaker) == "closed"
    assert breaker.admit() is not None


def test_waits_double_up_to_the_limit_and_a_success_resets_them() -> None:
    clock = Clock()
    breaker = make(clock)
    fail_times(breaker, 3)
    for wait_s in (1, 2, 4, 8, 16, 30, 30):
        clock.now += wait_s - 0.001
        assert breaker.admit() is None
        clock.now += 0.002
        fail_times(breaker, 1)
    clock.now += 31
    probe = breaker.admit()
    assert probe is not None
    breaker.succeed(probe)
    fail_times(breaker, 3)
    clock.now += 1.001
    assert breaker.admit() is not None


def test_jitter_only_shortens_a_wait() -> None:
    clock = Clock()
    breaker = make(clock, jitter=0.999)
    fail_times(breaker, 3)
    clock.now += 0.79
    assert breaker.admit() is None
    clock.now += 0.02
    assert breaker.admit() is not None


def test_abandoned_probe_lets_the_next_call_probe() -> None:
    clock = Clock()
    breaker = make(clock)
    fail_times(breaker, 3)
    clock.now += 2
    probe = breaker.admit()
    assert probe is not None
    breaker.abandon(probe)
    second = breaker.admit()
    assert second is not None
    breaker.fail(probe)  # too late to count
    assert state_of(breaker) == "half-open"
    breaker.succeed(second)
    assert state_of(breaker) == "closed"


def test_burst_of_late_failures_counts_once() -> None:
    clock = Clock()
    breaker = make(clock)
    tickets = [breaker.admit() for _ in range(20)]
    for ticket in tickets:
        assert ticket is not None
        breaker.fail(ticket)
    clock.now += 1.001
    assert breaker.admit() is not None


def test_nudge_ends_the_wait_but_admits_one_probe_only() -> None:
    breaker = make(Clock())
    breaker.nudge()
    assert state_of(breaker) == "closed"
    fail_times(breaker, 3)
    breaker.nudge()
    assert breaker.admit() is not None
    assert breaker.admit() is None


def test_waits_after_a_nudge_start_anew() -> None:
    clock = Clock()
    breaker = make(clock)
    fail_times(breaker, 3)
    for _ in range(6):
        clock.now += 31
        fail_times(breaker, 1)
    breaker.nudge()
    fail_times(breaker, 1)  # the connection is back, the cloud behind it not yet
    clock.now += 1.001
    assert breaker.admit() is not None


class BreakerMachine(RuleBasedStateMachine):
    """Random calls, verdicts in any order, time in any steps."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = make(self.clock)

    @rule(target=tickets)
    def call(self) -> int | None:
        before = self.breaker.state
        ticket = self.breaker.admit()
        assert (ticket is None) <= (before != "closed"), "a closed breaker admits every call"
        if before == "open":
            assert ticket is None
        return ticket

    @rule(ticket=consumes(tickets), verdict=st.sampled_from(["succeed", "fail", "abandon"]))
    def end(self, ticket: int | None, verdict: str) -> None:
        if ticket is not None:
            getattr(self.breaker, verdict)(ticket)

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def nudge(self) -> None:
        self.breaker.nudge()

    @precondition(lambda self: self.breaker.state == "half-open")
    @rule()
    def probe_is_single(self) -> None:
        if self.breaker.admit() is not None:
            assert self.breaker.admit() is None

    @invariant()
    def never_stuck(self) -> None:
        probing = self.breaker._probing
        self.clock.now += 31
        assert probing or self.breaker.state != "open", "an open breaker probes within the longest wait"
        self.clock.now -= 31


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=60, stateful_step_count=25)


@pytest.mark.parametrize("verdict", ["succeed", "fail", "abandon"])
def test_verdict_of_an_earlier_state_changes_nothing(verdict: str) -> None:
    breaker = make(Clock())
    stale = breaker.admit()
    assert stale is not None
    fail_times(breaker, 3)
    getattr(breaker, verdict)(stale)
    assert state_of(breaker) == "open"
    assert breaker.admit() is None
