"""ONNX Runtime: what it stores, what stays free, and what devices compute and refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from compiler.capture import CapturedModel, capture
from compiler.targets import BuildOptions, UnsupportedModelError
from compiler.targets.onnxruntime import OnnxRuntimeTarget
from edge.runtimes import open_runtime
from isthmus.errors import BundleError, InputError
from tests.compiler import models
from tests.compiler.targets import nets


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> CapturedModel:
    folder = tmp_path_factory.mktemp("encoder")
    return capture(models.write_encoder(folder / "m.onnx", models.encoder_weights()), folder / "captured.onnx")


def build(model: CapturedModel, folder: Path, precision: str, setting: str = "") -> Path:
    folder.mkdir()
    options = BuildOptions(precision=precision, setting=setting, samples={"tokens": models.tokens(60)})
    return folder / OnnxRuntimeTarget().build(model, folder, options).entry


@pytest.mark.slow
@pytest.mark.parametrize("precision", OnnxRuntimeTarget.precisions)
def test_a_device_computes_what_the_compiler_verified(encoder: CapturedModel, tmp_path: Path, precision: str) -> None:
    entry = build(encoder, tmp_path / "out", precision)
    inputs = {"tokens": models.tokens(7, seed=5)}
    device = open_runtime("onnxruntime", entry)

    np.testing.assert_array_equal(
        device.infer(inputs)["logits"], OnnxRuntimeTarget().open(entry, threads=1).infer(inputs)["logits"]
    )
    device.close()


@pytest.mark.slow
@pytest.mark.parametrize("precision", OnnxRuntimeTarget.precisions)
def test_free_axes_and_datatypes_stay(encoder: CapturedModel, tmp_path: Path, precision: str) -> None:
    graph = onnx.load(build(encoder, tmp_path / "out", precision)).graph

    for value, source in zip(
        (*graph.input, *graph.output), (*(g := onnx.load(encoder.path).graph).input, *g.output), strict=True
    ):
        assert value.type.tensor_type.elem_type == source.type.tensor_type.elem_type
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_whole_blocks_become_one_operator(encoder: CapturedModel, tmp_path: Path) -> None:
    before = [node.op_type for node in onnx.load(encoder.path).graph.node]
    after = onnx.load(build(encoder, tmp_path / "out", "fp32")).graph

    assert len(after.node) < len(before)
    # Nothing in the layout of one processor: those operators load nowhere else.
    assert not any(node.domain == "com.microsoft.nchwc" for node in after.node)


def test_half_precision_keeps_what_it_cannot_hold(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=(32, nets.CLASSES)).astype(np.float32)
    weights[:, 0] = np.ldexp(weights[:, 0], 20)
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "plain"], ["hidden"], name="plain_product"),
        onnx.helper.make_node("MatMul", ["hidden", "large"], ["logits"], name="large_product"),
    ]
    tensors = {"plain": np.eye(32, dtype=np.float32), "large": np.concatenate([weights] * 3, axis=1)}
    path = nets.write(tmp_path / "m.onnx", nodes, {"x": (TensorProto.FLOAT, ["batch", 32])}, tensors, ("batch", 9))
    entry = build(capture(path, tmp_path / "captured.onnx"), tmp_path / "out", "fp16")

    types = {tensor.name: tensor.data_type for tensor in onnx.load(entry).graph.initializer}

    assert types == {"plain.half": TensorProto.FLOAT16, "large": TensorProto.FLOAT}
    x = np.ones((2, 32), np.float32)
    logits = OnnxRuntimeTarget().open(entry, threads=1).infer({"x": x})["logits"]
    np.testing.assert_allclose(logits, x @ tensors["large"], rtol=1e-4)


@pytest.mark.slow
def test_activations_are_unsigned_and_weights_signed(encoder: CapturedModel, tmp_path: Path) -> None:
    for setting in ("default", "corrected"):
        graph = onnx.load(build(encoder, tmp_path / setting, "int8", setting)).graph
        zero_points = {tensor.name: tensor.data_type for tensor in graph.initializer}
        activations = {zero_points[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}
        weights = {
            zero_points[node.input[0]]
            for node in graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in zero_points
        }
        assert activations == {TensorProto.UINT8}
        assert TensorProto.INT8 in weights


@pytest.mark.slow
def test_packed_weights_need_a_product(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Relu", ["x"], ["logits"], name="only")]
    path = nets.write(tmp_path / "m.onnx", nodes, {"x": (TensorProto.FLOAT, ["batch", 3])}, {}, ("batch", 3))
    model = capture(path, tmp_path / "captured.onnx")

    for precision in ("int8w", "int4w"):
        with pytest.raises(UnsupportedModelError, match=r"has none with constant weights .* Relu 'only'") as caught:
            build(model, tmp_path / precision, precision)
        assert "openvino" in caught.value.hint


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(encoder: CapturedModel, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from compiler.capture import capture;"
        "from compiler.targets import BuildOptions; from compiler.targets.onnxruntime import OnnxRuntimeTarget;"
        "from tests.compiler import models; folder = Path(sys.argv[1]); folder.mkdir();"
        "model = capture(Path(sys.argv[2]), folder / 'captured.onnx');"
        "[(folder / s).mkdir() or OnnxRuntimeTarget().build(model, folder / s, BuildOptions("
        "precision='int8', setting=s, samples={'tokens': models.tokens(60)})) for s in ('default', 'corrected')]"
    )
    for seed in ("1", "2"):
        environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed, "PATH": os.environ["PATH"]}
        command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / seed), str(encoder.path)]
        subprocess.run(command, check=True, env=environment, cwd=Path.cwd(), stdout=subprocess.DEVNULL)

    for setting in ("default", "corrected"):
        first, second = ((tmp_path / seed / setting / "model.onnx").read_bytes() for seed in ("1", "2"))
        assert first == second


def test_lengths_numbers_and_int32_reach_the_device(tmp_path: Path) -> None:
    model = capture(nets.write_scaled(tmp_path / "m.onnx"), tmp_path / "captured.onnx")
    device = open_runtime("onnxruntime", build(model, tmp_path / "out", "fp32"))
    session = onnxruntime.InferenceSession(str(model.path))

    for length in (1, 4, 11):
        inputs = {"sequence": nets.scaled_samples(3, length)["sequence"], "scale": np.array(2, np.int32)}
        np.testing.assert_allclose(device.infer(inputs)["logits"], session.run(None, inputs)[0], atol=1e-5)
    device.close()


def with_weights_at(location: str, path: Path) -> None:
    """Write a model whose weights the file says are elsewhere."""
    nets.write(
        path,
        [onnx.helper.make_node("MatMul", ["x", "weights"], ["logits"], name="product")],
        {"x": (TensorProto.FLOAT, ["batch", 3])},
        {"weights": np.eye(3, dtype=np.float32)},
        ("batch", 3),
    )
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("length", "36")):
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["../secret.bin", "{outside}/secret.bin", "link.bin"])
def test_weights_outside_of_the_variant_are_not_read(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(np.ones((3, 3), np.float32).tobytes())
    folder = tmp_path / "variant"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    with_weights_at(location.format(outside=tmp_path), folder / "model.onnx")

    with pytest.raises(BundleError, match="cannot open"):
        open_runtime("onnxruntime", folder / "model.onnx")
    with pytest.raises(InputError, match="cannot load"):
        OnnxRuntimeTarget().open(folder / "model.onnx", threads=1)


def test_an_operator_of_a_library_is_not_loaded(tmp_path: Path) -> None:
    path = nets.write(
        tmp_path / "model.onnx",
        [onnx.helper.make_node("Evil", ["x"], ["logits"], name="evil", domain="custom")],
        {"x": (TensorProto.FLOAT, ["batch", 3])},
        {},
        ("batch", 3),
    )

    with pytest.raises(BundleError, match="cannot open"):
        open_runtime("onnxruntime", path)
