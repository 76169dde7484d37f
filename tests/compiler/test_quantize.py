"""The ladders of INT8 settings, of both quantizers, on a model that INT8 ruins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from compiler.capture import CapturedModel, capture
from compiler.quantize import SETTINGS, spread, weighted_operators
from compiler.targets import BuildOptions, Labels, Target
from compiler.targets.onnxruntime import OnnxRuntimeTarget
from compiler.targets.openvino import OpenVinoTarget, convert
from isthmus.errors import InputError
from tests.compiler import models
from tests.compiler.targets import nets

TARGETS = {"openvino": OpenVinoTarget(), "onnxruntime": OnnxRuntimeTarget()}
EVERY_TARGET = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
SAMPLES = {"image": nets.loud_images(40)}
TEST = {"image": nets.loud_images(300, seed=2)}


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> CapturedModel:
    folder = tmp_path_factory.mktemp("loud")
    return capture(nets.write_loud(folder / "m.onnx"), folder / "captured.onnx")


@pytest.fixture(scope="module")
def truth(loud: CapturedModel) -> nets.Array:
    """What the source says, as labels."""
    labels: nets.Array = onnxruntime.InferenceSession(str(loud.path)).run(None, TEST)[0].argmax(axis=1)
    return labels


def agreement(target: Target, model: CapturedModel, folder: Path, options: BuildOptions, truth: nets.Array) -> float:
    folder.mkdir()
    runner = target.open(folder / target.build(model, folder, options).entry, threads=1)
    return float((runner.infer(TEST)["logits"].argmax(axis=1) == truth).mean())


@pytest.mark.slow
@EVERY_TARGET
def test_a_gentler_setting_recovers_what_the_fastest_loses(
    loud: CapturedModel, truth: nets.Array, tmp_path: Path, target: Target
) -> None:
    found = {
        setting: agreement(
            target, loud, tmp_path / setting, BuildOptions(precision="int8", setting=setting, samples=SAMPLES), truth
        )
        for setting in ("default", "ends-kept", "depthwise-kept")
    }

    assert found["default"] < 0.8
    assert found["ends-kept"] > 0.95
    assert found["depthwise-kept"] > 0.95


@pytest.mark.slow
def test_control_takes_operators_back_until_the_accuracy_is_high_enough(
    loud: CapturedModel, truth: nets.Array, tmp_path: Path
) -> None:
    images = nets.loud_images(200, seed=3)
    labels = onnxruntime.InferenceSession(str(loud.path)).run(None, {"image": images})[0].argmax(axis=1)
    options = BuildOptions(
        precision="int8",
        setting="accuracy-control",
        samples=SAMPLES,
        labelled=Labels({"image": images}, labels, "logits"),
        max_accuracy_drop=0.03,
    )

    assert agreement(OpenVinoTarget(), loud, tmp_path / "out", options, truth) > 0.93


def test_control_needs_labels(loud: CapturedModel, tmp_path: Path) -> None:
    options = BuildOptions(precision="int8", setting="accuracy-control", samples=SAMPLES)

    with pytest.raises(InputError, match="needs labelled samples") as caught:
        OpenVinoTarget().build(loud, tmp_path, options)

    assert "'labels'" in caught.value.hint


@EVERY_TARGET
def test_int8_needs_samples(loud: CapturedModel, tmp_path: Path, target: Target) -> None:
    with pytest.raises(InputError, match="needs samples of typical inputs"):
        target.build(loud, tmp_path, BuildOptions(precision="int8"))

    assert not list(tmp_path.iterdir())


@EVERY_TARGET
def test_a_setting_that_would_change_nothing_is_passed_over(tmp_path: Path, target: Target) -> None:
    model = capture(models.write_encoder(tmp_path / "m.onnx", models.encoder_weights()), tmp_path / "captured.onnx")
    options = BuildOptions(precision="int8", setting="depthwise-kept", samples={"tokens": models.tokens(8)})

    with pytest.raises(InputError, match="has no depthwise convolutions"):
        target.build(model, tmp_path / "out", options)


@EVERY_TARGET
def test_the_ladder_starts_with_the_fastest(target: Target) -> None:
    assert target.settings("int8")[: len(SETTINGS)] == SETTINGS
    assert target.settings("fp32") == ("default",)


@pytest.mark.slow
@EVERY_TARGET
def test_samples_need_no_batch_axis(tmp_path: Path, target: Target) -> None:
    model = capture(nets.write_scaled(tmp_path / "m.onnx"), tmp_path / "captured.onnx")
    (tmp_path / "out").mkdir()
    options = BuildOptions(precision="int8", samples=nets.scaled_samples(40, length=1))
    runner = target.open(tmp_path / "out" / target.build(model, tmp_path / "out", options).entry, threads=1)
    session = onnxruntime.InferenceSession(str(model.path))

    for length in (1, 3, 9):
        samples = nets.scaled_samples(1, length)  # OpenVINO gets a mean wrong in rows but the first
        inputs = {"sequence": samples["sequence"], "scale": np.array(2, np.int32)}
        expected = session.run(None, inputs)[0]
        np.testing.assert_allclose(runner.infer(inputs)["logits"], expected, atol=0.1 * np.ptp(expected))


@pytest.mark.parametrize(("count", "limit", "rows"), [(1, 300, [0]), (3, 300, [0, 1, 2]), (10, 3, [0, 4, 9])])
def test_rows_are_spread_evenly(count: int, limit: int, rows: list[int]) -> None:
    assert spread(count, limit) == rows


def test_no_rows_are_refused() -> None:
    with pytest.raises(InputError, match="at least one sample"):
        spread(0)


def test_operators_are_told_apart_by_what_they_weigh(loud: CapturedModel) -> None:
    found = weighted_operators(convert(loud))

    assert [entry.kind for entry in found] == ["convolution", "depthwise", "product"]
    assert len({entry.name for entry in found}) == 3
