"""OpenVINO: what it stores, what it says about models that it cannot take, and what devices compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import TensorProto, helper

from compiler.capture import CapturedModel, capture
from compiler.grid import PreviousGrid
from compiler.targets import BuildOptions, UnsupportedModelError
from compiler.targets.openvino import OpenVinoTarget
from edge.runtimes import open_runtime
from isthmus.bundle import BFLOAT16
from isthmus.errors import ConfigError, InputError
from isthmus.machine import computes_bfloat16
from tests.compiler import models
from tests.compiler.targets import nets

NEEDS_BFLOAT16 = pytest.mark.skipif(not computes_bfloat16(), reason="this processor does not compute in bfloat16")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> CapturedModel:
    folder = tmp_path_factory.mktemp("encoder")
    return capture(models.write_encoder(folder / "m.onnx", models.encoder_weights()), folder / "captured.onnx")


def build(model: CapturedModel, folder: Path, precision: str, setting: str = "") -> Path:
    folder.mkdir()
    options = BuildOptions(precision=precision, setting=setting, samples={"tokens": models.tokens(60)})
    return folder / OpenVinoTarget().build(model, folder, options).entry


def weight_types(entry: Path) -> set[str]:
    graph = openvino.Core().read_model(str(entry))
    return {
        op.get_element_type().get_type_name()
        for op in graph.get_ops()
        if op.get_type_name() == "Constant" and np.prod(op.get_output_shape(0)) >= models.WIDTH**2
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "setting", "types"),
    [
        ("fp32", "", {"f32"}),
        ("fp16", "", {"f16"}),
        pytest.param("bf16", "", {"f32"}, marks=NEEDS_BFLOAT16),
        ("int8", "", {"i8"}),
        pytest.param("int8-bf16", "", {"i8"}, marks=NEEDS_BFLOAT16),
        ("int8w", "", {"u8"}),
        ("int4w", "", {"u8"}),  # its axes are too short for groups
    ],
)
def test_weights_are_stored_in_the_precision(
    encoder: CapturedModel, tmp_path: Path, precision: str, setting: str, types: set[str]
) -> None:
    assert weight_types(build(encoder, tmp_path / "out", precision, setting)) == types


@pytest.mark.slow
def test_wide_products_get_four_bits_all_or_half_of_them(tmp_path: Path) -> None:
    model = capture(nets.write_wide(tmp_path / "m.onnx"), tmp_path / "captured.onnx")

    every, half = (
        [
            op.get_element_type().get_type_name()
            for op in openvino.Core().read_model(str(build(model, tmp_path / setting, "int4w", setting))).get_ops()
            if op.get_type_name() == "Constant" and np.prod(op.get_output_shape(0)) == 128 * 128
        ]
        for setting in OpenVinoTarget().settings("int4w")
    )

    assert every == ["i4"] * 4
    assert 0 < half.count("i4") < 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision",
    [pytest.param(name, marks=NEEDS_BFLOAT16 if name in BFLOAT16 else ()) for name in OpenVinoTarget.precisions],
)
def test_a_device_computes_what_the_compiler_verified(encoder: CapturedModel, tmp_path: Path, precision: str) -> None:
    entry = build(encoder, tmp_path / "out", precision)
    inputs = {"tokens": models.tokens(7, seed=5)}
    hint = "bf16" if precision in BFLOAT16 else "f32"
    device = open_runtime("openvino", entry, inference_precision=hint)

    np.testing.assert_allclose(
        device.infer(inputs)["logits"],
        OpenVinoTarget().open(entry, threads=1).infer(inputs)["logits"],
        atol=1e-6,
    )
    device.close()


@pytest.mark.slow
@NEEDS_BFLOAT16
def test_bfloat16_is_another_answer_and_only_where_it_was_asked_for(encoder: CapturedModel, tmp_path: Path) -> None:
    inputs = {"tokens": models.tokens(7, seed=5)}
    answers = {
        precision: OpenVinoTarget()
        .open(build(encoder, tmp_path / precision, precision), threads=1)
        .infer(inputs)["logits"]
        for precision in ("fp32", "bf16")
    }

    far = np.abs(answers["bf16"] - answers["fp32"]).max() / np.ptp(answers["fp32"])
    assert 1e-4 < far < 0.05  # fp32 is within 1e-5 of the source (tests/compiler/test_targets.py)


def test_a_processor_without_bfloat16_neither_builds_nor_opens_it(
    encoder: CapturedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compiler.targets.openvino.computes_bfloat16", lambda: False)
    monkeypatch.setattr("edge.runtimes.openvino.computes_bfloat16", lambda: False)

    with pytest.raises(InputError, match="does not compute in bfloat16") as caught:
        build(encoder, tmp_path / "out", "int8-bf16")
    assert "leave the variant out" in caught.value.hint
    with pytest.raises(ConfigError, match="verified in bfloat16"):
        open_runtime("openvino", build(encoder, tmp_path / "fp32", "fp32"), inference_precision="bf16")


@pytest.mark.slow
def test_lengths_numbers_and_int32_reach_the_device(tmp_path: Path) -> None:
    model = capture(nets.write_scaled(tmp_path / "m.onnx"), tmp_path / "captured.onnx")
    (tmp_path / "out").mkdir()
    entry = tmp_path / "out" / OpenVinoTarget().build(model, tmp_path / "out", BuildOptions()).entry
    device = open_runtime("openvino", entry)
    session = onnxruntime.InferenceSession(str(model.path))

    for length in (1, 4, 11):
        inputs = {"sequence": nets.scaled_samples(3, length)["sequence"], "scale": np.array(2, np.int32)}
        np.testing.assert_allclose(device.infer(inputs)["logits"], session.run(None, inputs)[0], atol=1e-5)
    device.close()


def test_an_operator_that_it_lacks_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Det", ["matrices"], ["determinants"], name="volume"),
        helper.make_node("Unsqueeze", ["determinants", "axis"], ["logits"], name="column"),
    ]
    path = nets.write(
        tmp_path / "m.onnx",
        nodes,
        {"matrices": (TensorProto.FLOAT, ["batch", 3, 3])},
        {"axis": np.array([1], np.int64)},
        ("batch", 1),
    )
    model = capture(path, tmp_path / "captured.onnx")

    with pytest.raises(UnsupportedModelError, match="cannot convert Det 'volume'") as caught:
        OpenVinoTarget().build(model, tmp_path, BuildOptions())

    assert "onnxruntime" in caught.value.hint


@pytest.mark.slow
def test_a_number_of_another_kind_is_refused(tmp_path: Path) -> None:
    model = capture(nets.write_scaled(tmp_path / "m.onnx"), tmp_path / "captured.onnx")
    (tmp_path / "out").mkdir()
    runner = OpenVinoTarget().open(
        tmp_path / "out" / OpenVinoTarget().build(model, tmp_path / "out", BuildOptions()).entry, threads=1
    )
    samples = nets.scaled_samples(2)

    with pytest.raises(InputError, match="'scale' must be"):
        runner.infer({"sequence": samples["sequence"], "scale": np.array(2, np.int64)})


@pytest.mark.slow
def test_a_gentler_setting_makes_a_grid_of_its_own(encoder: CapturedModel, tmp_path: Path) -> None:
    options = BuildOptions(precision="int8", samples={"tokens": models.tokens(60)})
    (tmp_path / "old").mkdir()
    old = tmp_path / "old" / OpenVinoTarget().build(encoder, tmp_path / "old", options).entry

    for setting, grid in (("default", "kept"), ("corrected", "new")):
        (tmp_path / setting).mkdir()
        built = OpenVinoTarget().build(
            encoder,
            tmp_path / setting,
            BuildOptions(precision="int8", setting=setting, samples=options.samples, previous=PreviousGrid(old)),
        )
        assert built.grid == grid


def test_the_graph_must_be_one(tmp_path: Path) -> None:
    path = models.write_cnn(tmp_path / "m.onnx")
    model = capture(path, tmp_path / "captured.onnx")
    broken = onnx.load(model.path)
    broken.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(broken, model.path)

    with pytest.raises(UnsupportedModelError, match="NoSuchOperator 'conv'"):
        OpenVinoTarget().build(model, tmp_path, BuildOptions())
