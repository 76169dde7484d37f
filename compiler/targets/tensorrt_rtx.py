"""TensorRT-RTX on the device: an engine for NVIDIA GPUs in edge machines, built ahead of time on any machine.

model.engine holds the network for every compute capability that was asked for; the device's library finishes it for the
GPU that it finds. model.json says what the engine takes and gives, and what it was built for: the engine itself cannot
be asked where there is no GPU.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Final, Literal, NoReturn

from compiler.capture import CapturedModel
from compiler.targets import BuildOptions, Built
from compiler.targets.tensorrt import PRECISIONS, TENSORRT_RTX, build_plan
from isthmus.errors import InputError

ENTRY: Final = "model.engine"
DESCRIPTION: Final = "model.json"
CAPABILITIES: Final = ("SM80", "SM86", "SM89", "SM120")  # Ampere to Blackwell; Turing has no FP32 products here
_CAPABILITY: Final = re.compile(r"sm\d{2,3}", re.IGNORECASE)

TENSORRT_RTX.require()  # or the table of targets could not say which extra is missing


class TensorRtRtxTarget:
    """The light model as a TensorRT-RTX engine."""

    role: ClassVar[Literal["light", "heavy"]] = "light"
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS
    platforms: ClassVar[tuple[str, ...]] = ("x86_64",)
    tools: ClassVar[tuple[str, ...]] = ("tensorrt_rtx_cu12_bindings", "onnx", "onnxruntime")
    runs_here: ClassVar[bool] = False

    def settings(self, precision: str) -> tuple[str, ...]:
        """Return the one way there is: without a GPU nothing can be measured that would choose another."""
        del precision
        return ("default",)

    def build(self, model: CapturedModel, folder: Path, options: BuildOptions) -> Built:
        """Write the engine, for the compute capabilities in `options.cpu` ("sm86,sm89") or all from Ampere on.

        Raises:
            InputError: int8 without samples, an unknown compute capability, or an axis of unknown lengths.
            UnsupportedModelError: TensorRT-RTX cannot take the model.
        """
        capabilities = _capabilities(options.cpu)
        library = replace(TENSORRT_RTX, capabilities=capabilities)
        plan = build_plan(library, model, options, folder / ENTRY)
        description = {
            "library": library.title,
            "version": plan.version,
            "compute_capabilities": [name.lower() for name in capabilities],
            "precision": options.precision,
            "layers": plan.layers,
            "inputs": [spec.model_dump() for spec in model.inputs],
            "outputs": [spec.model_dump() for spec in model.outputs],
            "profile": {
                name: dict(zip(("least", "usual", "most"), shapes, strict=True))
                for name, shapes in plan.profile.items()
            },
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        return Built(ENTRY, not_reproducible=plan.not_reproducible)

    def open(self, entry: Path, *, threads: int) -> NoReturn:
        """Say what is missing.

        Raises:
            InputError: Always: no engine runs on the processor.
        """
        del threads
        raise InputError(
            f"{entry.name} cannot be run here: it needs an NVIDIA GPU with TensorRT-RTX",
            hint="compare it on a device; the compiler measures the other variants",
        )


def _capabilities(cpu: str) -> tuple[str, ...]:
    if not cpu:
        return CAPABILITIES
    names = [name.strip() for name in cpu.split(",")]
    wrong = [name for name in names if not _CAPABILITY.fullmatch(name)]
    if wrong:
        raise InputError(
            f"cpu: expected compute capabilities of GPUs such as 'sm86,sm89', got {wrong[0]!r}", hint="mend the recipe"
        )
    return tuple(sorted({name.upper() for name in names}, key=lambda name: int(name[2:])))
