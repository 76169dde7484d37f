from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from compiler.capture import capture, check_same_interface
from isthmus.digests import sha256_file
from isthmus.errors import InputError
from tests.compiler import models


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return models.write_encoder(tmp_path / "model.onnx", models.encoder_weights())


def with_external_weights(source: Path, location: str) -> Path:
    model = onnx.load(source)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "words")
    data = tensor.raw_data
    (source.parent / "weights.bin").write_bytes(data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value=str(len(data)))
    source.write_bytes(model.SerializeToString())
    return source


def test_inputs_and_outputs_are_described(source: Path, tmp_path: Path) -> None:
    model = capture(source, tmp_path / "out.onnx")

    assert [(spec.name, spec.datatype, spec.shape) for spec in model.inputs] == [("tokens", "INT64", (-1, 8))]
    assert [(spec.name, spec.datatype, spec.shape) for spec in model.outputs] == [("logits", "FP32", (-1, 3))]
    assert model.attention
    assert model.sha256 == sha256_file(source)
    assert model.axes == {"tokens": ("batch", ""), "logits": ("batch", "")}
    assert model.lengths == {"batch": (1, 64)}


def test_a_convolution_is_no_transformer(tmp_path: Path) -> None:
    assert not capture(models.write_cnn(tmp_path / "cnn.onnx"), tmp_path / "out.onnx").attention


def test_external_weights_are_read_in(source: Path, tmp_path: Path) -> None:
    plain = onnxruntime.InferenceSession(str(source)).run(None, {"tokens": models.tokens(4)})[0]
    digest = sha256_file(source)

    model = capture(with_external_weights(source, "weights.bin"), tmp_path / "out.onnx")
    (tmp_path / "weights.bin").unlink()

    again = onnxruntime.InferenceSession(str(model.path)).run(None, {"tokens": models.tokens(4)})[0]
    np.testing.assert_array_equal(plain, again)
    assert model.sha256 not in (digest, sha256_file(source))  # it covers the weights too


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "", "missing.bin", "link.bin", "."])
def test_external_weights_stay_in_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(b"secret")
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    source = models.write_encoder(folder / "model.onnx", models.encoder_weights())

    with pytest.raises(InputError, match="expected a file in the model's folder"):
        capture(with_external_weights(source, location), tmp_path / "out.onnx")


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"not a model", b"\xff" * 4096])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)

    with pytest.raises(InputError, match=r"model\.onnx: not"):
        capture(path, tmp_path / "out.onnx")


def test_half_a_model_is_refused(source: Path, tmp_path: Path) -> None:
    source.write_bytes(source.read_bytes()[:-500])

    with pytest.raises(InputError, match=r"model\.onnx"):
        capture(source, tmp_path / "out.onnx")


def test_an_operator_without_its_input_is_refused(source: Path, tmp_path: Path) -> None:
    model = onnx.load(source)
    model.graph.node[3].input[0] = "nothing"
    onnx.save(model, source)

    with pytest.raises(InputError, match="not a valid ONNX model"):
        capture(source, tmp_path / "out.onnx")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.onnx"):
        capture(tmp_path / "nowhere.onnx", tmp_path / "out.onnx")


def test_a_fixed_batch_stays_fixed(tmp_path: Path) -> None:
    source = models.write_encoder(tmp_path / "model.onnx", models.encoder_weights(), batch=1)

    model = capture(source, tmp_path / "out.onnx")

    assert [spec.shape for spec in (*model.inputs, *model.outputs)] == [(1, 8), (1, 3)]
    assert model.axes == {"tokens": ("", ""), "logits": ("", "")}
    assert model.lengths == {}


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        (TensorProto.STRING, ["batch"], "no name in the Open Inference Protocol"),
        (TensorProto.BFLOAT16, ["batch"], "no name in the Open Inference Protocol"),
    ],
)
def test_tensors_that_cannot_travel_are_refused(tmp_path: Path, kind: int, shape: list[Any], message: str) -> None:
    ends = [helper.make_tensor_value_info(name, kind, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")

    with pytest.raises(InputError, match=message):
        capture(tmp_path / "m.onnx", tmp_path / "out.onnx")


def test_both_models_must_have_the_same_ends(source: Path, tmp_path: Path) -> None:
    light = capture(source, tmp_path / "a.onnx")
    other = models.write_encoder(tmp_path / "other.onnx", models.encoder_weights(), output="answers")
    heavy = capture(other, tmp_path / "b.onnx")

    check_same_interface(light, light)
    with pytest.raises(InputError, match=r"'answers' is absent in the light model and FP32.* in the heavy one"):
        check_same_interface(light, heavy)
