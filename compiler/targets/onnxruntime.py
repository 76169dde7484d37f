"""ONNX Runtime on the device: an ONNX file, optimized ahead as far as every processor can take it.

Fusions of the extended level (GELU, layer norms, attention) are made here; layouts that suit one processor are left to
the device. A symbolic batch stays symbolic.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import onnxruntime

from compiler.capture import CapturedModel
from compiler.grid import GridError, TensorGrid, outcome
from compiler.targets import BuildOptions, Built
from isthmus.errors import InputError
from isthmus.tensors import Array

ENTRY: Final = "model.onnx"
_ERRORS_ONLY: Final = 3  # ONNX Runtime's logging severity
_SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "int8": ("default", "corrected", "ends-kept", "depthwise-kept"),
    "int4w": ("default", "fine"),
}


class OnnxRuntimeTarget:
    """The light model for ONNX Runtime."""

    role: ClassVar[Literal["light", "heavy"]] = "light"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8", "int8w", "int4w")
    platforms: ClassVar[tuple[str, ...]] = ("any",)
    tools: ClassVar[tuple[str, ...]] = ("nncf", "onnx", "onnxruntime")
    runs_here: ClassVar[bool] = True

    def settings(self, precision: str) -> tuple[str, ...]:
        """Return the ways of compiler.qdq for int8; for int4w, blocks of 32 weights and then of 16."""
        return _SETTINGS.get(precision, ("default",))

    def build(self, model: CapturedModel, folder: Path, options: BuildOptions) -> Built:
        """Optimize the graph, or quantize it: on the grid of the version before where that suits it.

        Raises:
            InputError: int8 has no samples, or ONNX Runtime cannot load or quantize the model.
            UnsupportedModelError: There are no weights of the kind that the precision packs.
        """
        setting = options.setting or self.settings(options.precision)[0]
        tensors: tuple[TensorGrid, ...] = ()
        note = ""
        if options.precision == "int8":
            graph, tensors, note = _quantized(model, options, setting)
        else:
            graph = _build(model, options, setting)
        graph.producer_name, graph.producer_version = "isthmus", ""
        del graph.metadata_props[:]
        _store_raw(graph)
        (folder / ENTRY).write_bytes(graph.SerializeToString(deterministic=True))
        grid: Literal["", "kept", "part", "new"] = outcome(tensors) if tensors else "new"
        return Built(ENTRY, grid if options.precision == "int8" else "", note, tensors)

    def open(self, entry: Path, *, threads: int) -> OnnxRunner:
        """Load the model."""
        return OnnxRunner(entry, threads=threads)


def _quantized(model: CapturedModel, options: BuildOptions, setting: str) -> tuple[Any, tuple[TensorGrid, ...], str]:
    """Return the graph, what became of its tensors on the grid of the version before, and why that was not kept."""
    from compiler.qdq import quantized

    if options.samples is None:
        raise InputError("int8 needs samples of typical inputs", hint="give data.quantization in the recipe")
    try:
        return *quantized(model, options.samples, setting, options.previous), ""
    except GridError as error:
        return *quantized(model, options.samples, setting), error.message


def _build(model: CapturedModel, options: BuildOptions, setting: str) -> Any:
    from compiler.qdq import optimized

    levels = onnxruntime.GraphOptimizationLevel
    if options.precision in ("int8w", "int4w"):
        from compiler.onnx_weights import pack

        return pack(optimized(model.path, levels.ORT_ENABLE_BASIC), options.precision, fine=setting == "fine")
    graph = optimized(model.path, levels.ORT_ENABLE_EXTENDED)
    if options.precision == "fp16":
        from compiler.onnx_weights import halve

        halve(graph)
    return graph


def _store_raw(model: Any) -> None:
    """Store every constant as its bytes, whatever made it: files of two versions then have one layout."""
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        if not tensor.HasField("raw_data"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))


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
