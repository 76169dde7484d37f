"""Matrix products against ONNX Runtime: constant weights, two activations, transposed operands."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler.schedules.matmul import pack_matrix
from compiler.schedules.tiles import Tile
from tests.compiler.schedules.onnx_graphs import check, graph, node, random


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rows=st.integers(1, 40), depth=st.integers(1, 70), channels=st.integers(1, 70))
def test_a_dense_layer_agrees_at_any_size(rows: int, depth: int, channels: int) -> None:
    model = graph(
        [node("MatMul", ["x", "w"], "m"), node("Add", ["m", "b"], "a"), node("Relu", ["a"])],
        {"x": ("float32", (rows, depth))},
        {"w": random(depth, channels), "b": random(channels, seed=1)},
    )

    assert "matmul" in check(model, {"x": random(rows, depth, seed=2)}).rules.values()


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("length", "width"), [(13, 5), (32, 16)])
def test_products_of_activations_agree_with_transposed_operands(transposed: bool, length: int, width: int) -> None:
    last = {"perm": (0, 2, 3, 1)} if transposed else {"perm": (0, 2, 1, 3)}
    second = (1, length, 3, width) if transposed else (1, width, 3, length)
    model = graph(
        [
            node("Transpose", ["x"], "l", perm=(0, 2, 1, 3)),
            node("Transpose", ["z"], "r", **last),
            node("MatMul", ["l", "r"], "m"),
            node("Transpose", ["m"], perm=(0, 2, 1, 3)),
        ],
        {"x": ("float32", (1, length, 3, width)), "z": ("float32", second)},
        {},
    )

    report = check(model, {"x": random(1, length, 3, width), "z": random(*second, seed=1)})

    assert list(report.rules.values()) == ["matmul"]  # no transposition is left


@pytest.mark.slow
def test_batch_axes_are_broadcast() -> None:
    model = graph(
        [node("MatMul", ["x", "z"])],
        {"x": ("float32", (2, 1, 5, 9)), "z": ("float32", (3, 9, 11))},
        {},
    )

    check(model, {"x": random(2, 1, 5, 9), "z": random(3, 9, 11, seed=1)})


@pytest.mark.slow
def test_a_product_that_others_read_too_is_kept_as_it_is() -> None:
    model = graph(
        [
            node("MatMul", ["x", "z"], "m"),
            node("Transpose", ["m"], "t", perm=(0, 2, 1)),
            node("Add", ["m", "t"]),
        ],
        {"x": ("float32", (2, 6, 9)), "z": ("float32", (2, 9, 6))},
        {},
    )

    check(model, {"x": random(2, 6, 9), "z": random(2, 9, 6, seed=1)})


def test_a_packed_matrix_is_the_matrix_block_by_block() -> None:
    weights = random(3, 6)

    packed = pack_matrix(weights, Tile(rows=1, columns=1, vectors=1, lanes=4))

    restored = packed.transpose(1, 0, 2).reshape(3, 8)
    assert np.array_equal(restored[:, :6], weights)
    assert not restored[:, 6:].any()
