"""The heavy model inside Triton's Python backend: ONNX Runtime on the CPU, one session per instance.

The compiler copies this file into the bundle as model.py, beside model.onnx; it runs in Triton's own process and
imports nothing of this project.

Rules:
* What Triton batches together is run as one batch: rows are put together, and divided again.
* Triton's Python backend does not look at outputs, so they are checked here: names, datatype, shape, number of rows
  and that every value is finite.
* A request that fails gets an error of its own; it spoils neither the others nor the process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # lives in Triton's process only


class TritonPythonModel:
    """What the Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load model.onnx with the number of threads that config.pbtxt says."""
        config = json.loads(args["model_config"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(config["parameters"]["threads"]["string_value"])
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(Path(__file__).with_name("model.onnx")), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [entry["name"] for entry in config["input"]]
        self._outputs = {
            entry["name"]: (
                np.dtype(pb_utils.triton_string_to_numpy(entry["data_type"])),
                tuple(int(size) for size in entry["dims"]),
            )
            for entry in config["output"]
        }

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests, all of them in one run where that works."""
        try:
            rows = [self._rows(request) for request in requests]
            together = {name: np.concatenate([part[name] for part in rows]) for name in self._inputs}
            outputs = self._run(together)
        except Exception:  # whatever it was, the requests that did not cause it get an answer
            return [self._alone(request) for request in requests]
        ends = np.cumsum([len(part[self._inputs[0]]) for part in rows])[:-1]
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
        if len({len(array) for array in arrays.values()}) != 1:
            raise ValueError("all inputs must have the same number of rows")
        return arrays

    def _run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        names = list(self._outputs)
        outputs = dict(zip(names, self._session.run(names, inputs), strict=True))
        count = len(inputs[self._inputs[0]])
        for name, array in outputs.items():
            dtype, shape = self._outputs[name]
            if array.dtype != dtype or array.shape != (count, *shape):
                raise ValueError(
                    f"output {name}: expected {dtype}{[count, *shape]}, got {array.dtype}{list(array.shape)}"
                )
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


def _failure(message: str) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message[:500]))
