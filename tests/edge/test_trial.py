"""Verdicts on evidence: what few requests say decides nothing, what many say does."""

from __future__ import annotations

import numpy as np
import pytest

from edge.config import UpdateSettings
from edge.intervals import chance_of, difference, wilson
from edge.tally import Seen, Tally
from edge.trial import Evidence, Reason, Terms, Verdict, judge

ALL = Terms(
    soak_s=60,
    min_requests=100,
    max_error_rate=0.02,
    max_latency_ratio=1.5,
    max_escalation_change=0.1,
    min_agreement=0.9,
)


def seen(requests: int = 1000, *, ms: float = 2.0, seconds: float = 60.0, **counts: int) -> Seen:
    tally = Tally()
    for _ in range(requests):
        tally.computed(ms / 1e3)
    return tally.seen(seconds=seconds).model_copy(update=counts)


BEFORE = seen(escalated=200)


def verdict(now: Seen, before: Seen = BEFORE) -> Verdict:
    return judge(ALL, Evidence(now, before))


def test_a_version_as_good_as_the_one_before_is_kept_when_its_time_is_over() -> None:
    assert verdict(seen(escalated=210, errors=5, audited=50, disagreed=4)).keep
    assert verdict(seen(escalated=210, seconds=59)) == Verdict()


def test_too_few_requests_prolong_the_trial_and_none_do_not() -> None:
    assert verdict(seen(99)) == Verdict()
    assert verdict(seen(99, seconds=600)).keep  # a device that hardly works is not on trial for ever
    assert verdict(seen(0)).keep


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (seen(escalated=200, errors=60), Reason.ERRORS),
        (seen(escalated=200, ms=3.8), Reason.LATENCY),
        (seen(escalated=400), Reason.ESCALATION),
        (seen(escalated=0), Reason.ESCALATION),
        (seen(escalated=200, audited=50, disagreed=25), Reason.AGREEMENT),
    ],
)
def test_what_breaks_a_limit_is_rolled_back_before_its_time_is_over(now: Seen, reason: Reason) -> None:
    found = verdict(now.model_copy(update={"seconds": 1.0}))
    assert (found.broken, found.keep) == (reason, False)
    assert found.detail


@pytest.mark.parametrize(
    "now",
    [
        seen(1, errors=1),
        seen(12, ms=50.0),
        seen(12, escalated=12),
        seen(1000, escalated=200, audited=3, disagreed=3),
        seen(escalated=200, errors=25),  # 2.5 % where 2 % are allowed
        seen(escalated=310),
    ],
)
def test_chance_is_no_reason(now: Seen) -> None:
    assert verdict(now).broken is None


def test_without_a_version_before_it_nothing_is_compared_with_it() -> None:
    assert verdict(seen(escalated=900, ms=99.0), seen(0)).keep


@pytest.mark.slow
def test_a_good_version_is_hardly_ever_rolled_back_however_often_one_looks() -> None:
    rng = np.random.default_rng(3)
    broken = 0
    for _ in range(300):
        now = Seen()
        for _ in range(100):  # a look after every ten requests, at the very limits
            errors, escalated = rng.binomial(10, 0.02), rng.binomial(10, 0.25)
            audits = rng.binomial(10, 0.9)
            more = Seen(requests=10, errors=errors, escalated=escalated, audited=10, disagreed=10 - audits)
            now = now.plus(more.model_copy(update={"buckets": {50: 10}}))
            broken += judge(ALL, Evidence(now, BEFORE)).broken is not None
            if judge(ALL, Evidence(now, BEFORE)).broken is not None:
                break
    assert broken <= 6


def test_tails_are_those_of_the_binomial_distribution() -> None:
    assert chance_of(3, 10, 0.1) == pytest.approx(0.0701908264, rel=1e-6)
    assert chance_of(1, 1, 0.02) == pytest.approx(0.02)
    assert chance_of(600, 1000, 0.5) == pytest.approx(1.364232e-10, rel=1e-4)
    assert chance_of(2, 10, 0.5) == 1.0
    assert chance_of(1, 10, 0.0) == 0.0
    assert chance_of(10**6, 10**6, 0.999) == pytest.approx(0.0, abs=1e-300)
    assert chance_of(0, 0, 0.5) == 1.0


def test_intervals_of_rates_and_their_difference() -> None:
    assert wilson(0, 0, 1.96) == (0.0, 1.0)
    assert wilson(81, 263, 1.96) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert difference(56, 70, 48, 80, 1.96) == pytest.approx((0.0524, 0.3339), abs=1e-4)  # Newcombe 1998 II, table II


def test_latencies_are_told_to_an_eighth() -> None:
    tally = Tally()
    for ms in (1.0,) * 60 + (7.0,) * 40:
        tally.computed(ms / 1e3)
    found = tally.seen()
    assert found.quantile_ms(0.5) == pytest.approx(1.0, rel=0.13)
    assert found.quantile_ms(0.99) == pytest.approx(7.0, rel=0.13)
    assert found.slower_than(1.3) == (40, 100)
    assert found.slower_than(8.0) == (0, 100)
    assert Seen().quantile_ms(0.5) == 0.0
    assert found.plus(found).slower_than(1.3) == (80, 200)
    assert Seen.model_validate_json(found.model_dump_json()) == found


def test_a_configured_limit_drops_none_of_the_others() -> None:
    assert UpdateSettings.model_validate({"trial": {"soak_s": 5}}).trial == Terms(
        soak_s=5, max_error_rate=0.02, max_latency_ratio=3
    )
