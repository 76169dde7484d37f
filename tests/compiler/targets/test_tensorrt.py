"""TensorRT: real engines, built by TensorRT-RTX without a GPU; what cannot be run here is checked as ONNX."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tensorrt_rtx_bindings as trt
from onnx import TensorProto, helper, numpy_helper

from compiler.capture import CapturedModel, capture
from compiler.sources import SourceOptions
from compiler.targets import BuildOptions, Serving, Tuning, UnsupportedModelError, tensorrt
from compiler.targets.tensorrt import TENSORRT_RTX, Library, build_plan
from compiler.targets.tensorrt_graph import typed_graph
from compiler.targets.tensorrt_rtx import CAPABILITIES, TensorRtRtxTarget
from isthmus.digests import sha256_file
from isthmus.errors import InputError
from tests.compiler import models

Array = np.ndarray[Any, Any]
ONE_GPU = replace(TENSORRT_RTX, capabilities=("SM86",))
PRECISIONS = ("fp32", "fp16", "int8")
MALFORMED = int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)


def write_graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[str | int]]],
    outputs: dict[str, list[str | int]],
    weights: dict[str, Array] | None = None,
    opset: int = 17,
) -> Path:
    takes = [helper.make_tensor_value_info(name, datatype, shape) for name, (datatype, shape) in inputs.items()]
    gives = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "tiny", takes, gives, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def write_product(path: Path, weights: Array, opset: int = 17) -> Path:
    node = helper.make_node("MatMul", ["x", "weights"], ["y"], name="product")
    shape: list[str | int] = ["batch", len(weights)]
    return write_graph(
        path, [node], {"x": (TensorProto.FLOAT, shape)}, {"y": ["batch", weights.shape[1]]}, {"weights": weights}, opset
    )


def write_bag(path: Path) -> Path:
    """Write a model with two axes that vary: the mean of as many words as there are."""
    nodes = [
        helper.make_node("Gather", ["words", "tokens"], ["embedded"], name="embed"),
        helper.make_node("ReduceMean", ["embedded"], ["mean"], name="mean", axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "head"], ["logits"], name="head_matmul"),
    ]
    weights = {name: models.encoder_weights()[name] for name in ("words", "head")}
    tokens: list[str | int] = ["batch", "sequence"]
    return write_graph(
        path, nodes, {"tokens": (TensorProto.INT64, tokens)}, {"logits": ["batch", models.CLASSES]}, weights
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> CapturedModel:
    folder = tmp_path_factory.mktemp("encoder")
    return capture(models.write_encoder(folder / "m.onnx", models.encoder_weights()), folder / "captured.onnx")


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> CapturedModel:
    folder = tmp_path_factory.mktemp("cnn")
    return capture(models.write_cnn(folder / "m.onnx"), folder / "captured.onnx")


def images(count: int) -> Array:
    return np.random.default_rng(5).normal(0, 1, (count, 1, 8, 8)).astype(np.float32)


def options(precision: str, samples: dict[str, Array] | None = None, **more: Any) -> BuildOptions:
    return BuildOptions(precision=precision, samples=samples or {"tokens": models.tokens(60)}, max_batch=16, **more)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_says_what_it_takes_and_was_built_for(encoder: CapturedModel, tmp_path: Path, precision: str) -> None:
    built = TensorRtRtxTarget().build(encoder, tmp_path, options(precision, cpu="sm89,sm86"))

    description = json.loads((tmp_path / "model.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.engine", "model.json"]
    assert built.entry == "model.engine"
    assert description["inputs"] == [{"name": "tokens", "datatype": "INT64", "shape": [-1, models.TOKENS]}]
    assert description["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, models.CLASSES]}]
    assert description["profile"]["tokens"] == {"least": [1, 8], "usual": [1, 8], "most": [16, 8]}
    assert (description["compute_capabilities"], description["precision"]) == (["sm86", "sm89"], precision)
    assert (description["library"], description["version"]) == ("TensorRT-RTX", trt.__version__)
    assert description["layers"] >= 20


@pytest.mark.slow
def test_tensorrt_itself_knows_the_engine_for_one(cnn: CapturedModel, tmp_path: Path) -> None:
    TensorRtRtxTarget().build(cnn, tmp_path, options("fp32", cpu="sm86"))
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))

    _, wrong = runtime.get_engine_validity((tmp_path / "model.engine").read_bytes())
    _, wrong_with_garbage = runtime.get_engine_validity(b"no engine" * 100)

    assert not wrong & MALFORMED
    assert wrong_with_garbage & MALFORMED


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_two_builds_give_the_same_bytes(cnn: CapturedModel, tmp_path: Path, precision: str) -> None:
    digests, excuses = [], []
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        built = TensorRtRtxTarget().build(cnn, tmp_path / run, options(precision, {"image": images(40)}))
        excuses.append(built.not_reproducible)
        digests.append([sha256_file(tmp_path / run / name) for name in ("model.engine", "model.json")])

    assert digests[0] == digests[1] or all("addresses in memory" in excuse for excuse in excuses)
    assert json.loads((tmp_path / "first" / "model.json").read_text())["compute_capabilities"] == [
        name.lower() for name in CAPABILITIES
    ]


@pytest.mark.slow
def test_an_int8_engine_admits_that_its_bytes_may_differ(cnn: CapturedModel, tmp_path: Path) -> None:
    """Those of ResNet-18 and NudeNet do: the order of threads decides over names inside."""
    built = TensorRtRtxTarget().build(cnn, tmp_path, options("int8", {"image": images(40)}, cpu="sm86"))

    assert built.not_reproducible


@pytest.mark.slow
def test_every_axis_that_varies_is_in_the_profile(tmp_path: Path) -> None:
    source = write_bag(tmp_path / "m.onnx")
    model = capture(source, tmp_path / "c.onnx", SourceOptions(lengths={"sequence": (2, 12)}))
    wanted = options("fp32", {"tokens": models.tokens(4)}, serving=Serving(preferred_batch=(2, 4)))

    plan = build_plan(ONE_GPU, model, wanted, tmp_path / "plan")

    assert plan.profile == {"tokens": ((1, 2), (4, 8), (16, 12))}
    assert (tmp_path / "plan").stat().st_size > 0


def test_an_axis_of_unknown_lengths_is_refused(tmp_path: Path) -> None:
    model = replace(capture(write_bag(tmp_path / "m.onnx"), tmp_path / "c.onnx"), lengths={})

    with pytest.raises(InputError, match="axis 1 of input 'tokens' may have any length") as raised:
        build_plan(ONE_GPU, model, options("fp32"), tmp_path / "plan")

    assert "recipe" in raised.value.hint


def run(graph: onnx.ModelProto | str, inputs: dict[str, Array]) -> Array:
    source = graph if isinstance(graph, str) else graph.SerializeToString()
    result: Array = onnxruntime.InferenceSession(source).run(None, inputs)[0]
    return result


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_graph_that_is_built_agrees_with_the_source(encoder: CapturedModel, precision: str) -> None:
    inputs = {"tokens": models.tokens(32, seed=11)}

    graph = typed_graph(encoder, options(precision), "TensorRT")

    want, got = run(str(encoder.path), inputs), run(graph, inputs)
    assert got.dtype == np.float32
    assert np.abs(got - want).max() < {"fp16": 0.01, "int8": 0.1}[precision] * np.ptp(want)
    assert np.abs(got - want).max() > 0  # or the precision would not be what it says


def test_int8_is_signed_symmetric_and_per_channel(cnn: CapturedModel) -> None:
    graph = typed_graph(cnn, options("int8", {"image": images(40)}), "TensorRT").graph

    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantized = {node.input[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    shapes = {name: tensors[node.input[1]].shape for name, node in quantized.items()}
    zeros = [tensors[node.input[2]] for node in quantized.values()]
    assert shapes["image"] == ()
    assert sorted(shapes[name] for name in shapes if name in tensors) == [(models.CLASSES,), (4,)]
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert len([node for node in graph.node if node.op_type == "DequantizeLinear"]) == len(quantized) == 4


def test_norms_and_softmax_stay_in_single_precision(encoder: CapturedModel) -> None:
    graph = onnx.shape_inference.infer_shapes(typed_graph(encoder, options("fp16"), "TensorRT")).graph

    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    by_operator = {node.op_type: types[node.input[0]] for node in graph.node if node.input[0] in types}
    assert by_operator["Softmax"] == by_operator["LayerNormalization"] == TensorProto.FLOAT
    assert by_operator["MatMul"] == TensorProto.FLOAT16


def test_int8_works_for_graphs_older_than_per_channel_scales(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(0, 1, (6, 3)).astype(np.float32)
    model = capture(write_product(tmp_path / "m.onnx", weights, opset=11), tmp_path / "c.onnx")
    samples = np.random.default_rng(1).normal(0, 1, (50, 6)).astype(np.float32)

    graph = typed_graph(model, options("int8", {"x": samples}), "TensorRT")

    np.testing.assert_allclose(run(graph, {"x": samples}), samples @ weights, atol=0.15)


def test_int8_needs_samples(encoder: CapturedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="int8 needs samples"):
        build_plan(ONE_GPU, encoder, BuildOptions(precision="int8"), tmp_path / "plan")


def test_int8_of_a_model_without_products_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"], name="relu")
    source = write_graph(tmp_path / "m.onnx", [node], {"x": (TensorProto.FLOAT, ["batch", 4])}, {"y": ["batch", 4]})
    model = capture(source, tmp_path / "c.onnx")

    with pytest.raises(UnsupportedModelError, match="nothing in the model can be quantized"):
        typed_graph(model, options("int8", {"x": np.ones((4, 4), np.float32)}), "TensorRT")


def test_what_is_too_large_for_half_precision_stays_in_single(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["small"], name="small_product"),
        helper.make_node("MatMul", ["small", "second"], ["large"], name="large_product"),
        helper.make_node("MatMul", ["large", "third"], ["y"], name="last_product"),
    ]
    weights = {"first": np.eye(4, dtype=np.float32), "second": np.full((4, 4), 300, np.float32)}
    weights["third"] = np.full((4, 2), 1e-4, np.float32)
    inputs: dict[str, tuple[int, list[str | int]]] = {"x": (TensorProto.FLOAT, ["batch", 4])}
    model = capture(write_graph(tmp_path / "m.onnx", nodes, inputs, {"y": ["batch", 2]}, weights), tmp_path / "c.onnx")
    samples = {"x": np.full((3, 4), 300, np.float32)}

    graph = typed_graph(model, options("fp16", samples), "TensorRT")

    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    assert types == {
        "first": TensorProto.FLOAT16, "second": TensorProto.FLOAT, "third": TensorProto.FLOAT
    }  # fmt: skip
    np.testing.assert_allclose(run(graph, samples), np.full((3, 2), 144.0), rtol=1e-3)


def test_a_precision_that_ruins_the_model_is_refused(tmp_path: Path) -> None:
    lopsided = np.array([[0, 0], [1e4, -1e4]], np.float32)
    model = capture(write_product(tmp_path / "m.onnx", lopsided), tmp_path / "c.onnx")

    with pytest.raises(UnsupportedModelError, match=r"in int8 output 'y' has cosine 0\.000 with the source") as raised:
        typed_graph(model, options("int8", {"x": np.array([[1, 1e-4]] * 3, np.float32)}), "TensorRT")

    assert "precision fp16 or fp32" in raised.value.hint


def test_an_operator_that_tensorrt_lacks_is_named_with_its_node(tmp_path: Path) -> None:
    node = helper.make_node("Det", ["x"], ["y"], name="determinant")
    source = write_graph(tmp_path / "m.onnx", [node], {"x": (TensorProto.FLOAT, ["batch", 3, 3])}, {"y": ["batch"]})
    model = capture(source, tmp_path / "c.onnx")

    with pytest.raises(UnsupportedModelError, match=r"operator Det \(node 'determinant'\): it has no such") as raised:
        build_plan(ONE_GPU, model, options("fp32"), tmp_path / "plan")

    assert "onnxruntime" in raised.value.hint
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "plan"))] == []


def test_an_operator_outside_the_standard_is_named_with_its_node(encoder: CapturedModel, tmp_path: Path) -> None:
    graph = onnx.load(encoder.path)
    graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    graph.graph.node[0].domain = "com.microsoft"
    graph.graph.node[0].op_type = "FastGather"
    onnx.save(graph, tmp_path / "m.onnx")

    with pytest.raises(UnsupportedModelError, match=r"operator com\.microsoft\.FastGather \(node 'embed'\)"):
        typed_graph(replace(encoder, path=tmp_path / "m.onnx"), options("fp32"), "TensorRT")


def write_choice(path: Path, condition: list[onnx.NodeProto]) -> Path:
    """Write a model that doubles x where "chosen" says so, and else negates it."""
    branches: dict[str, Any] = {
        name: helper.make_graph([node], name, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])
        for name, output, node in (
            ("then_branch", "doubled", helper.make_node("Add", ["x", "x"], ["doubled"])),
            ("else_branch", "negated", helper.make_node("Neg", ["x"], ["negated"])),
        )
    }
    nodes = [*condition, helper.make_node("If", ["chosen"], ["y"], name="choose", **branches)]
    weights: dict[str, Array] = {"three": np.array([3]), "last": np.array([1]), "zero": np.zeros((), np.float32)}
    return write_graph(path, nodes, {"x": (TensorProto.FLOAT, ["batch", 3])}, {"y": ["batch", 3]}, weights)


def asks_for_axis(axis: int) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Shape", ["x"], ["shape"], start=axis, end=axis + 1),
        helper.make_node("Equal", ["shape", "three"], ["chosen"]),
    ]


def test_a_branch_that_all_shapes_take_becomes_part_of_the_graph(tmp_path: Path) -> None:
    """The axis is taken out of the whole shape, as exporters write it, so that folding alone leaves the If."""
    condition = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "last"], ["size"]),
        helper.make_node("Equal", ["size", "three"], ["chosen"]),
    ]
    model = capture(write_choice(tmp_path / "m.onnx", condition), tmp_path / "c.onnx")

    graph = typed_graph(model, BuildOptions(max_batch=4), "TensorRT")

    assert "If" in {node.op_type for node in onnx.load(model.path).graph.node}
    assert not {"If", "Neg"} & {node.op_type for node in graph.graph.node}
    x = np.ones((4, 3), np.float32)
    np.testing.assert_array_equal(run(graph, {"x": x}), 2 * x)


@pytest.mark.parametrize("question", ["batch", "values"])
def test_a_branch_that_depends_on_the_request_stays(tmp_path: Path, question: str) -> None:
    values = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["chosen"]),
    ]
    condition = asks_for_axis(0) if question == "batch" else values
    model = capture(write_choice(tmp_path / "m.onnx", condition), tmp_path / "c.onnx")

    graph = typed_graph(model, BuildOptions(max_batch=4), "TensorRT")

    assert "If" in {node.op_type for node in graph.graph.node}
    for x in (np.ones((3, 3), np.float32), -np.ones((2, 3), np.float32)):
        np.testing.assert_array_equal(run(graph, {"x": x}), run(str(model.path), {"x": x}))


@pytest.mark.slow
def test_what_the_builder_refuses_is_named_with_its_node(tmp_path: Path) -> None:
    """Branches of different ranks are fine by ONNX Runtime, and by TensorRT's parser."""
    one, all_of_it = (
        helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])
        for name, node in (
            ("squeezed", helper.make_node("Squeeze", ["x", "one"], ["squeezed"])),
            ("same", helper.make_node("Identity", ["x"], ["same"])),
        )
    )
    nodes = [
        helper.make_node("If", ["flag"], ["some"], name="choose", then_branch=one, else_branch=all_of_it),
        helper.make_node("ReduceSum", ["some"], ["sum"], name="sum", keepdims=0),
        helper.make_node("Mul", ["x", "sum"], ["y"], name="scale"),
    ]
    inputs: dict[str, tuple[int, list[str | int]]] = {
        "x": (TensorProto.FLOAT, ["batch", 1]),
        "flag": (TensorProto.BOOL, []),
    }
    model = capture(
        write_graph(tmp_path / "m.onnx", nodes, inputs, {"y": ["batch", 1]}, {"one": np.array([1])}),
        tmp_path / "c.onnx",
    )

    with pytest.raises(UnsupportedModelError, match=r"cannot build operator If \(node 'choose'\)"):
        build_plan(ONE_GPU, model, options("fp32"), tmp_path / "plan")


