"""Targets: what the compiler can build for, one file each.

`TARGETS` names them by import string, so that a library is imported only when a recipe asks for it. To add one: a file
that fulfils `Target`, and a line here. tests/compiler/test_targets.py runs every one of them through the same contract.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Final, Literal, Protocol, cast

from compiler.capture import CapturedModel
from compiler.grid import PreviousGrid, TensorGrid
from isthmus.errors import InputError, MissingExtraError
from isthmus.tensors import Array


@dataclass(frozen=True, slots=True)
class TargetEntry:
    """Where a target lives, which extra brings its library, and which model it is for."""

    location: str  # "module:class"
    extra: str = "compiler"
    role: Literal["light", "heavy"] = "light"


TARGETS: Final[Mapping[str, TargetEntry]] = {
    "openvino": TargetEntry("compiler.targets.openvino:OpenVinoTarget"),
    "onnxruntime": TargetEntry("compiler.targets.onnxruntime:OnnxRuntimeTarget"),
    "tvm": TargetEntry("compiler.targets.tvm:TvmTarget", "tvm"),
    "tensorrt-rtx": TargetEntry("compiler.targets.tensorrt_rtx:TensorRtRtxTarget", "tensorrt-rtx"),
    "triton-python": TargetEntry("compiler.targets.triton_python:TritonPythonTarget", role="heavy"),
    "triton-onnxruntime": TargetEntry("compiler.targets.triton_onnxruntime:TritonOnnxRuntimeTarget", role="heavy"),
    "triton-openvino": TargetEntry("compiler.targets.triton_openvino:TritonOpenVinoTarget", role="heavy"),
    "triton-tensorrt": TargetEntry("compiler.targets.triton_tensorrt:TritonTensorRtTarget", "tensorrt", role="heavy"),
}


@dataclass(frozen=True, slots=True)
class Labels:
    """What a build that controls accuracy itself measures it on: never the data of the final verdict."""

    inputs: Mapping[str, Array]  # one sample per row
    labels: Array  # int64 [samples]
    output: str  # the output with one logit per class


@dataclass(frozen=True, slots=True)
class Tuning:
    """How long a target may search for faster code, and where what it found is kept."""

    trials: int = 0
    seconds: float = 0.0
    database: Path | None = None  # a folder; kept from build to build, keyed by workload


@dataclass(frozen=True, slots=True)
class Serving:
    """How Triton serves the heavy model."""

    instances: int = 1
    threads: int = 2  # of each instance
    max_queue_delay_us: int = 500  # what a request waits at most for others to share its batch
    preferred_batch: tuple[int, ...] = ()
    warm_up: bool = False
    response_cache: bool = False
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime"  # what the Python backend runs
    keep_versions: int = 0  # 0: the versions that the cloud names; n: the newest n
    gpus: tuple[int, ...] = ()


def _ignore(stage: str, done: int, total: int) -> None:
    """Take progress that nobody watches."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What a build may depend on besides the model."""

    precision: str = "fp32"
    setting: str = ""  # one of the target's settings for this precision; empty: the first
    platform: str = "x86_64"
    cpu: str = ""  # the least processor that compiled code needs, e.g. "x86-64-v3"; empty: the target's default
    samples: Mapping[str, Array] | None = None  # quantization: typical inputs, one per row
    labelled: Labels | None = None
    previous: PreviousGrid | None = None  # int8: the version before, whose grid is kept where it suits
    name: str = "model"
    max_batch: int = 64
    max_accuracy_drop: float = 0.02  # for settings that control accuracy themselves
    advance: Callable[[str, int, int], None] = _ignore  # told (stage, done, total) by builds that take long
    tuning: Tuning = field(default_factory=Tuning)
    serving: Serving = field(default_factory=Serving)


@dataclass(frozen=True, slots=True)
class Built:
    """What a build made."""

    entry: str  # relative to the folder
    grid: Literal["", "kept", "part", "new"] = ""  # int8: whether scales come from the version before
    note: str = ""  # why the grid is new although there is a version before, or what else people should know
    tensors: tuple[TensorGrid, ...] = ()  # int8 with a version before: what became of each quantized tensor
    inference_precision: Literal["f32", "bf16"] = "f32"  # of what is not quantized, for runtimes that can be told
    not_reproducible: str = ""  # why two builds of the same may differ in their bytes; empty: they do not


class Runner(Protocol):
    """A built model, loaded as the device or the cloud loads it."""

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name, in arrays of their own.

        Raises:
            InputError: The model cannot take these inputs.
        """


class Target(Protocol):
    """One thing to build for."""

    role: ClassVar[Literal["light", "heavy"]]
    precisions: ClassVar[tuple[str, ...]]
    platforms: ClassVar[tuple[str, ...]]  # ("any",), or those it can build for, this machine's first
    tools: ClassVar[tuple[str, ...]]  # distributions whose versions decide what is built
    runs_here: ClassVar[bool]  # False: needs a device that the compiling machine may lack; `open` says so

    def settings(self, precision: str) -> tuple[str, ...]:
        """Return the ways to build this precision, from the fastest to the gentlest: the guard goes down the list."""

    def build(self, model: CapturedModel, folder: Path, options: BuildOptions) -> Built:
        """Write the artefact into the empty `folder`; the same arguments give the same bytes.

        Raises:
            UnsupportedModelError: The target cannot take this model; the message names the operator and the node.
            InputError: The options cannot work, for example int8 without samples.
        """

    def open(self, entry: Path, *, threads: int) -> Runner:
        """Load what `build` wrote.

        Raises:
            InputError: It cannot be loaded.
        """


class UnsupportedModelError(InputError):
    """A target cannot take the model; the hint says what to use instead."""

    reason = "unsupported-model"


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
    entry = TARGETS[name]
    if entry.role != role:
        raise InputError(f"target {name!r} is for the {entry.role} model, not for the {role} one")
    module, _, attribute = entry.location.partition(":")
    try:
        return cast("Target", getattr(import_module(module), attribute)())
    except ImportError as error:
        raise MissingExtraError(f"what target {name!r} needs ({error.name})", entry.extra) from error
