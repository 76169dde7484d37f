"""What a model that TVM compiled is made of, for the compiler that writes it and the device that opens it.

A folder with three files:

    model.json             this module's `Artifact`: the entry
    model.so               machine code for one platform, and the order in which it is called
    weights.safetensors    the constants, in the form that the code wants them in

The names, order and form of the weights depend on the model's architecture and on the compiler alone, so that two
versions of one model differ in the values of weights.safetensors only.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from isthmus.bundle import Datatype
from isthmus.errors import BundleError

ENTRY: Final = "model.json"
LIBRARY: Final = "model.so"
WEIGHTS: Final = "weights.safetensors"
MAX_ENTRY_BYTES: Final = 4 << 20
MAX_ELEMENTS: Final = 1 << 31  # of one tensor

_Feature = Annotated[str, Field(pattern=r"^[a-z0-9_.]{1,32}$")]
_Axis = Annotated[int, Field(ge=1, le=1 << 31)]
_RELEASE: Final = re.compile(r"\d+\.\d+\.\d+")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Tensor(_Strict):
    """Name, datatype and shape of a tensor whose axes are all fixed."""

    name: str = Field(min_length=1, max_length=256)
    datatype: Datatype
    shape: tuple[_Axis, ...] = Field(max_length=16)

    @model_validator(mode="after")
    def _bounded(self) -> Tensor:
        if math.prod(self.shape) > MAX_ELEMENTS:
            raise ValueError(f"{self.name}: expected at most {MAX_ELEMENTS} elements, got {list(self.shape)}")
        return self


class Port(Tensor):
    """An input or output: the shape is that of one call; along `batch_axis` callers may have more rows than that.

    `low` and `high` bound the values of an input that is an index; the code does not look itself.
    """

    batch_axis: int | None = Field(default=None, ge=0, le=15)
    low: int | None = None
    high: int | None = None

    @model_validator(mode="after")
    def _one_row(self) -> Port:
        if self.batch_axis is not None and (len(self.shape) <= self.batch_axis or self.shape[self.batch_axis] != 1):
            raise ValueError(f"{self.name}: expected 1 along batch axis {self.batch_axis}, got {list(self.shape)}")
        return self


class Artifact(_Strict):
    """The entry of a model that TVM compiled."""

    format: Literal[1] = 1
    tvm: str = Field(pattern=r"^\d+\.\d+\.\d+$")  # the release whose runtime understands the library
    platform: Literal["x86_64", "aarch64"]
    cpu: str = Field(max_length=64)  # the processor that the code was made for, for people
    features: tuple[_Feature, ...] = Field(max_length=256)  # what it needs, as /proc/cpuinfo calls it
    inputs: tuple[Port, ...] = Field(min_length=1, max_length=1024)
    outputs: tuple[Port, ...] = Field(min_length=1, max_length=1024)
    weights: tuple[Tensor, ...] = Field(max_length=65536)

    @model_validator(mode="after")
    def _named_once(self) -> Artifact:
        for what, tensors in (("inputs", self.inputs), ("outputs", self.outputs), ("weights", self.weights)):
            names = [tensor.name for tensor in tensors]
            if len(set(names)) != len(names):
                raise ValueError(f"the names of the {what} must differ")
        return self

    def to_json(self) -> bytes:
        """Return canonical JSON: fixed key order, two spaces, UTF-8, one newline at the end."""
        return self.model_dump_json(indent=2, exclude_none=True).encode() + b"\n"


def read_artifact(path: Path) -> Artifact:
    """Return what the entry file at `path` says.

    Raises:
        BundleError: It cannot be read, is too large, not JSON, or breaks the schema; the message names the first field.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_ENTRY_BYTES + 1)
    except OSError as error:
        raise BundleError(f"cannot open {path.name}: {error.strerror}", reason="cannot-open") from error
    if len(data) > MAX_ENTRY_BYTES:
        raise BundleError(f"cannot open {path.name}: more than {MAX_ENTRY_BYTES} bytes", reason="cannot-open")
    try:
        return Artifact.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise BundleError(
            f"cannot open {path.name}: {where[:80]}: {first['msg'][:200]}", reason="cannot-open"
        ) from error


def release_of(version: str) -> str:
    """Return the release in a version, for example "0.27.0" in "0.27.0.post1"; empty when there is none."""
    found = _RELEASE.match(version)
    return found[0] if found else ""


def check_machine(artifact: Artifact, *, machine: str, features: frozenset[str]) -> None:
    """Check that a processor can execute the code: one that lacks an instruction would kill the process.

    Args:
        artifact: What the code needs.
        machine: The processor's architecture, as `platform.machine` gives it.
        features: What it can do, as /proc/cpuinfo calls it.

    Raises:
        BundleError: It cannot.
    """
    if machine != artifact.platform:
        raise BundleError(
            f"cannot open {ENTRY}: the model was compiled for {artifact.platform}, this is {machine}",
            reason="wrong-platform",
        )
    missing = sorted(set(artifact.features) - features)
    if missing:
        raise BundleError(
            f"cannot open {ENTRY}: the model was compiled for {artifact.cpu}; this processor lacks "
            f"{', '.join(missing)[:200]}",
            hint="compile it for an older processor (cpu in the recipe), or use another variant",
            reason="processor-lacks-features",
        )
