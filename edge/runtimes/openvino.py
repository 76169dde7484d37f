"""OpenVINO on the CPU.

OpenVINO computes in bf16 by default where the CPU can, which changes answers: the precision that the variant
was verified with is always set.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from isthmus.errors import BundleError, ConfigError, InputError
from isthmus.machine import computes_bfloat16
from isthmus.privacy import forbid_usage_reports
from isthmus.tensors import Array

forbid_usage_reports()

import openvino  # noqa: E402 - after usage reports are off

_BEHIND: Final = 10  # niceness of compilation


class OpenVinoRuntime:
    """One compiled model with one inference request."""

    def __init__(self, path: Path, *, threads: int, inference_precision: str) -> None:
        if inference_precision == "bf16" and not computes_bfloat16():
            raise ConfigError("the variant was verified in bfloat16, which this processor does not compute in")
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
            "INFERENCE_PRECISION_HINT": inference_precision,
        }
        try:
            model = _compile(path, settings, behind=threads == 1)
        except RuntimeError as error:
            raise BundleError(f"OpenVINO cannot open {path.name}: {str(error)[-300:]}", reason="cannot-open") from error
        self._request: Any = model.create_infer_request()
        self._inputs = [
            (frozenset(port.get_names()), port.get_element_type().to_dtype(), port.get_partial_shape())
            for port in model.inputs
        ]
        self._outputs = [(index, sorted(port.get_names())) for index, port in enumerate(model.outputs)]

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name."""
        self._check(inputs)
        try:
            results = self._request.infer(dict(inputs), share_inputs=True)
        except RuntimeError as error:
            raise InputError(f"OpenVINO cannot compute: {str(error)[-300:]}", reason="cannot-infer") from error
        # A port may have several names (an ONNX output and the tensor it aliases); callers know one of them.
        return {name: results[index] for index, names in self._outputs for name in names}

    def _check(self, inputs: Mapping[str, Array]) -> None:
        # OpenVINO itself converts datatypes, takes other shapes and computes with what was there before, all silently.
        for name, array in inputs.items():
            port = next((port for port in self._inputs if name in port[0]), None)
            if port is None:
                raise InputError(f"OpenVINO cannot compute: no input {name!r}", reason="cannot-infer")
            _, dtype, shape = port
            if array.dtype != dtype or not shape.compatible(openvino.PartialShape(list(array.shape))):
                raise InputError(
                    f"OpenVINO cannot compute: input {name!r}: expected {dtype} {shape}, "
                    f"got {array.dtype} {list(array.shape)}",
                    reason="cannot-infer",
                )
        if len(inputs) != len(self._inputs):
            raise InputError(
                f"OpenVINO cannot compute: expected {len(self._inputs)} inputs, got {len(inputs)}",
                reason="cannot-infer",
            )

    def close(self) -> None:
        """Drop the compiled model."""
        self._request = None


def _compile(path: Path, settings: Mapping[str, str], *, behind: bool) -> Any:
    """Compile a model; `behind` lets everything else in this process go first.

    OpenVINO compiles with threads of its own on every processor, so a version that is being opened would slow down the
    one that serves. Threads inherit the priority of the one that starts them, and keep it: a model that computes with
    one thread computes in its caller's, but larger pools would compute behind everything else, too.
    """
    if not behind:
        return openvino.Core().compile_model(str(path), "CPU", dict(settings))
    with ThreadPoolExecutor(1, thread_name_prefix="openvino-compile", initializer=_step_back) as executor:
        return executor.submit(openvino.Core().compile_model, str(path), "CPU", dict(settings)).result()


def _step_back() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BEHIND)
