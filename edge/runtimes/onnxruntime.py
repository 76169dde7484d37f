"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime

from isthmus.errors import BundleError, ConfigError, InputError
from isthmus.tensors import Array


class OnnxRuntime:
    """One session."""

    def __init__(self, path: Path, *, threads: int, inference_precision: str) -> None:
        if inference_precision != "f32":
            raise ConfigError(f"ONNX Runtime computes in f32 on the CPU, the variant asks for {inference_precision}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors; they also come as exceptions
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise BundleError(
                f"ONNX Runtime cannot open {path.name}: {str(error)[:300]}", reason="cannot-open"
            ) from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name."""
        try:
            results = self._session.run(self._outputs, dict(inputs))
        except Exception as error:
            raise InputError(f"ONNX Runtime cannot compute: {str(error)[:300]}", reason="cannot-infer") from error
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        """Drop the session."""
        self._session = None
