"""The heavy model inside Triton's Python backend: ONNX Runtime or OpenVINO on the CPU, one session per instance.

The compiler copies this file into the bundle as model.py, beside the model's own files; it runs in Triton's own process
and imports nothing of this project.

Rules:
* What Triton batches together is run as one batch: rows are put together, and divided again. A model that cannot be
  batched (max_batch_size is 0) gets its requests one by one.
* Triton's Python backend does not look at outputs, so they are checked here: names, datatype, shape, number of rows
  and that every value is finite.
* A request that fails gets an error of its own; it spoils neither the others nor the process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # lives in Triton's process only

Run = Callable[[list[str], Mapping[str, Any]], list[Any]]


class TritonPythonModel:
    """What the Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model into the runtime, and with the number of threads, that config.pbtxt says."""
        config = json.loads(args["model_config"])
        said = {key: value["string_value"] for key, value in config["parameters"].items()}
        runtime = said["runtime"]
        load = _openvino if runtime == "openvino" else _onnxruntime
        try:
            self._session = load(Path(__file__).with_name(said["model"]), int(said["threads"]))
        except ImportError as error:
            raise pb_utils.TritonModelException(
                f"the model needs {runtime}, and {error.name or runtime} is not installed for the python3 of Triton: "
                f"pip install 'isthmus[cloud,edge-{runtime}]'"
            ) from error
        self._batched = int(config.get("max_batch_size", 0)) > 0
        self._inputs = {entry["name"]: _shape(entry) for entry in config["input"]}
        self._outputs = {
            entry["name"]: (np.dtype(pb_utils.triton_string_to_numpy(entry["data_type"])), _shape(entry))
            for entry in config["output"]
        }

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests, all of them in one run where that works."""
        if not self._batched:
            return [self._alone(request) for request in requests]
        try:
            rows = [self._rows(request) for request in requests]
            together = {name: np.concatenate([part[name] for part in rows]) for name in self._inputs}
            outputs = self._run(together)
        except Exception:  # whatever it was, the requests that did not cause it get an answer
            return [self._alone(request) for request in requests]
        ends = np.cumsum([_count(part) for part in rows])[:-1]
        divided = {name: np.split(array, ends) for name, array in outputs.items()}
        return [
            self._answer(request, {name: parts[index] for name, parts in divided.items()})
            for index, request in enumerate(requests)
        ]

    def finalize(self) -> None:
        """Drop the session."""
        del self._session

    def _rows(self, request: Any) -> dict[str, Any]:
        arrays = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
        if self._batched and len({len(array) for array in arrays.values()}) != 1:
            raise ValueError("all inputs must have the same number of rows")
        return arrays

    def _run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        names = list(self._outputs)
        outputs = dict(zip(names, self._session(names, inputs), strict=True))
        batch = [_count(inputs)] if self._batched else []
        for name, array in outputs.items():
            dtype, shape = self._outputs[name]
            expected = [*batch, *shape]
            fits = array.ndim == len(expected) and all(
                want in (-1, got) for want, got in zip(expected, array.shape, strict=True)
            )
            if array.dtype != dtype or not fits:
                raise ValueError(f"output {name}: expected {dtype}{expected}, got {array.dtype}{list(array.shape)}")
        return outputs

    def _alone(self, request: Any) -> Any:
        try:
            return self._answer(request, self._run(self._rows(request)))
        except Exception as error:  # the process serves other requests, so it must not end here
            return _failure(f"the model failed: {error}")

    def _answer(self, request: Any, outputs: dict[str, Any]) -> Any:
        for name, array in outputs.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                return _failure(f"output {name} holds values that are not finite")
        wanted = set(request.requested_output_names()) or set(outputs)
        tensors = [
            pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in outputs.items() if name in wanted
        ]
        return pb_utils.InferenceResponse(output_tensors=tensors)


def _onnxruntime(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda names, inputs: list(session.run(names, dict(inputs)))


def _openvino(path: Path, threads: int) -> Run:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # or it would report usage
    import openvino
    from openvino import properties

    config = {
        properties.hint.inference_precision(): "f32",  # left alone, it computes in bfloat16 where it can
        properties.inference_num_threads(): threads,
        properties.num_streams(): 1,
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", config)
    request = compiled.create_infer_request()
    ports = {output.get_any_name(): output for output in compiled.outputs}
    dtypes = {port.get_any_name(): port.get_element_type().to_dtype() for port in compiled.inputs}

    def run(names: list[str], inputs: Mapping[str, Any]) -> list[Any]:
        for name, array in inputs.items():
            if array.dtype != dtypes[name]:  # it would cast
                raise ValueError(f"input {name}: expected {dtypes[name]}, got {array.dtype}")
        results = request.infer(dict(inputs))
        return [results[ports[name]].copy() for name in names]  # the next run overwrites what it returns

    return run


def _shape(entry: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in entry["dims"])


def _count(arrays: Mapping[str, Any]) -> int:
    return len(next(iter(arrays.values())))


def _failure(message: str) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message[:500]))
