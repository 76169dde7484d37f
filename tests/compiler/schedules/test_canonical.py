"""What the canonical form leaves of a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compiler.schedules.canonical import canonicalize, operator
from tests.compiler.schedules.onnx_graphs import check, graph, node, random


def operators(model: Any) -> list[str]:
    from tvm.relax.frontend.onnx import from_onnx

    function = canonicalize(from_onnx(model))["main"]
    return [
        operator(binding.value).removeprefix("relax.") for block in function.body.blocks for binding in block.bindings
    ]


@pytest.mark.slow
def test_reshapes_that_undo_each_other_vanish() -> None:
    model = graph(
        [
            node("Reshape", ["x", "flat"], "a"),
            node("Relu", ["a"], "b"),
            node("Reshape", ["b", "back"], "c"),
            node("Relu", ["c"]),
        ],
        {"x": ("float32", (1, 6, 4))},
        {"flat": np.array([6, 4]), "back": np.array([1, 6, 4])},
    )

    assert operators(model) == ["nn.relu", "nn.relu"]


@pytest.mark.slow
def test_transpositions_that_undo_each_other_vanish_through_an_activation() -> None:
    model = graph(
        [
            node("Transpose", ["x"], "a", perm=(0, 2, 1)),
            node("Sigmoid", ["a"], "b"),
            node("Transpose", ["b"], perm=(0, 2, 1)),
        ],
        {"x": ("float32", (2, 6, 4))},
        {},
    )

    assert operators(model) == ["sigmoid"]


@pytest.mark.slow
def test_a_bias_after_a_reshape_is_added_before_it() -> None:
    model = graph(
        [
            node("MatMul", ["x", "w"], "m"),
            node("Reshape", ["m", "shape"], "r"),
            node("Add", ["r", "b"], "a"),
            node("Div", ["a", "two"]),
        ],
        {"x": ("float32", (6, 4))},
        {"w": random(4, 5), "shape": np.array([1, 6, 5]), "b": random(5, seed=1), "two": np.array(2, np.float32)},
    )

    assert operators(model) == ["matmul", "add", "multiply", "reshape"]
    check(model, {"x": random(6, 4, seed=2)})


@pytest.mark.slow
def test_clip_and_powers_become_cheaper_operators() -> None:
    model = graph(
        [node("Clip", ["x", "low", "high"], "c"), node("Pow", ["c", "two"])],
        {"x": ("float32", (3, 8))},
        {"low": np.array(0, np.float32), "high": np.array(6, np.float32), "two": np.array(2, np.float32)},
    )

    assert operators(model) == ["maximum", "minimum", "multiply"]
    check(model, {"x": 5 * random(3, 8)})
