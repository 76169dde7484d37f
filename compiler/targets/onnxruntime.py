"""ONNX Runtime on the device: the ONNX file itself.

It is shipped as it is: ONNX Runtime optimises for the processor it finds when it loads, and a graph that is optimised
ahead of time would be tied to the processor and the version of the compiling machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import onnxruntime

from compiler.capture import CapturedModel
from compiler.targets import BuildOptions, Built
from isthmus.errors import InputError
from isthmus.tensors import Array

ENTRY: Final = "model.onnx"
_ERRORS_ONLY: Final = 3  # ONNX Runtime's logging severity


class OnnxRuntimeTarget:
    """The light model for ONNX Runtime, in full precision."""

    role: ClassVar[Literal["light", "heavy"]] = "light"
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    platforms: ClassVar[tuple[str, ...]] = ("any",)
    tools: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    runs_here: ClassVar[bool] = True

    def settings(self, precision: str) -> tuple[str, ...]:
        """Return the one way there is."""
        del precision
        return ("default",)

    def build(self, model: CapturedModel, folder: Path, options: BuildOptions) -> Built:
        """Copy the model; `options` hold nothing for it."""
        del options
        shutil.copyfile(model.path, folder / ENTRY)
        return Built(ENTRY)

    def open(self, entry: Path, *, threads: int) -> OnnxRunner:
        """Load the model."""
        return OnnxRunner(entry, threads=threads)


class OnnxRunner:
    """An ONNX Runtime session on the CPU."""

    def __init__(self, path: Path, *, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        try:
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class
            raise InputError(f"ONNX Runtime cannot load {path.name}: {str(error)[:300]}") from error
        self._names = [output.name for output in self._session.get_outputs()]

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name.

        Raises:
            InputError: The model cannot take these inputs.
        """
        try:
            return dict(zip(self._names, self._session.run(None, dict(inputs)), strict=True))
        except Exception as error:  # its exceptions share no base class
            raise InputError(f"ONNX Runtime cannot run the model: {str(error)[:300]}") from error
