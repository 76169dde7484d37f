"""The heavy model's folder: what Triton reads, and the program that it runs; Triton's side is a small double here."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import json_format, text_format

from compiler.capture import capture
from compiler.targets import BuildOptions, Serving
from compiler.targets.triton_python import TritonPythonTarget
from isthmus.oip import model_config_pb2
from tests.compiler import models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = capture(models.write_encoder(tmp_path / "m.onnx", models.encoder_weights()), tmp_path / "c.onnx")
    target = tmp_path / "heavy"
    target.mkdir()
    TritonPythonTarget().build(
        model, target, BuildOptions(name="tiny", max_batch=16, serving=Serving(instances=2, threads=3))
    )
    return target


def read_config(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_the_folder_is_a_model_of_one_version(folder: Path) -> None:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    assert files == ["1/model.onnx", "1/model.py", "config.pbtxt"]


def test_the_configuration_says_everything(folder: Path) -> None:
    config = read_config(folder)

    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "python", 16)
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("tokens", model_config_pb2.TYPE_INT64, [8])]
    assert [(t.name, t.data_type, list(t.dims)) for t in config.output] == [("logits", model_config_pb2.TYPE_FP32, [3])]
    assert [(g.kind, g.count) for g in config.instance_group] == [(model_config_pb2.ModelInstanceGroup.KIND_CPU, 2)]
    assert config.HasField("dynamic_batching")
    assert config.parameters["threads"].string_value == "3"


@dataclass
class Tensor:
    name: str
    array: Any

    def as_numpy(self) -> Any:
        return self.array


@dataclass
class Request:
    tensors: dict[str, Any]
    wanted: list[str] = field(default_factory=lambda: ["logits"])

    def requested_output_names(self) -> list[str]:
        return self.wanted


@dataclass
class Response:
    output_tensors: list[Tensor]
    error: Any = None


def backend() -> ModuleType:
    """Return what Triton's process offers as triton_python_backend_utils, as far as the program uses it."""
    module = ModuleType("triton_python_backend_utils")
    dtypes = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}
    module.Tensor = Tensor  # type: ignore[attr-defined]
    module.InferenceResponse = Response  # type: ignore[attr-defined]
    module.TritonError = str  # type: ignore[attr-defined]
    module.triton_string_to_numpy = dtypes.__getitem__  # type: ignore[attr-defined]
    module.get_input_tensor_by_name = lambda request, name: Tensor(name, request.tensors[name])  # type: ignore[attr-defined]
    return module


def start(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("heavy_program", folder / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    model = program.TritonPythonModel()
    config = json_format.MessageToDict(read_config(folder), preserving_proto_field_name=True)
    model.initialize({"model_config": json.dumps(config)})
    return model


@pytest.fixture(autouse=True)
def triton_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def answer(response: Response) -> Any:
    assert response.error is None
    (tensor,) = response.output_tensors
    return tensor.array


def test_requests_are_put_together_and_divided_again(folder: Path) -> None:
    model, tokens = start(folder), models.tokens(6)

    parts = [Request({"tokens": tokens[:1]}), Request({"tokens": tokens[1:4]}), Request({"tokens": tokens[4:]})]
    responses = model.execute(parts)

    (whole,) = model.execute([Request({"tokens": tokens})])
    np.testing.assert_allclose(np.concatenate([answer(r) for r in responses]), answer(whole), atol=1e-5)
    assert [len(answer(r)) for r in responses] == [1, 3, 2]


def test_a_bad_request_fails_alone(folder: Path) -> None:
    model, tokens = start(folder), models.tokens(2)
    outside = np.full((1, models.TOKENS), models.WORDS + 5)

    good, bad, missing = model.execute([Request({"tokens": tokens}), Request({"tokens": outside}), Request({})])

    assert len(answer(good)) == 2
    assert "the model failed" in bad.error
    assert missing.error
    assert bad.output_tensors == []


def replace_model(folder: Path, **changes: Any) -> None:
    path = folder / "1" / "model.onnx"
    models.write_encoder(path, models.encoder_weights() | changes)


def test_values_that_are_not_finite_are_an_error(folder: Path) -> None:
    words = models.encoder_weights()["words"]
    words[5] = np.nan
    replace_model(folder, words=words)
    fine, poisoned = np.zeros((1, models.TOKENS), np.int64), np.full((1, models.TOKENS), 5)

    good, bad = start(folder).execute([Request({"tokens": fine}), Request({"tokens": poisoned})])

    assert np.isfinite(answer(good)).all()
    assert "not finite" in bad.error


def test_an_output_of_another_shape_is_an_error(folder: Path) -> None:
    path = folder / "1" / "model.onnx"
    model = onnx.load(path)
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "head")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "head_bias")
    head.CopyFrom(onnx.numpy_helper.from_array(np.ones((models.WIDTH, 5), np.float32), "head"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.ones(5, np.float32), "head_bias"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
    onnx.save(model, path)

    (response,) = start(folder).execute([Request({"tokens": models.tokens(1)})])

    assert "expected float32[1, 3], got float32[1, 5]" in response.error


def test_only_the_outputs_asked_for_are_sent(folder: Path) -> None:
    (response,) = start(folder).execute([Request({"tokens": models.tokens(1)}, wanted=["logits"])])
    assert [tensor.name for tensor in response.output_tensors] == ["logits"]

    (response,) = start(folder).execute([Request({"tokens": models.tokens(1)}, wanted=["other"])])
    assert response.output_tensors == []
