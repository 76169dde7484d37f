"""TVM on the CPU: code that was compiled for this kind of processor, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus.errors import ConfigError
from isthmus.tensors import Array
from isthmus.tvm_module import TvmModule


class TvmRuntime:
    """One loaded library."""

    def __init__(self, path: Path, *, threads: int, inference_precision: str) -> None:
        if inference_precision != "f32":
            raise ConfigError(f"TVM's code computes in f32, the variant asks for {inference_precision}")
        self._module: Any = TvmModule(path, threads=threads)

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name."""
        outputs: dict[str, Array] = self._module.infer(inputs)
        return outputs

    def close(self) -> None:
        """Drop code and weights."""
        self._module = None
