"""Score and decision: properties that hold for all logits and thresholds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge.policy import decide, score_request, score_rows
from isthmus.errors import InputError
from isthmus.tensors import Array

FINITE = st.floats(-1e4, 1e4, width=32)
LOGITS = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(2, 6)), elements=FINITE)
TEMPERATURE = st.floats(0.05, 20)
THRESHOLD = st.floats(-1, 2)


@given(LOGITS, TEMPERATURE)
def test_scores_are_the_largest_softmax_probabilities(logits: Array, temperature: float) -> None:
    rows = logits.astype(np.float64) / temperature
    exponentials = np.exp(rows - rows.max(axis=1, keepdims=True))
    softmax = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(score_rows(logits, temperature), softmax.max(axis=1), rtol=1e-9)


@given(LOGITS, TEMPERATURE)
def test_request_is_as_sure_as_its_least_sure_row(logits: Array, temperature: float) -> None:
    score = score_request(logits, temperature)
    assert score == pytest.approx(score_rows(logits, temperature).min(), rel=1e-12)
    assert 1 / logits.shape[1] - 1e-9 <= score <= 1


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.sampled_from([2, 5, 40])),
        elements=st.floats(-10, 10, width=32) | st.sampled_from([np.nan, np.inf, -np.inf]),
    )
)
def test_few_numbers_and_many_are_scored_alike(logits: Array) -> None:
    with np.errstate(invalid="ignore"):
        expected = float(score_rows(logits, 1.0).min())
    assert score_request(logits, 1.0) == pytest.approx(expected, rel=1e-12, nan_ok=True)


@given(LOGITS, TEMPERATURE, FINITE)
def test_shifting_all_logits_changes_nothing(logits: Array, temperature: float, shift: float) -> None:
    wide = logits.astype(np.float64)
    np.testing.assert_allclose(
        score_rows(wide, temperature), score_rows(wide + shift, temperature), rtol=1e-6, atol=1e-9
    )


@given(st.floats(0, 1), THRESHOLD, THRESHOLD)
def test_a_higher_threshold_never_escalates_less(score: float, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert decide(score, low).escalate <= decide(score, high).escalate


@given(st.floats(0, 1), st.floats(0, 1), THRESHOLD)
def test_a_higher_score_never_escalates_more(one: float, other: float, threshold: float) -> None:
    low, high = sorted((one, other))
    assert decide(low, threshold).escalate >= decide(high, threshold).escalate


@given(st.floats(0, 1), THRESHOLD)
def test_reason_says_what_decided(score: float, threshold: float) -> None:
    decision = decide(score, threshold)
    assert decision.reason == ("uncertain" if decision.escalate else "confident")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_answer_that_is_not_finite_escalates_whatever_the_threshold(bad: float) -> None:
    logits = np.array([[9.0, 0.0], [bad, 0.0]], dtype=np.float32)
    score = score_request(logits, 1.0)
    assert math.isnan(score)
    assert decide(score, -1.0).escalate
    assert decide(score, -1.0).reason == "not-finite"


@given(st.one_of(st.floats(0, 1), st.just(math.nan)), THRESHOLD)
def test_the_callers_wish_wins(score: float, threshold: float) -> None:
    assert decide(score, threshold, "cloud").escalate
    assert not decide(score, threshold, "edge").escalate
    with pytest.raises(InputError, match="expected 'edge' or 'cloud'"):
        decide(score, threshold, "split")
