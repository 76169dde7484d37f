"""Softmax, norms and sums along rows of any length."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compiler.schedules.onnx_graphs import check, graph, node, random


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 5, 16, 64, 197])
def test_softmax_agrees_at_any_length(length: int) -> None:
    model = graph([node("Softmax", ["x"], axis=-1)], {"x": ("float32", (2, 3, length))}, {})

    report = check(model, {"x": 20 * random(2, 3, length)})

    assert set(report.rules.values()) == {"rows"}


@pytest.mark.slow
def test_a_row_with_everything_but_one_masked_has_that_one() -> None:
    model = graph(
        [node("Add", ["x", "mask"], "a"), node("Softmax", ["a"], axis=-1)],
        {"x": ("float32", (4, 24)), "mask": ("float32", (4, 24))},
        {},
    )
    mask = np.full((4, 24), np.finfo(np.float32).min, np.float32)
    mask[:, 3] = 0

    check(model, {"x": random(4, 24), "mask": mask})


@pytest.mark.slow
@pytest.mark.parametrize("length", [3, 40, 77, 384])
def test_layer_normalization_agrees_far_from_zero(length: int) -> None:
    model = graph(
        [node("LayerNormalization", ["x", "s", "b"], "n", axis=-1, epsilon=1e-6), node("Mul", ["n", "x"])],
        {"x": ("float32", (1, 6, length))},
        {"s": random(length), "b": random(length, seed=1)},
    )

    report = check(model, {"x": random(1, 6, length, seed=2) + 30})

    assert "rows" in report.rules.values()


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["ReduceMean", "ReduceSum", "ReduceMax"])
def test_reductions_of_rows_agree(operator: str) -> None:
    model = graph(
        [node(operator, ["x", "axes"], "r", keepdims=1), node("Sub", ["x", "r"])],
        {"x": ("float32", (3, 5, 83))},
        {"axes": np.array([-1])},
    )

    assert "rows" in check(model, {"x": random(3, 5, 83)}).rules.values()


@pytest.mark.slow
def test_root_mean_square_normalization_as_llama_writes_it_agrees() -> None:
    model = graph(
        [
            node("Pow", ["x", "two"], "p"),
            node("ReduceMean", ["p", "axes"], "m", keepdims=1),
            node("Add", ["m", "epsilon"], "e"),
            node("Sqrt", ["e"], "r"),
            node("Reciprocal", ["r"], "i"),
            node("Mul", ["x", "i"], "n"),
            node("Mul", ["n", "w"]),
        ],
        {"x": ("float32", (1, 7, 48))},
        {
            "two": np.array(2, np.float32),
            "axes": np.array([-1]),
            "epsilon": np.array(1e-6, np.float32),
            "w": random(48),
        },
    )

    check(model, {"x": random(1, 7, 48, seed=1)})
