from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compiler.grid import (
    MAX_CLIPPED,
    MAX_NOISE,
    GridError,
    Quantized,
    Regridded,
    TensorGrid,
    outcome,
    regrid_all,
    requantize,
)

Numbers = np.ndarray[Any, Any]
LIMITS = (-127, 127)
SCALE = np.array([[0.01], [0.5]])


def tensor(weights: Numbers, integers: Numbers, scale: Numbers, **more: Any) -> Quantized:
    return Quantized("weights", weights.astype(np.float32), integers, scale, **more)


def drawn(rows: int = 4, columns: int = 300, seed: int = 0) -> tuple[Numbers, Numbers, Numbers]:
    """Return weights with their integers and scales, as a quantizer makes them."""
    weights = np.random.default_rng(seed).normal(0, 0.1, (rows, columns)).astype(np.float32)
    scale = np.abs(weights).max(axis=1, keepdims=True).astype(np.float64) / 127
    return weights, np.rint(weights / scale).astype(np.int8), scale


@given(arrays(np.int8, (2, 6), elements=st.integers(-127, 127)))
def test_integers_survive_their_own_weights(old: Numbers) -> None:
    found = tensor(old * SCALE, old, SCALE).regrid()

    assert found.integers.dtype == np.int8
    np.testing.assert_array_equal(found.integers, old)
    np.testing.assert_array_equal(found.scale, SCALE)
    assert (found.tensor.kept, found.tensor.channels, found.tensor.clipped) == (2, 2, 0.0)


@given(arrays(np.float32, (2, 6), elements=st.floats(-100, 100, width=32)))
def test_the_nearest_step_is_taken_and_what_does_not_fit_is_clipped(weights: Numbers) -> None:
    integers, outside = requantize(weights, np.zeros((2, 6), np.int8), SCALE, None, LIMITS)

    steps = np.clip(weights.astype(np.float64) / SCALE, -127, 127)
    assert (np.abs(integers - steps) <= 0.5 + 1e-3).all()
    np.testing.assert_array_equal(outside, np.abs(weights / SCALE) > 127.5 + 1e-3)


def test_a_zero_point_moves_the_grid() -> None:
    old = np.array([[10, 200]], np.uint8)

    integers, outside = requantize(np.array([[0.1, 2.0]]), old, np.array([[0.1]]), np.array([[9.0]]), (0, 255))

    assert integers.tolist() == [[10, 29]]
    assert not outside.any()


def test_a_tie_keeps_the_old_step() -> None:
    old = np.array([[3, 4]], np.int8)

    assert requantize(np.array([[3.5, 3.5]]), old, np.array([[1.0]]), None, LIMITS)[0].tolist() == [[3, 4]]


@given(
    arrays(np.float32, (3, 20), elements=st.floats(-10, 10, width=32)),
    arrays(np.int8, (3, 20), elements=st.integers(-127, 127)),
    arrays(np.float64, (3, 1), elements=st.floats(2**-10, 1)),
)
def test_no_channel_is_much_worse_than_on_a_scale_of_its_own(weights: Numbers, old: Numbers, scale: Numbers) -> None:
    subject = tensor(weights, old, scale)
    found, own = subject.regrid(), subject.regrid(anew=True)

    def harm(regridded: Regridded) -> Numbers:
        errors: Numbers = np.square(regridded.integers * regridded.scale - subject.weights).sum(axis=1)
        return errors

    exact = np.square(own.scale[:, 0] * 0.01) * weights.shape[1]
    allowed = np.maximum(MAX_NOISE * harm(own), 0.01 * np.median(harm(own))) + exact
    assert (harm(found) <= allowed * (1 + 1e-9)).all()
    assert found.tensor.clipped <= MAX_CLIPPED


def test_a_channel_that_was_rescaled_keeps_its_integers() -> None:
    weights, old, scale = drawn()
    weights[1] *= np.float32(1.4)

    found = tensor(weights, old, scale).regrid()

    np.testing.assert_array_equal(found.integers, old)
    assert found.tensor.kept == 3
    assert found.scale[1, 0] == pytest.approx(1.4 * scale[1, 0], rel=1e-3)
    assert found.scale[[0, 2, 3]].tolist() == scale[[0, 2, 3]].tolist()


def test_a_channel_that_was_rescaled_and_trained_moves() -> None:
    weights, old, scale = drawn()
    weights[1] *= np.float32(1.4)
    weights[1, np.abs(weights[1]).argmax()] *= np.float32(0.9)  # its own scale would turn every integer up

    found = tensor(weights, old, scale).regrid()

    assert (found.tensor.kept, found.tensor.moved) == (3, 1)
    assert (found.integers != old).sum() <= 3


