"""Versions and operators that are known, and functions inside a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from compiler.capture import capture
from isthmus.errors import InputError
from tests.compiler.sources import graphs

ENDS = [graphs.value("x", ["batch", 4])], [graphs.value("y", ["batch", 4])]


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 21, 24])
def test_opsets_from_11_are_taken_as_they_are(tmp_path: Path, opset: int) -> None:
    model = capture(graphs.relu(tmp_path / "m.onnx", opset=opset), tmp_path / "out.onnx")

    assert onnx.load(model.path).opset_import[0].version == opset


@pytest.mark.parametrize("opset", [7, 10, 27, 1000])
def test_other_opsets_are_refused(tmp_path: Path, opset: int) -> None:
    with pytest.raises(InputError, match=f"expected an opset from 11 to 26, got {opset}") as caught:
        capture(graphs.relu(tmp_path / "m.onnx", opset=opset), tmp_path / "out.onnx")

    assert caught.value.reason == "unsupported-model"


def test_a_newer_ir_version_is_refused(tmp_path: Path) -> None:
    model = onnx.load(graphs.relu(tmp_path / "m.onnx"))
    model.ir_version = 14
    graphs.write(tmp_path / "m.onnx", model)

    with pytest.raises(InputError, match="expected an IR version up to 13, got 14"):
        capture(tmp_path / "m.onnx", tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("node", "message", "hint"),
    [
        (graphs.node("Relo", ["x"], ["y"], name="act"), "node 'act': there is no operator 'Relo' in opset 17", "Relu"),
        (graphs.node("Swish", ["x"], ["y"], name="act"), "node 'act': there is no operator 'Swish'", "newer opset"),
        (graphs.node("Fly", ["x"], ["y"], name="f", domain="my.ops"), "no operator 'my.ops.Fly'", "standard operators"),
        (graphs.node("Fly", ["x"], ["y"], domain="com.microsoft"), "no operator 'com.microsoft.Fly'", "standard"),
        (graphs.node("Fly", ["x"], ["y"], domain="else.where"), "no version is given for the domain 'else.where'", ""),
    ],
)
def test_an_unknown_operator_is_named_with_its_node(tmp_path: Path, node: object, message: str, hint: str) -> None:
    model = graphs.graph([node], *ENDS, domains=[("my.ops", 1), ("com.microsoft", 1)])

    with pytest.raises(InputError, match=message) as caught:
        capture(graphs.write(tmp_path / "m.onnx", model), tmp_path / "out.onnx")

    assert hint in caught.value.hint


def test_operators_of_onnx_runtime_are_known(tmp_path: Path) -> None:
    nodes = [graphs.node("Gelu", ["x"], ["y"], domain="com.microsoft")]
    model = graphs.graph(nodes, *ENDS, domains=[("com.microsoft", 1), ("unused.domain", 3)])

    written = onnx.load(capture(graphs.write(tmp_path / "m.onnx", model), tmp_path / "out.onnx").path)

    assert [entry.domain for entry in written.opset_import] == ["", "com.microsoft"]


def test_functions_become_part_of_the_graph(tmp_path: Path) -> None:
    body = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Add", ["b", "b"], ["c"])]
    twice = helper.make_function("own", "TwiceRelu", ["a"], ["c"], body, [helper.make_opsetid("", 17)])
    nodes = [graphs.node("TwiceRelu", ["x"], ["y"], domain="own")]
    model = graphs.graph(nodes, *ENDS, domains=[("own", 1)], functions=[twice])

    captured = capture(graphs.write(tmp_path / "m.onnx", model), tmp_path / "out.onnx")

    written = onnx.load(captured.path)
    assert [node.op_type for node in written.graph.node] == ["Relu", "Add"]
    assert not written.functions
    got = onnxruntime.InferenceSession(str(captured.path)).run(None, {"x": np.array([[1, -1, 2, 0]], np.float32)})[0]
    np.testing.assert_array_equal(got, [[2, 0, 4, 0]])