@pytest.mark.slow
def test_an_input_that_decides_shapes_needs_samples(tmp_path: Path) -> None:
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], name="reshape")
    inputs: dict[str, tuple[int, list[str | int]]] = {
        "x": (TensorProto.FLOAT, ["batch", 4]),
        "shape": (TensorProto.INT64, [2]),
    }
    model = capture(write_graph(tmp_path / "m.onnx", [node], inputs, {"y": ["rows", "columns"]}), tmp_path / "c.onnx")
    samples: dict[str, Array] = {"x": np.ones((3, 1, 4), np.float32), "shape": np.array([[2, -1], [4, -1], [2, -1]])}

    with pytest.raises(UnsupportedModelError, match="which values input 'shape' can have"):
        build_plan(ONE_GPU, model, BuildOptions(), tmp_path / "plan")
    assert build_plan(ONE_GPU, model, options("fp32", samples), tmp_path / "plan").layers > 0


def test_a_datatype_that_tensorrt_changes_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], name="cast", to=TensorProto.FLOAT)
    source = write_graph(tmp_path / "m.onnx", [node], {"x": (TensorProto.DOUBLE, ["batch", 4])}, {"y": ["batch", 4]})

    with pytest.raises(UnsupportedModelError, match=r"input 'x' would be FP32\[-1, 4\], the model has FP64\[-1, 4\]"):
        build_plan(ONE_GPU, capture(source, tmp_path / "c.onnx"), options("fp32"), tmp_path / "plan")


