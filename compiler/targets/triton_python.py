"""Triton in the cloud, with its Python backend: config.pbtxt, and a version folder with model.py and model.onnx.

Equal models with equal settings give equal folders whatever the bundle's version is, so that two bundles share one
Triton version. Which versions Triton serves is the cloud's business: nothing here says.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from google.protobuf import text_format

from compiler.capture import CapturedModel
from compiler.targets import BuildOptions, Built
from compiler.targets.onnxruntime import OnnxRunner
from isthmus.bundle import TensorSpec
from isthmus.oip import model_config_pb2

ENTRY: Final = "1/model.onnx"
CONFIG: Final = "config.pbtxt"
_PROGRAM: Final = Path(__file__).with_name("triton_python_model.py")


class TritonPythonTarget:
    """The heavy model as ONNX Runtime in Triton's Python backend."""

    role: ClassVar[Literal["light", "heavy"]] = "heavy"
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    platforms: ClassVar[tuple[str, ...]] = ("any",)
    tools: ClassVar[tuple[str, ...]] = ()
    runs_here: ClassVar[bool] = True

    def settings(self, precision: str) -> tuple[str, ...]:
        """Return the one way there is."""
        del precision
        return ("default",)

    def build(self, model: CapturedModel, folder: Path, options: BuildOptions) -> Built:
        """Write the model folder."""
        (folder / ENTRY).parent.mkdir()
        shutil.copyfile(model.path, folder / ENTRY)
        shutil.copyfile(_PROGRAM, (folder / ENTRY).with_name("model.py"))
        (folder / CONFIG).write_text(text_format.MessageToString(configuration(model, options)), encoding="utf-8")
        return Built(ENTRY)

    def open(self, entry: Path, *, threads: int) -> OnnxRunner:
        """Load the model as model.py does."""
        return OnnxRunner(entry, threads=threads)


def configuration(model: CapturedModel, options: BuildOptions) -> Any:
    """Return Triton's configuration of the model."""
    config = model_config_pb2.ModelConfig(name=options.name, backend="python", max_batch_size=options.max_batch)
    config.input.extend(model_config_pb2.ModelInput(**_tensor(spec)) for spec in model.inputs)
    config.output.extend(model_config_pb2.ModelOutput(**_tensor(spec)) for spec in model.outputs)
    config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU, count=options.serving.instances)
    config.dynamic_batching.max_queue_delay_microseconds = options.serving.max_queue_delay_us
    config.parameters["threads"].string_value = str(options.serving.threads)
    return config


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    """Return name, datatype and shape without the batch axis, which Triton adds itself."""
    datatype = model_config_pb2.DataType.Value(f"TYPE_{spec.datatype}")
    shape = spec.shape[1:]
    if shape:
        return {"name": spec.name, "data_type": datatype, "dims": shape}
    # Triton wants at least one axis besides the batch; a single one of length 1 is taken away again.
    reshape = model_config_pb2.ModelTensorReshape(shape=[])
    return {"name": spec.name, "data_type": datatype, "dims": (1,), "reshape": reshape}
