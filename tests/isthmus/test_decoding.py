from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from isthmus.decoding import Decoding, decode, same_answers


def logits_of(*positions: int, tokens: int = 6) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.eye(tokens, dtype=np.float32)[None, list(positions)]


@pytest.mark.parametrize(
    ("decoding", "expected"), [("ctc", [1, 2, 2, 5, 0, 0, 0, 0]), ("tokens", [1, 1, 2, 2, 2, 5, 0, 0])]
)
def test_sequences_are_packed_to_the_left(decoding: Decoding, expected: list[int]) -> None:
    assert decode(logits_of(1, 1, 0, 2, 2, 0, 2, 5), decoding)[0].tolist() == expected


def test_classes_are_the_largest_logit() -> None:
    assert decode(np.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])).tolist() == [1, 0]


def test_what_is_said_counts_and_not_where_or_in_how_much_room() -> None:
    early, late = decode(logits_of(3, 3, 0, 4, 0, 0), "ctc"), decode(logits_of(0, 0, 3, 4, 4, 4), "ctc")
    assert same_answers(early, late).tolist() == [True]
    assert same_answers(early, np.array([[3, 4]])).tolist() == [True]
    assert same_answers(np.array([[3, 4]]), early).tolist() == [True]
    assert same_answers(early, np.array([[3]])).tolist() == [False]
    assert same_answers(early, np.array([[3, 4, 0, 0, 0, 0, 0, 1]])).tolist() == [False]
    assert same_answers(decode(logits_of(0, 0), "ctc"), np.zeros((1, 3), np.int64)).tolist() == [True]


@given(arrays.arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.integers(0, 3)))
def test_decoding_is_what_a_loop_does(best: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> None:
    def said(row: list[int]) -> list[int]:
        return [token for token, before in zip(row, [0, *row], strict=False) if token and token != before]

    found = decode(np.eye(4)[best], "ctc")
    assert [[token for token in row if token] for row in found.tolist()] == [said(row) for row in best.tolist()]
    assert (np.diff(found == 0, axis=1) >= 0).all()