def test_a_channel_with_new_extremes_gets_a_scale_of_its_own() -> None:
    weights, old, scale = drawn()
    weights[2, :2] *= np.float32(20)

    found = tensor(weights, old, scale).regrid()

    assert (found.tensor.kept, found.tensor.moved, found.tensor.channels) == (3, 0, 4)
    assert np.abs(found.integers[2]).max() == 127
    assert found.tensor.clipped == 0.0


def test_room_that_the_version_before_left_is_left_again() -> None:
    weights, _, scale = drawn()
    roomy = np.rint(weights / (scale * 2)).astype(np.int8)

    found = tensor(weights * np.float32(1.001), roomy, scale * 2).regrid()

    assert found.tensor.kept == 4
    assert found.tensor.noise == pytest.approx(1.0, abs=0.1)


def test_what_other_tensors_ask_for_is_kept_to() -> None:
    weights, old, scale = drawn()
    least = scale.copy()
    least[0] *= 3

    found = tensor(weights, old, scale, least_scale=least).regrid()

    assert (found.scale >= least * (1 - 1e-6)).all()
    assert found.tensor.kept == 3


def test_a_dead_channel_may_stay_dead_but_not_wake_on_an_old_scale() -> None:
    old, scale = np.zeros((1, 4), np.int8), np.array([[0.0]])

    assert tensor(np.zeros((1, 4)), old, scale).regrid().tensor.kept == 1
    woken = tensor(np.ones((1, 4)), old, scale).regrid()
    assert woken.tensor.kept == 0
    np.testing.assert_allclose(woken.integers * woken.scale, 1.0, rtol=1e-6)


def test_dust_in_a_dead_channel_changes_nothing() -> None:
    weights, old, scale = drawn()
    weights[0], old[0] = np.float32(1e-9), 0

    found = tensor(weights, old, scale).regrid()

    np.testing.assert_array_equal(found.integers, old)
    np.testing.assert_array_equal(found.scale, scale)


def test_scales_may_lie_along_any_axis() -> None:
    weights, old, scale = drawn()
    weights[1] *= np.float32(1.4)
    weights[2, 0] *= np.float32(20)
    upright = tensor(weights, old, scale).regrid()

    lying = tensor(weights.T, old.T, scale.T).regrid()

    np.testing.assert_array_equal(lying.integers, upright.integers.T)
    np.testing.assert_array_equal(lying.scale, upright.scale.T)


def test_large_tensors_come_out_as_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, old, scale = drawn(rows=40)
    weights = weights * np.linspace(0.9, 1.1, 40, dtype=np.float32)[:, None]
    whole = tensor(weights, old, scale).regrid()

    monkeypatch.setattr("compiler.grid._BLOCK", 700)
    parts = tensor(weights, old, scale).regrid()

    np.testing.assert_array_equal(parts.integers, whole.integers)
    assert parts.tensor == whole.tensor


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_refused(value: float) -> None:
    with pytest.raises(GridError, match="not numbers"):
        tensor(np.array([[value]]), np.zeros((1, 1), np.int8), np.array([[1.0]])).regrid()


@pytest.mark.parametrize("value", [np.nan, -1.0])
def test_scales_that_are_not_numbers_are_refused(value: float) -> None:
    with pytest.raises(GridError, match="scales of the version before"):
        tensor(np.ones((1, 1)), np.zeros((1, 1), np.int8), np.array([[value]])).regrid()


def test_other_widths_are_refused() -> None:
    with pytest.raises(GridError, match="int16, expected 8-bit"):
        tensor(np.ones((1, 1)), np.zeros((1, 1), np.int16), np.array([[1.0]])).regrid()


def test_beyond_the_share_the_most_damaged_give_up_their_grid() -> None:
    weights, old, scale = drawn()
    tensors = {
        name: Quantized(name, (weights * (1 + np.float32(damage) * np.sign(weights))), old, scale)
        for name, damage in (("little", 0.001), ("none", 0.0), ("much", 0.05), ("more", 0.03))
    }

    found = regrid_all(tensors, 0.5)

    anew = {name for name, entry in found.items() if entry.tensor.kept + entry.tensor.moved == 0}
    unforced = {name: entry.tensor.noise for name, entry in regrid_all(tensors, 1.0).items()}
    assert anew == set(sorted(unforced, key=lambda name: unforced[name])[2:])
    assert "none" not in anew


def test_the_outcome_says_how_much_was_kept() -> None:
    assert outcome([TensorGrid("a", 3, 2, 1), TensorGrid("b", 1, 1)]) == "kept"
    assert outcome([TensorGrid("a", 3, 2), TensorGrid("b", 1, 1)]) == "part"
    assert outcome([TensorGrid("a", 3, 0)]) == "new"
