"""Triton in the cloud, with its Python backend: config.pbtxt, and a version folder with model.py and the model.

The backend runs ONNX Runtime or OpenVINO on the processor, with the artefact of the target of that name. It is the form
that the Triton of the Python package index can load.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Final, Literal

from compiler.capture import CapturedModel
from compiler.targets import BuildOptions, Built, Runner, Target
from compiler.targets.onnxruntime import OnnxRuntimeTarget
from compiler.targets.triton_config import VERSION, configuration, on_cpu, write_configuration
from isthmus.errors import InputError

NAME: Final = "triton-python"
_SOURCE: Final = "model.onnx"
_PROGRAM: Final = Path(__file__).with_name("triton_python_model.py")
_IR: Final = ".xml"


class TritonPythonTarget:
    """The heavy model as ONNX Runtime or OpenVINO in Triton's Python backend."""

    role: ClassVar[Literal["light", "heavy"]] = "heavy"
    precisions: ClassVar[tuple[str, ...]] = OnnxRuntimeTarget.precisions
    platforms: ClassVar[tuple[str, ...]] = ("any",)
    tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "openvino", "nncf")
    runs_here: ClassVar[bool] = True

    def settings(self, precision: str) -> tuple[str, ...]:
        """Return the ways of the ONNX Runtime target."""
        return OnnxRuntimeTarget().settings(precision)

    def build(self, model: CapturedModel, folder: Path, options: BuildOptions) -> Built:
        """Write the model folder.

        Raises:
            InputError: The serving settings contradict each other or the model, or the precision lacks samples.
            UnsupportedModelError: The runtime that the settings name cannot take the model.
        """
        serving = options.serving
        config = configuration(model, options, backend="python")
        on_cpu(config, serving, NAME)
        version = folder / VERSION
        version.mkdir()
        built = _build(model, version, options)
        config.parameters["model"].string_value = built.entry
        config.parameters["runtime"].string_value = serving.runtime
        config.parameters["threads"].string_value = str(serving.threads)
        shutil.copyfile(_PROGRAM, version / "model.py")
        write_configuration(config, folder)
        return replace(built, entry=f"{VERSION}/{built.entry}")

    def open(self, entry: Path, *, threads: int) -> Runner:
        """Load the model as model.py does."""
        return _light("openvino" if entry.suffix == _IR else "onnxruntime").open(entry, threads=threads)


def _build(model: CapturedModel, folder: Path, options: BuildOptions) -> Built:
    if options.serving.runtime == "onnxruntime" and options.precision == "fp32":
        shutil.copyfile(model.path, folder / _SOURCE)  # as it is: the cloud's processor may be another one
        return Built(_SOURCE)
    light = _light(options.serving.runtime)
    if options.precision not in light.precisions:
        raise InputError(
            f"heavy.precision: runtime {options.serving.runtime!r} has no {options.precision!r}; "
            f"it has {', '.join(light.precisions)}",
            hint="mend the recipe",
        )
    known = options.setting in light.settings(options.precision)
    return light.build(model, folder, replace(options, setting=options.setting if known else ""))


def _light(runtime: str) -> Target:
    if runtime == "onnxruntime":
        return OnnxRuntimeTarget()
    from compiler.targets.openvino import OpenVinoTarget

    return OpenVinoTarget()
