"""Functions without sums: activations, gathers, concatenations, resizing, transpositions."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compiler.schedules.onnx_graphs import check, graph, node, random


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["Erf", "Exp", "Sigmoid", "Tanh", "HardSwish", "Softplus"])
def test_an_activation_agrees_and_may_be_used_twice(operator: str) -> None:
    model = graph(
        [node(operator, ["x"], "a"), node("Mul", ["a", "a"], "s"), node("Sub", ["s", "a"])],
        {"x": ("float32", (3, 50))},
        {},
    )

    assert set(check(model, {"x": 3 * random(3, 50)}).rules.values()) == {"elementwise"}


@pytest.mark.slow
def test_embeddings_are_gathered() -> None:
    model = graph(
        [node("Gather", ["table", "ids"], "g"), node("Add", ["g", "p"])],
        {"ids": ("int64", (2, 7))},
        {"table": random(30, 24), "p": random(7, 24, seed=1)},
    )

    check(model, {"ids": np.random.default_rng(0).integers(0, 30, (2, 7))})


@pytest.mark.slow
def test_channels_are_split_concatenated_and_enlarged() -> None:
    model = graph(
        [
            node("Conv", ["x", "w"], "c"),
            node("Slice", ["c", "start", "end", "axis"], "half"),
            node("Concat", ["half", "c"], "both", axis=1),
            node("Resize", ["both", "", "scales"], "large", mode="nearest"),
            node("Conv", ["large", "v"]),
        ],
        {"x": ("float32", (1, 3, 6, 5))},
        {
            "w": random(16, 3, 1, 1),
            "v": random(8, 24, 1, 1),
            "start": np.array([8]),
            "end": np.array([16]),
            "axis": np.array([1]),
            "scales": np.array([1, 1, 2, 2], np.float32),
        },
    )

    check(model, {"x": random(1, 3, 6, 5, seed=1)})
