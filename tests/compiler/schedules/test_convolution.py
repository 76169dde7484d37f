"""Convolutions of awkward sizes against ONNX Runtime."""

from __future__ import annotations

import pytest

from compiler.schedules.convolution import Window, pack_weights
from compiler.schedules.tiles import Tile
from tests.compiler.schedules.onnx_graphs import check, graph, node, random

# input channels, output channels, height, width, kernel, strides, pads, dilations, groups
CASES = {
    "pointwise": (24, 40, 7, 7, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "image": (3, 32, 17, 19, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1),
    "asymmetric padding": (5, 21, 11, 13, (3, 5), (1, 2), (0, 2, 1, 1), (1, 1), 1),
    "dilated": (8, 16, 15, 14, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2), 1),
    "grouped": (12, 18, 9, 10, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3),
    "one channel out": (8, 1, 10, 10, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "one pixel": (16, 10, 1, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "narrow": (16, 32, 23, 3, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "prime width": (6, 20, 4, 29, (1, 3), (1, 1), (0, 1, 0, 1), (1, 1), 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_convolution_with_bias_and_activation_agrees(case: str) -> None:
    inputs, outputs, height, width, kernel, strides, pads, dilations, groups = CASES[case]
    model = graph(
        [
            node("Conv", ["x", "w", "b"], "c", strides=strides, pads=pads, dilations=dilations, group=groups),
            node("HardSwish", ["c"]),
        ],
        {"x": ("float32", (1, inputs, height, width))},
        {"w": random(outputs, inputs // groups, *kernel), "b": random(outputs, seed=1)},
    )

    report = check(model, {"x": random(1, inputs, height, width, seed=2)})

    assert "convolution" in report.rules.values()


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3"])
def test_every_vector_width_gives_the_same_and_a_residual_is_fused(cpu: str) -> None:
    model = graph(
        [
            node("Conv", ["x", "w"], "c", pads=(1, 1, 1, 1)),
            node("Add", ["c", "x"], "s"),
            node("Relu", ["s"], "r"),
            node("Conv", ["r", "w"], pads=(1, 1, 1, 1)),
        ],
        {"x": ("float32", (1, 20, 9, 11))},
        {"w": random(20, 20, 3, 3)},
    )

    report = check(model, {"x": random(1, 20, 9, 11, seed=1)}, cpu=cpu)

    assert sorted(report.rules.values()).count("convolution") == 2


@pytest.mark.slow
def test_a_channel_factor_from_a_pooled_image_is_fused_without_growing_the_code() -> None:
    model = graph(
        [
            node("GlobalAveragePool", ["x"], "p"),
            node("Conv", ["p", "w"], "c"),
            node("Sigmoid", ["c"], "s"),
            node("Mul", ["x", "s"]),
        ],
        {"x": ("float32", (1, 24, 30, 30))},
        {"w": random(24, 24, 1, 1)},
    )

    assert "convolution" in check(model, {"x": random(1, 24, 30, 30, seed=1)}).rules.values()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "attributes"),
    [
        ((2, 2), {"strides": (2, 2)}),
        ((3, 3), {"strides": (2, 2), "pads": (1, 1, 1, 1), "output_padding": (1, 1)}),
        ((4, 3), {"strides": (2, 1), "pads": (1, 0, 1, 2)}),
        ((3, 3), {"strides": (2, 2), "group": 2}),
    ],
)
def test_a_transposed_convolution_agrees(kernel: tuple[int, int], attributes: dict[str, object]) -> None:
    groups = int(str(attributes.get("group", 1)))
    model = graph(
        [
            node("Conv", ["x", "v"], "c"),
            node("ConvTranspose", ["c", "w", "b"], "t", **attributes),
            node("Relu", ["t"]),
        ],
        {"x": ("float32", (1, 4, 5, 7))},
        {"v": random(8, 4, 1, 1), "w": random(8, 10 // groups, *kernel), "b": random(10, seed=1)},
    )

    check(model, {"x": random(1, 4, 5, 7, seed=2)})


@pytest.mark.slow
def test_a_convolution_over_a_series_runs_as_one_over_an_image() -> None:
    model = graph(
        [node("Conv", ["x", "w", "b"], "c", pads=(4, 0), dilations=(2,)), node("Relu", ["c"])],
        {"x": ("float32", (1, 5, 33))},
        {"w": random(12, 5, 3), "b": random(12, seed=1)},
    )

    assert "convolution" in check(model, {"x": random(1, 5, 33, seed=2)}).rules.values()


def test_packed_weights_are_zero_beyond_the_last_channel() -> None:
    weights = random(5, 1, 1, 2)

    packed = pack_weights(weights, 1, Tile(rows=1, columns=4, vectors=1, lanes=4))

    assert packed.shape == (1, 2, 1, 1, 2, 4)
    assert packed[0, 1, 0, 0, 1, 0] == weights[4, 0, 0, 1]
    assert not packed[0, 1, :, :, :, 1:].any()


def test_a_window_says_how_large_the_output_is() -> None:
    assert Window((2, 1), (1, 2), (0, 1, 1, 1), (3, 3)).output(8, 9) == (4, 7)
