"""Constants, chosen outputs, and what is taken out of a file, through `capture`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from compiler.capture import CapturedModel, capture
from compiler.sources import SourceOptions
from isthmus.errors import InputError
from tests.compiler.sources import graphs


def two_outputs() -> Any:
    """y = x * factor, z = y + types; and what only z needs."""
    nodes = [
        graphs.node("Mul", ["x", "factor"], ["y"]),
        graphs.node("Cast", ["types"], ["real"], to=TensorProto.FLOAT),
        graphs.node("Add", ["y", "real"], ["sum"]),
        graphs.node("Mul", ["sum", "scale"], ["z"]),
    ]
    inputs = [
        graphs.value("x", ["batch", "sequence"]),
        graphs.value("factor", []),
        graphs.value("types", ["batch", "sequence"], TensorProto.INT64),
    ]
    outputs = [graphs.value(name, ["batch", "sequence"]) for name in ("y", "z")]
    return graphs.graph(nodes, inputs, outputs, weights={"scale": np.float32(3)})


def captured(tmp_path: Path, model: Any, **options: Any) -> CapturedModel:
    return capture(graphs.write(tmp_path / "m.onnx", model), tmp_path / "out.onnx", SourceOptions(**options))


def run(model: CapturedModel, **inputs: Any) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(str(model.path))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def test_a_constant_is_no_input_any_more(tmp_path: Path) -> None:
    model = captured(tmp_path, two_outputs(), constants={"factor": 2, "types": 1})

    assert [spec.name for spec in model.inputs] == ["x"]
    got = run(model, x=np.array([[1, 2], [3, 4]], np.float32))
    np.testing.assert_array_equal(got["y"], [[2, 4], [6, 8]])
    np.testing.assert_array_equal(got["z"], [[9, 15], [21, 27]])


def test_outputs_come_in_the_order_that_was_asked_for(tmp_path: Path) -> None:
    model = captured(tmp_path, two_outputs(), outputs=("z", "y"))

    assert [spec.name for spec in model.outputs] == ["z", "y"]


def test_what_no_output_needs_is_left_out(tmp_path: Path) -> None:
    model = captured(tmp_path, two_outputs(), outputs=("y",))

    written = onnx.load(model.path)
    assert [node.op_type for node in written.graph.node] == ["Mul"]
    assert not written.graph.initializer
    assert [spec.name for spec in model.inputs] == ["x", "factor", "types"]  # the interface is not ours to change


def test_a_branch_that_a_constant_decides_is_taken(tmp_path: Path) -> None:
    branches = {
        name: onnx.helper.make_graph(
            [onnx.helper.make_node(operator, ["x"], [f"{name}_y"])], name, [], [graphs.value(f"{name}_y", ["batch", 3])]
        )
        for name, operator in (("then_branch", "Relu"), ("else_branch", "Neg"))
    }
    nodes = [graphs.node("Equal", ["rate", "fast"], ["is_fast"]), graphs.node("If", ["is_fast"], ["y"], **branches)]
    inputs = [graphs.value("x", ["batch", 3]), graphs.value("rate", [], TensorProto.INT64)]
    model = graphs.graph(nodes, inputs, [graphs.value("y", ["batch", 3])], weights={"fast": np.array(16000)})

    fast = captured(tmp_path, model, constants={"rate": 16000})

    written = onnx.load(fast.path)
    assert [node.op_type for node in written.graph.node] == ["Relu"]
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", 17)]
    data = fast.path.read_bytes()
    assert captured(tmp_path, model, constants={"rate": 16000}).path.read_bytes() == data
    slow = captured(tmp_path, model, constants={"rate": 8000})
    np.testing.assert_array_equal(run(slow, x=np.array([[1, -2, 3]], np.float32))["y"], [[-1, 2, -3]])


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"outputs": ("zz",)}, "there is no output 'zz'; there are y, z", "did you mean z"),
        ({"outputs": ("y", "y")}, "expected each output once", ""),
        ({"constants": {"factr": 1}}, "there is no input 'factr'; there are x, factor, types", "did you mean factor"),
        ({"constants": {"types": 0.5}}, "constant 'types': expected a value of type int64, got 0.5", ""),
        ({"constants": {"types": 1 << 70}}, "constant 'types'", ""),
        ({"constants": {"x": 1, "factor": 1, "types": 0}}, "at least one input that is not a constant", ""),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        captured(tmp_path, two_outputs(), **options)

    assert hint in caught.value.hint


def test_a_constant_of_unknown_size_is_refused(tmp_path: Path) -> None:
    nodes = [graphs.node("Concat", ["x", "pad"], ["y"], axis=1)]
    ends = (
        [graphs.value("x", ["batch", 2]), graphs.value("pad", ["batch", "padding"])],
        [graphs.value("y", ["batch", None])],
    )

    with pytest.raises(InputError, match="constant 'pad': its size is unknown"):
        captured(tmp_path, graphs.graph(nodes, *ends), constants={"pad": 0})


def test_weights_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    nodes = [graphs.node("Add", ["x", "bias"], ["y"])]
    inputs = [graphs.value("x", ["batch", 3]), graphs.value("bias", [3])]
    model = graphs.graph(nodes, inputs, [graphs.value("y", ["batch", 3])], weights={"bias": np.ones(3, np.float32)})

    assert [spec.name for spec in captured(tmp_path, model).inputs] == ["x"]


def test_nothing_of_the_machine_that_exported_it_is_left(tmp_path: Path) -> None:
    first, second = two_outputs(), two_outputs()
    second.doc_string = second.graph.doc_string = second.graph.node[0].doc_string = "/home/somebody/model.py, line 3"
    second.producer_name, second.producer_version, second.model_version = "exporter", "9", 4
    for holder in (second, second.graph, second.graph.node[1], second.graph.input[0], second.graph.initializer[0]):
        holder.metadata_props.add(key="trace", value="/home/somebody/model.py")

    plain = captured(tmp_path, first).path.read_bytes()
    stripped = captured(tmp_path, second).path.read_bytes()

    assert b"somebody" not in stripped
    assert stripped == plain
