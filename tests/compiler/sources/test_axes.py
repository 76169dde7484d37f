"""Names and lengths of axes, through `capture`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from compiler.capture import CapturedModel, capture
from compiler.sources import SourceOptions
from compiler.sources.axes import Lengths
from isthmus.errors import InputError
from tests.compiler.sources import graphs


def captured(tmp_path: Path, model: object, lengths: Lengths | None = None) -> CapturedModel:
    source = graphs.write(tmp_path / "m.onnx", model)
    return capture(source, tmp_path / "out.onnx", SourceOptions(lengths=lengths or {}))


def two_inputs(first: graphs.Shape, second: graphs.Shape, output: graphs.Shape) -> object:
    """Sum over the last axis of two tensors, side by side."""
    nodes = [
        graphs.node("ReduceSum", ["a", "last"], ["p"], keepdims=1),
        graphs.node("ReduceSum", ["b", "last"], ["q"], keepdims=1),
        graphs.node("Concat", ["p", "q"], ["y"], axis=1),
    ]
    ends = [graphs.value("a", first), graphs.value("b", second)], [graphs.value("y", output)]
    return graphs.graph(nodes, *ends, weights={"last": np.array([1])})


def test_the_batch_is_called_batch_in_every_tensor(tmp_path: Path) -> None:
    model = captured(tmp_path, two_inputs(["N", "T"], ["N", "T"], ["N", 2]))

    assert model.axes == {"a": ("batch", "T"), "b": ("batch", "T"), "y": ("batch", "")}
    written = onnx.load(model.path)
    assert [dim.dim_param for dim in written.graph.input[0].type.tensor_type.shape.dim] == ["batch", "T"]
    assert [spec.shape for spec in model.outputs] == [(-1, 2)]


def test_names_that_an_exporter_invented_for_each_tensor_are_one_batch(tmp_path: Path) -> None:
    model = captured(tmp_path, two_inputs(["unk__1", 3], ["unk__2", 5], ["unk__3", 2]))

    assert model.axes == {"a": ("batch", ""), "b": ("batch", ""), "y": ("batch", "")}


def test_axes_without_a_name_are_called_after_their_tensor(tmp_path: Path) -> None:
    model = captured(tmp_path, two_inputs([None, None], [None, None], [None, None]))

    assert model.axes == {"a": ("batch", "a_axis_1"), "b": ("batch", "b_axis_1"), "y": ("batch", "")}


def test_a_batch_that_stands_second_is_the_batch(tmp_path: Path) -> None:
    nodes = [graphs.node("Add", ["state", "x"], ["next"])]
    ends = [graphs.value("x", ["batch", 3]), graphs.value("state", [2, "batch", 3])], [graphs.value("next", [None] * 3)]

    model = captured(tmp_path, graphs.graph(nodes, *ends))

    assert model.axes == {"x": ("batch", ""), "state": ("", "batch", ""), "next": ("", "batch", "")}


def test_an_unnamed_axis_that_must_equal_the_batch_is_the_batch(tmp_path: Path) -> None:
    nodes = [
        graphs.node("Gather", ["state", "zero"], ["row"], axis=0),
        graphs.node("Concat", ["x", "row"], ["y"], axis=1),
    ]
    ends = [graphs.value("x", [None, 3]), graphs.value("state", [2, None, 3])], [graphs.value("y", [None, None])]

    model = captured(tmp_path, graphs.graph(nodes, *ends, weights={"zero": np.array(0)}))

    assert model.axes == {"x": ("batch", ""), "state": ("", "batch", ""), "y": ("batch", "")}
    assert model.lengths == {"batch": (1, 64)}


def test_an_output_axis_that_depends_on_an_input_otherwise_has_a_name_of_its_own(tmp_path: Path) -> None:
    nodes = [graphs.node("Concat", ["x", "x"], ["y"], axis=1)]
    model = captured(
        tmp_path, graphs.graph(nodes, [graphs.value("x", ["batch", "T"])], [graphs.value("y", ["batch", "2*T"])])
    )

    assert model.axes == {"x": ("batch", "T"), "y": ("batch", "y_axis_1")}


def test_what_the_file_says_of_an_output_is_not_believed(tmp_path: Path) -> None:
    nodes = [graphs.node("Flatten", ["x"], ["y"], axis=1)]
    model = captured(
        tmp_path, graphs.graph(nodes, [graphs.value("x", ["batch", 2, 3])], [graphs.value("y", ["n", "k", "l"])])
    )

    assert model.axes["y"] == ("batch", "")
    assert model.outputs[0].shape == (-1, 6)


@pytest.mark.parametrize("name", ["a b/c", "1st", "…", "x" * 300])
def test_names_become_identifiers(tmp_path: Path, name: str) -> None:
    model = captured(tmp_path, two_inputs(["batch", name], ["batch", 3], ["batch", 2]))

    assert model.axes["a"][1].isidentifier()
    assert model.axes["a"][1].isascii()
    assert len(model.axes["a"][1]) <= 64


def test_a_length_is_fixed_or_bounded(tmp_path: Path) -> None:
    model = captured(tmp_path, two_inputs(["batch", "T"], ["batch", "U"], ["batch", 2]), {"T": 7, "U": (2, 9)})

    assert model.axes == {"a": ("batch", ""), "b": ("batch", "U"), "y": ("batch", "")}
    assert model.inputs[0].shape == (-1, 7)
    assert model.lengths == {"batch": (1, 64), "U": (2, 9)}
    inputs = {"a": np.ones((2, 7), np.float32), "b": np.ones((2, 3), np.float32)}
    got = onnxruntime.InferenceSession(str(model.path)).run(None, inputs)[0]
    np.testing.assert_array_equal(got, [[7, 3], [7, 3]])


def test_a_batch_can_be_fixed(tmp_path: Path) -> None:
    model = captured(tmp_path, two_inputs(["batch", 3], ["batch", 3], ["batch", 2]), {"batch": 1})

    assert [spec.shape for spec in (*model.inputs, *model.outputs)] == [(1, 3), (1, 3), (1, 2)]
    assert model.lengths == {}


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"sequense": 4}, r"lengths\.sequense: the model has no such axis; those that may vary are batch, sequence"),
        ({"sequence": 0}, r"lengths\.sequence: expected 1 <= shortest <= longest, got 0"),
        ({"sequence": (9, 2)}, r"lengths\.sequence: expected 1 <= shortest <= longest"),
        ({"batch": -1}, r"lengths\.batch"),
    ],
)
def test_a_length_that_cannot_be_is_refused(tmp_path: Path, lengths: Lengths, message: str) -> None:
    with pytest.raises(InputError, match=message):
        captured(tmp_path, two_inputs(["batch", "sequence"], ["batch", 3], ["batch", 2]), lengths)


def test_an_input_without_a_shape_is_refused(tmp_path: Path) -> None:
    model = graphs.graph(
        [graphs.node("Relu", ["x"], ["y"])], [graphs.value("x", ["batch"])], [graphs.value("y", ["batch"])]
    )
    model.graph.input[0].type.tensor_type.ClearField("shape")

    with pytest.raises(InputError, match="input 'x' has no shape"):
        captured(tmp_path, model)


def test_a_scalar_input_stays_a_scalar(tmp_path: Path) -> None:
    nodes = [graphs.node("Mul", ["x", "factor"], ["y"])]
    ends = [graphs.value("x", ["batch", 3]), graphs.value("factor", [])], [graphs.value("y", ["batch", 3])]

    model = captured(tmp_path, graphs.graph(nodes, *ends))

    assert model.inputs[1].shape == ()
    assert model.axes["factor"] == ()


def test_a_dimension_of_minus_one_is_a_free_one(tmp_path: Path) -> None:
    model = graphs.graph(
        [graphs.node("Relu", ["x"], ["y"])], [graphs.value("x", [-1, 3])], [graphs.value("y", [-1, 3])]
    )

    assert captured(tmp_path, model).axes == {"x": ("batch", ""), "y": ("batch", "")}


def test_a_sequence_of_tensors_cannot_be_an_input(tmp_path: Path) -> None:
    nodes = [graphs.node("SequenceAt", ["x", "zero"], ["y"])]
    model = graphs.graph(nodes, [], [graphs.value("y", ["batch"])], weights={"zero": np.array(0)})
    model.graph.input.append(onnx.helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, ["batch"]))

    with pytest.raises(InputError, match="'x': expected a tensor"):
        captured(tmp_path, model)