@pytest.mark.parametrize(
    ("cpu", "message"),
    [("x86-64-v3", "such as 'sm86,sm89', got 'x86-64-v3'"), ("sm52", r"does not build for 'sm52'; it knows .*sm86")],
)
def test_an_unknown_gpu_is_refused(cnn: CapturedModel, tmp_path: Path, cpu: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TensorRtRtxTarget().build(cnn, tmp_path, options("fp32", cpu=cpu))


def test_an_engine_is_not_run_here(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be run here: it needs an NVIDIA GPU with TensorRT-RTX"):
        TensorRtRtxTarget().open(tmp_path / "model.engine", threads=1)


@pytest.mark.slow
def test_measured_times_are_kept_where_tuning_says(cnn: CapturedModel, tmp_path: Path) -> None:
    """TensorRT-RTX times nothing, so that its cache holds nothing; where it goes, and comes from, is the same."""
    timing = replace(ONE_GPU, ahead=False)
    wanted = options("fp32", tuning=Tuning(database=tmp_path / "database"))

    for _ in range(2):
        build_plan(timing, cnn, wanted, tmp_path / "plan")

    assert [path.name for path in (tmp_path / "database").iterdir()] == ["tensorrt.timing"]
    build_plan(ONE_GPU, cnn, options("fp32", tuning=Tuning(database=tmp_path / "none")), tmp_path / "plan")
    assert not (tmp_path / "none").exists()


def test_a_library_that_is_missing_or_broken_is_said_to_be(cnn: CapturedModel, tmp_path: Path) -> None:
    with pytest.raises(ImportError) as raised:
        Library("TensorRT", ("no_such_tensorrt", "no_such_bindings"), ahead=True).require()
    assert raised.value.name == "no_such_tensorrt"
    with pytest.raises(InputError, match=r"Broken failed: AttributeError: .*json.* has no attribute 'ILogger'"):
        build_plan(Library("Broken", ("json",), ahead=True), cnn, options("fp32"), tmp_path / "plan")


def test_a_crash_is_reported_with_the_node_where_it_happened(cnn: CapturedModel, tmp_path: Path) -> None:
    graph = onnx.load(cnn.path)
    end = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
    done = subprocess.run(end, capture_output=True, check=False)

    (tmp_path / "progress").write_text("conv [Conv]\nrelu [Relu]\n")
    reading = tensorrt._crashed(TENSORRT_RTX, graph, tmp_path, done)
    (tmp_path / "progress").write_text("conv [Conv]\nbuilding\n")
    building = tensorrt._crashed(TENSORRT_RTX, graph, tmp_path, done)

    assert isinstance(reading, UnsupportedModelError)
    assert reading.message == ("TensorRT-RTX crashed (SIGSEGV) while it read the model at operator Relu (node 'relu')")
    assert building.message == "TensorRT-RTX crashed (SIGSEGV) while it built the model"
