"""Triton in the cloud, with its ONNX Runtime backend: config.pbtxt, and a version folder with model.onnx.

With GPUs, TensorRT takes what it can of the graph (the backend's execution accelerator) and keeps the engines that it
builds; without, the model runs on the processor. Precision is in the graph, so that what was verified on the compiling
machine is what TensorRT gets. The Triton of the Python package index does not have this backend; NVIDIA's container
images do.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from compiler.capture import CapturedModel
from compiler.targets import BuildOptions, Built
from compiler.targets.onnxruntime import OnnxRunner
from compiler.targets.tensorrt import WORKSPACE
from compiler.targets.tensorrt_graph import typed_graph
from compiler.targets.triton_config import (
    VERSION,
    axis_range,
    configuration,
    on_cpu,
    on_gpus,
    write_configuration,
)

ENTRY: Final = f"{VERSION}/model.onnx"
NAME: Final = "triton-onnxruntime"
ENGINES: Final = "tensorrt-engines"  # where TensorRT's engines are kept, below the folder that Triton runs in


class TritonOnnxRuntimeTarget:
    """The heavy model for Triton's ONNX Runtime backend."""

    role: ClassVar[Literal["light", "heavy"]] = "heavy"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    platforms: ClassVar[tuple[str, ...]] = ("any",)
    tools: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")
    runs_here: ClassVar[bool] = True

    def settings(self, precision: str) -> tuple[str, ...]:
        """Return the one way there is."""
        del precision
        return ("default",)

    def build(self, model: CapturedModel, folder: Path, options: BuildOptions) -> Built:
        """Write the model folder.

        Raises:
            InputError: The serving settings contradict each other or the model.
            UnsupportedModelError: The graph cannot be converted to fp16.
        """
        config = configuration(model, options, backend="onnxruntime", platform="onnxruntime_onnx")
        if options.serving.gpus:
            on_gpus(config, options.serving)
            _accelerate(config, model, options)
        else:
            on_cpu(config, options.serving, NAME)
        config.parameters["intra_op_thread_count"].string_value = str(options.serving.threads)
        config.parameters["inter_op_thread_count"].string_value = "1"
        (folder / VERSION).mkdir()
        if options.precision == "fp32":
            shutil.copyfile(model.path, folder / ENTRY)
        else:
            graph = typed_graph(model, options, "ONNX Runtime")
            (folder / ENTRY).write_bytes(graph.SerializeToString(deterministic=True))
        write_configuration(config, folder)
        return Built(ENTRY)

    def open(self, entry: Path, *, threads: int) -> OnnxRunner:
        """Load the graph on this machine's processor."""
        return OnnxRunner(entry, threads=threads)


def _accelerate(config: Any, model: CapturedModel, options: BuildOptions) -> None:
    """Let TensorRT take the graph, with one profile for all shapes, so that no new shape makes it build again."""
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
    accelerator.parameters["precision_mode"] = options.precision.upper()
    accelerator.parameters["max_workspace_size_bytes"] = str(WORKSPACE)
    accelerator.parameters["trt_engine_cache_enable"] = "1"
    accelerator.parameters["trt_engine_cache_path"] = ENGINES
    accelerator.parameters["trt_engine_cache_prefix"] = options.name
    accelerator.parameters["trt_timing_cache_enable"] = "1"
    varying = [spec for spec in model.inputs if -1 in spec.shape]
    for key, largest in (("min", False), ("opt", True), ("max", True)) if varying else ():
        shapes = [(spec.name, axis_range(model, spec, options, largest=largest)) for spec in varying]
        accelerator.parameters[f"trt_profile_{key}_shapes"] = ",".join(
            f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes
        )
