"""Triton in the cloud, with its TensorRT backend: config.pbtxt, and a version folder with model.plan.

The engine is built by `tensorrt` for the GPU of the building machine, which must be of the kind that will serve it. The
Triton of the Python package index does not have this backend; NVIDIA's container images do, for the same version of
TensorRT only.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Final, Literal, NoReturn

from compiler.capture import CapturedModel
from compiler.targets import BuildOptions, Built
from compiler.targets.tensorrt import PRECISIONS, TENSORRT, Library, build_plan
from compiler.targets.triton_config import VERSION, configuration, on_gpus, write_configuration
from isthmus.errors import InputError

ENTRY: Final = f"{VERSION}/model.plan"


class TritonTensorRtTarget:
    """The heavy model as a TensorRT plan.

    Args:
        library: Which of TensorRT's libraries builds the plan; Triton loads those of TensorRT itself only.

    Raises:
        ImportError: The library is not installed.
    """

    role: ClassVar[Literal["light", "heavy"]] = "heavy"
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS
    platforms: ClassVar[tuple[str, ...]] = ("x86_64",)
    tools: ClassVar[tuple[str, ...]] = ("tensorrt", "onnx", "onnxruntime")
    runs_here: ClassVar[bool] = False

    def __init__(self, library: Library = TENSORRT) -> None:
        library.require()
        self._library = library

    def settings(self, precision: str) -> tuple[str, ...]:
        """Return the one way there is."""
        del precision
        return ("default",)

    def build(self, model: CapturedModel, folder: Path, options: BuildOptions) -> Built:
        """Write the model folder.

        Raises:
            InputError: The serving settings contradict each other, int8 has no samples, or an axis has unknown lengths.
            UnsupportedModelError: TensorRT cannot take the model.
        """
        config = configuration(model, options, backend="tensorrt", platform="tensorrt_plan")
        on_gpus(config, options.serving)
        (folder / VERSION).mkdir()
        plan = build_plan(self._library, model, options, folder / ENTRY)
        write_configuration(config, folder)
        return Built(ENTRY, not_reproducible=plan.not_reproducible)

    def open(self, entry: Path, *, threads: int) -> NoReturn:
        """Say what is missing.

        Raises:
            InputError: Always: no engine runs on the processor.
        """
        del threads
        raise InputError(
            f"{entry.name} cannot be run here: it needs an NVIDIA GPU and Triton's TensorRT backend",
            hint="the cloud runs it on the golden inputs when it is published",
        )
