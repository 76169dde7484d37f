"""Targets: what the compiler can build for, one file each.

`TARGETS` names them by import string, so that a library is imported only when a recipe asks for it. To add one: a file
that fulfils `Target`, and a line here. tests/compiler/test_targets.py runs every one of them through the same contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Final, Literal, Protocol, cast

from compiler.capture import CapturedModel
from isthmus.errors import InputError, MissingExtraError
from isthmus.tensors import Array

TARGETS: Final[Mapping[str, str]] = {
    "openvino": "compiler.targets.openvino:OpenVinoTarget",
    "onnxruntime": "compiler.targets.onnxruntime:OnnxRuntimeTarget",
    "triton-python": "compiler.targets.triton_python:TritonPythonTarget",
}


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What a build may depend on besides the model."""

    precision: str = "fp32"
    samples: Mapping[str, Array] | None = None  # int8: typical inputs, one per row
    previous: Path | None = None  # int8: the entry of the version before, whose grid is kept when it can be
    name: str = "model"
    max_batch: int = 64
    instances: int = 1
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Built:
    """What a build made."""

    entry: str  # relative to the folder
    grid: Literal["", "kept", "new"] = ""  # int8: whether scales come from the version before
    note: str = ""  # why the grid is new although there is a version before
    clipped: float = 0.0  # kept grid: largest share of one tensor's weights that had to be clipped


class Runner(Protocol):
    """A built model, loaded as the device or the cloud loads it."""

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name."""


class Target(Protocol):
    """One thing to build for."""

    role: ClassVar[Literal["light", "heavy"]]
    precisions: ClassVar[tuple[str, ...]]

    def build(self, model: CapturedModel, folder: Path, options: BuildOptions) -> Built:
        """Write the artefact into the empty `folder`; the same arguments give the same bytes.

        Raises:
            InputError: The target cannot take this model.
        """

    def open(self, entry: Path, *, threads: int) -> Runner:
        """Load what `build` wrote."""


def load_target(name: str, *, role: str) -> Target:
    """Return the target with this name.

    Raises:
        InputError: There is none for this role; the message lists those there are.
        MissingExtraError: Its library is not installed.
    """
    if name not in TARGETS:
        close = get_close_matches(name, TARGETS, n=1)
        raise InputError(
            f"unknown target {name!r}; there are {', '.join(TARGETS)}",
            hint=f"did you mean {close[0]}?" if close else "mend the recipe",
        )
    module, _, attribute = TARGETS[name].partition(":")
    try:
        target = cast("Target", getattr(import_module(module), attribute)())
    except ImportError as error:
        raise MissingExtraError(f"what target {name!r} needs ({error.name})", "compiler") from error
    if target.role != role:
        raise InputError(f"target {name!r} is for the {target.role} model, not for the {role} one")
    return target
