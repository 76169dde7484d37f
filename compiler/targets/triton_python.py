"""Triton in the cloud, with its Python backend: config.pbtxt, and a version folder with model.py and the model.

The backend runs ONNX Runtime (model.onnx) or OpenVINO (model.xml and model.bin) on the processor. It is the form that
the Triton of the Python package index can load.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Final, Literal

from compiler.capture import CapturedModel
from compiler.targets import BuildOptions, Built, Runner
from compiler.targets.onnxruntime import OnnxRunner
from compiler.targets.triton_config import VERSION, configuration, on_cpu, write_configuration

ENTRY: Final = f"{VERSION}/model.onnx"
_PROGRAM: Final = Path(__file__).with_name("triton_python_model.py")
_IR: Final = ".xml"


class TritonPythonTarget:
    """The heavy model as ONNX Runtime or OpenVINO in Triton's Python backend."""

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
        """Write the model folder.

        Raises:
            InputError: The serving settings contradict each other or the model.
            UnsupportedModelError: The runtime that the settings name cannot take the model.
        """
        config = configuration(model, options, backend="python")
        on_cpu(config, options.serving, "triton-python")
        config.parameters["threads"].string_value = str(options.serving.threads)
        config.parameters["runtime"].string_value = options.serving.runtime
        version = folder / VERSION
        version.mkdir()
        if options.serving.runtime == "openvino":
            from compiler.targets.openvino import OpenVinoTarget

            built = OpenVinoTarget().build(model, version, replace(options, precision="fp32", setting=""))
            entry = f"{VERSION}/{built.entry}"
        else:
            entry = ENTRY
            shutil.copyfile(model.path, folder / ENTRY)
        shutil.copyfile(_PROGRAM, version / "model.py")
        write_configuration(config, folder)
        return Built(entry)

    def open(self, entry: Path, *, threads: int) -> Runner:
        """Load the model as model.py does."""
        if entry.suffix == _IR:
            from compiler.targets.openvino import OpenVinoTarget

            return OpenVinoTarget().open(entry, threads=threads)
        return OnnxRunner(entry, threads=threads)
