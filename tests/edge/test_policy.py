"""Decisions: properties that hold for all scores and thresholds."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.policy import Decision, decide
from isthmus.errors import InputError
from isthmus.policies import Case
from isthmus.policies.threshold import Threshold
from tests.edge.bundles import calibration

POINT = calibration(1).variants["onnxruntime-fp32"]
THRESHOLD = st.floats(0, 2)


def decided(score: float, threshold: float, wanted: str | None = None) -> Decision:
    return decide(Case(score), Threshold(point=POINT, chance=random.Random(0), at=threshold), wanted)


@given(st.floats(0, 1), THRESHOLD, THRESHOLD)
def test_a_higher_threshold_never_escalates_less(score: float, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert decided(score, low).escalate <= decided(score, high).escalate


@given(st.floats(0, 1), st.floats(0, 1), THRESHOLD)
def test_a_higher_score_never_escalates_more(one: float, other: float, threshold: float) -> None:
    low, high = sorted((one, other))
    assert decided(low, threshold).escalate >= decided(high, threshold).escalate


@given(st.floats(0, 1), THRESHOLD)
def test_reason_says_what_decided(score: float, threshold: float) -> None:
    decision = decided(score, threshold)
    assert decision.reason == ("uncertain" if decision.escalate else "confident")


def test_answer_without_a_score_escalates_whatever_the_threshold() -> None:
    assert decided(math.nan, 0.0) == Decision(escalate=True, reason="not-finite")


@given(st.one_of(st.floats(0, 1), st.just(math.nan)), THRESHOLD)
def test_the_callers_wish_wins(score: float, threshold: float) -> None:
    assert decided(score, threshold, "cloud").escalate
    assert not decided(score, threshold, "edge").escalate
    with pytest.raises(InputError, match="expected 'edge' or 'cloud'"):
        decided(score, threshold, "split")


def test_requests_that_others_decided_about_are_not_shown_to_the_policy() -> None:
    class Counting:
        threshold = 0.5
        seen = 0

        def escalates(self, case: Case) -> bool:
            self.seen += 1
            return False

    policy = Counting()
    decide(Case(0.1), policy, "edge")
    decide(Case(math.nan), policy)
    decide(Case(0.1), policy)

    assert policy.seen == 1
