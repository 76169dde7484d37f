"""Depthwise convolutions, pooling and other reductions against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from compiler.schedules.windows import positions_at_once
from tests.compiler.schedules.onnx_graphs import check, graph, node, random


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "kernel", "strides", "pads", "dilations"),
    [
        (24, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
        (10, (5, 5), (2, 2), (1, 2, 2, 2), (1, 1)),
        (16, (7, 7), (1, 1), (3, 3, 3, 3), (1, 1)),
        (32, (3, 1), (1, 2), (0, 0, 2, 0), (2, 1)),
    ],
)
@pytest.mark.parametrize("activation", ["Relu", None])
def test_a_depthwise_convolution_agrees(
    channels: int,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, ...],
    dilations: tuple[int, int],
    activation: str | None,
) -> None:
    attributes = {"strides": strides, "pads": pads, "dilations": dilations, "group": channels}
    nodes = [node("Conv", ["x", "w"], "c" if activation else "y", **attributes)]
    if activation:
        nodes.append(node(activation, ["c"]))
    model = graph(nodes, {"x": ("float32", (1, channels, 13, 17))}, {"w": random(channels, 1, *kernel)})

    assert "depthwise" in check(model, {"x": random(1, channels, 13, 17, seed=1)}).rules.values()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("MaxPool", {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}),
        ("AveragePool", {"kernel_shape": (2, 3), "strides": (2, 2)}),
        ("GlobalAveragePool", {}),
        ("GlobalMaxPool", {}),
        ("InstanceNormalization", {}),
    ],
)
def test_pooling_between_convolutions_agrees(operator: str, attributes: dict[str, object]) -> None:
    factors = ["s", "o"] if operator == "InstanceNormalization" else []
    model = graph(
        [node("Conv", ["x", "w"], "c"), node(operator, ["c", *factors], "p", **attributes), node("Relu", ["p"])],
        {"x": ("float32", (1, 4, 12, 15))},
        {"w": random(24, 4, 1, 1), "s": random(24, seed=1), "o": random(24, seed=2)},
    )

    check(model, {"x": random(1, 4, 12, 15, seed=3)})


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mean_along_any_axis_agrees(axis: int) -> None:
    model = graph(
        [node("ReduceMean", ["x", "axes"], keepdims=0)],
        {"x": ("float32", (5, 6, 40))},
        {"axes": np.array([axis])},
    )

    check(model, {"x": random(5, 6, 40)})


def test_positions_divide_the_width_where_that_does_not_waste_registers() -> None:
    assert positions_at_once(28, 8) == 7
    assert positions_at_once(13, 8) == 8
    assert positions_at_once(5, 8) == 5
