from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compiler.capture import CapturedModel, capture
from compiler.sources import SourceOptions
from compiler.targets import BuildOptions, UnsupportedModelError
from compiler.targets.tvm import TvmTarget
from isthmus.errors import InputError
from isthmus.tensors import Array
from tests.compiler import models

node = helper.make_node
STEPS, WIDTH, HIDDEN = 5, 6, 8


def write(
    folder: Path,
    nodes: list[Any],
    inputs: Mapping[str, list[int | str]],
    outputs: Mapping[str, list[int | str]],
    weights: Mapping[str, Array],
    options: SourceOptions | None = None,
) -> CapturedModel:
    """Capture a graph whose tensors are float32, unless an input's name begins with "index"."""

    def value(name: str, shape: list[int | str]) -> Any:
        kind = TensorProto.INT64 if name.startswith("index") else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        nodes,
        "small",
        [value(name, shape) for name, shape in inputs.items()],
        [value(name, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "source.onnx")
    return capture(folder / "source.onnx", folder / "captured.onnx", options)


def build(model: CapturedModel, folder: Path, **options: Any) -> Path:
    folder.mkdir()
    return folder / TvmTarget().build(model, folder, BuildOptions(**options)).entry


def check_agreement(model: CapturedModel, folder: Path, inputs: Mapping[str, Array]) -> None:
    answers = TvmTarget().open(build(model, folder), threads=1).infer(inputs)
    session = onnxruntime.InferenceSession(str(model.path))
    for output, expected in zip(session.get_outputs(), session.run(None, dict(inputs)), strict=True):
        assert answers[output.name].dtype == expected.dtype
        np.testing.assert_allclose(answers[output.name], expected, atol=1e-5, rtol=1e-4)


def random(*shape: int, seed: int = 0, scale: float = 0.5) -> Array:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


@pytest.mark.slow
def test_two_versions_of_a_model_differ_in_their_weights_alone(tmp_path: Path) -> None:
    weights = models.encoder_weights()
    entries = []
    for name, version in (("old", weights), ("new", models.nudged(weights, 0.01))):
        source = models.write_encoder(tmp_path / f"{name}.onnx", version)
        entries.append(build(capture(source, tmp_path / f"captured-{name}.onnx"), tmp_path / name))

    old, new = ({path.name: path.read_bytes() for path in entry.parent.iterdir()} for entry in entries)

    assert old.keys() == new.keys() == {"model.json", "model.so", "weights.safetensors"}
    assert {name for name in old if old[name] != new[name]} == {"weights.safetensors"}


def recurrent(folder: Path, operator: str, *, hidden: int = HIDDEN, states: bool = False, **options: Any) -> Any:
    """Capture [batch, STEPS, WIDTH] through one recurrent node; `states`: the first ones are inputs."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    directions = 2 if options.get("direction") == "bidirectional" else 1
    weights = {
        "w": random(directions, gates * hidden, WIDTH, seed=1),
        "r": random(directions, gates * hidden, hidden, seed=2),
        "b": random(directions, 2 * gates * hidden, seed=3),
    }
    inputs: dict[str, list[int | str]] = {"x": ["batch", STEPS, WIDTH]}
    wanted: dict[str, list[int | str]] = {"y": [STEPS, directions, "batch", hidden], "h": [directions, "batch", hidden]}
    first = []
    if states:
        inputs["h0"] = [directions, "batch", hidden]
        first = ["", "h0"]
    outputs = ["y", "h"]
    if operator == "LSTM":
        wanted["c"] = [directions, "batch", hidden]
        outputs.append("c")
        if states:
            inputs["c0"] = [directions, "batch", hidden]
            first.append("c0")
    nodes = [
        node("Transpose", ["x"], ["by_step"], perm=[1, 0, 2]),
        node(operator, ["by_step", "w", "r", "b", *first], outputs, name="memory", hidden_size=hidden, **options),
    ]
    return write(folder, nodes, inputs, wanted, weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("LSTM", {}),
        ("LSTM", {"direction": "bidirectional", "hidden": 7}),  # no vector unit has 7 lanes
        ("GRU", {"direction": "bidirectional", "linear_before_reset": 1}),
        ("GRU", {"direction": "reverse"}),
        ("RNN", {}),
    ],
)
def test_recurrent_layers_agree_with_the_source(tmp_path: Path, operator: str, options: dict[str, Any]) -> None:
    model = recurrent(tmp_path / "model", operator, **options)

    check_agreement(model, tmp_path / "out", {"x": random(3, STEPS, WIDTH, seed=4)})


@pytest.mark.slow
def test_states_whose_batch_is_not_the_first_axis_go_in_and_out(tmp_path: Path) -> None:
    model = recurrent(tmp_path / "model", "LSTM", states=True)
    states = {"h0": random(1, 3, HIDDEN, seed=5), "c0": random(1, 3, HIDDEN, seed=6)}

    check_agreement(model, tmp_path / "out", {"x": random(3, STEPS, WIDTH, seed=4)} | states)


@pytest.mark.slow
def test_a_branch_that_shapes_decide_is_taken(tmp_path: Path) -> None:
    def branch(name: str, operator: str) -> Any:
        out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        weight = numpy_helper.from_array(random(4, 4), "factor")  # both branches call theirs so
        return helper.make_graph(
            [node("MatMul", ["x", "factor"], ["inner"]), node(operator, ["inner"], [f"{name}_out"])], name, [], [out],
            [weight],
        )  # fmt: skip

    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "last"], ["columns"]),
        node("Equal", ["columns", "four"], ["is_four"]),
        node("If", ["is_four"], ["chosen"], name="choice", then_branch=branch("yes", "Tanh"),
             else_branch=branch("no", "Relu")),
        node("Identity", ["chosen"], ["y"]),
    ]  # fmt: skip
    weights = {"last": np.array(1), "four": np.array(4)}
    model = write(tmp_path / "model", nodes, {"x": ["batch", 4]}, {"y": ["batch", 4]}, weights)

    check_agreement(model, tmp_path / "out", {"x": random(2, 4)})


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [(2, 2), (3, 2)])
def test_transposed_convolution_agrees_with_the_source(tmp_path: Path, kernel: tuple[int, int]) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["features"], pads=[1, 1, 1, 1]),
        node("ConvTranspose", ["features", "v", "b"], ["y"], strides=list(kernel)),
    ]
    weights = {"w": random(4, 2, 3, 3), "v": random(4, 3, *kernel), "b": random(3)}
    shape: list[int | str] = ["batch", 3, 5 * kernel[0], 6 * kernel[1]]
    model = write(tmp_path / "model", nodes, {"x": ["batch", 2, 5, 6]}, {"y": shape}, weights)

    check_agreement(model, tmp_path / "out", {"x": random(2, 2, 5, 6)})


@pytest.mark.slow
def test_an_index_that_the_model_computes_stays_inside_its_table(tmp_path: Path) -> None:
    nodes = [
        node("Mul", ["x", "large"], ["far"]),
        node("Cast", ["far"], ["rows"], to=TensorProto.INT64),
        node("Gather", ["table", "rows"], ["y"]),
    ]
    table = random(6, 4)
    weights = {"table": table, "large": np.array(1e9, np.float32)}
    model = write(tmp_path / "model", nodes, {"x": ["batch"]}, {"y": ["batch", 4]}, weights)
    runner = TvmTarget().open(build(model, tmp_path / "out"), threads=1)

    answers = runner.infer({"x": np.array([0, 1, -1], np.float32)})["y"]

    np.testing.assert_array_equal(answers, table[[0, 5, 0]])


def test_an_operator_that_tvm_lacks_is_named_with_its_node(tmp_path: Path) -> None:
    nodes = [node("Det", ["x"], ["y"], name="determinant")]
    model = write(tmp_path / "model", nodes, {"x": ["batch", 3, 3]}, {"y": ["batch"]}, {})

    with pytest.raises(UnsupportedModelError, match=r"operator Det \(node 'determinant'\)") as caught:
        build(model, tmp_path / "out")

    assert "openvino or onnxruntime" in caught.value.hint


def test_an_operator_that_tvm_takes_in_part_is_named_with_the_reason(tmp_path: Path) -> None:
    model = recurrent(tmp_path / "model", "LSTM", activations=["Sigmoid", "Relu", "Tanh"])

    with pytest.raises(UnsupportedModelError, match=r"operator LSTM \(node 'memory'\): activations Sigmoid, Relu"):
        build(model, tmp_path / "out")


def test_a_length_that_may_vary_is_to_be_fixed_in_the_recipe(tmp_path: Path) -> None:
    nodes = [node("Tanh", ["x"], ["y"])]
    shape: list[int | str] = ["batch", "sequence"]
    varying = write(tmp_path / "varying", nodes, {"x": shape}, {"y": shape}, {})

    with pytest.raises(UnsupportedModelError, match="'sequence' of input 'x' may vary") as caught:
        build(varying, tmp_path / "out")

    assert "[light.lengths] sequence = 64" in caught.value.hint


@pytest.mark.slow
def test_a_length_that_is_fixed_in_the_recipe_is_compiled_for(tmp_path: Path) -> None:
    nodes = [node("Tanh", ["x"], ["y"])]
    shape: list[int | str] = ["batch", "sequence"]
    model = write(tmp_path / "m", nodes, {"x": shape}, {"y": shape}, {}, SourceOptions(lengths={"sequence": 4}))

    entry = json.loads(build(model, tmp_path / "out").read_text())

    assert [port["shape"] for port in entry["inputs"] + entry["outputs"]] == [[1, 4], [1, 4]]


@pytest.fixture
def tiny(tmp_path: Path) -> CapturedModel:
    nodes = [node("Tanh", ["x"], ["y"])]
    return write(tmp_path / "tiny", nodes, {"x": ["batch", 4]}, {"y": ["batch", 4]}, {})


def test_an_unknown_processor_gets_a_suggestion(tiny: CapturedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no x86_64 processor 'znver44'") as caught:
        build(tiny, tmp_path / "out", cpu="znver44")

    assert "did you mean znver4" in caught.value.hint


def test_an_unknown_platform_lists_the_known_ones(tiny: CapturedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="x86_64, aarch64, not for 'riscv64'"):
        build(tiny, tmp_path / "out", platform="riscv64")


@pytest.mark.parametrize(("platform", "package"), [("x86_64", "g++"), ("aarch64", "g++-aarch64-linux-gnu")])
def test_a_missing_linker_names_the_package(
    tiny: CapturedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, package: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(InputError, match="not installed") as caught:
        build(tiny, tmp_path / "out", platform=platform)

    assert caught.value.hint.endswith(f"apt install {package}")


@pytest.mark.slow
def test_the_processor_decides_which_features_are_needed(tiny: CapturedModel, tmp_path: Path) -> None:
    features = {
        cpu: set(json.loads(build(tiny, tmp_path / cpu, cpu=cpu).read_text())["features"])
        for cpu in ("x86-64", "x86-64-v3", "x86-64-v4")
    }

    assert not features["x86-64"] & {"avx2", "fma"}
    assert {"avx2", "fma"} <= features["x86-64-v3"]
    assert {"avx512f"} <= features["x86-64-v4"] - features["x86-64-v3"]
