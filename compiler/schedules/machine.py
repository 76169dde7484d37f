"""What a schedule needs to know of a processor, read from the features of a TVM target."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any, Final

_ARM: Final = ("aarch64", "arm64", "armv8")


@dataclass(frozen=True, slots=True)
class Machine:
    """The vector unit and caches that register tiles are cut for."""

    lanes: int  # float32 values in the widest vector register
    registers: int  # vector registers
    broadcasts_from_memory: bool  # a multiplication can take one operand as a scalar in memory, repeated in each lane
    cores: int  # threads that may share one kernel
    l2_bytes: int = 1 << 20

    @classmethod
    def of(cls, target: Any) -> Machine:
        """Return the machine that `target`, of kind llvm, describes; unknown ones are taken for plain SSE."""
        from tvm.target import codegen

        attributes = dict(target.attrs)
        cores = int(attributes.get("num-cores", 1))
        triple = str(attributes.get("mtriple", "")) or platform.machine()
        if triple.startswith(_ARM):
            return cls(lanes=4, registers=32, broadcasts_from_memory=False, cores=cores)
        if codegen.target_has_features(["avx512f"], target):
            return cls(lanes=16, registers=32, broadcasts_from_memory=True, cores=cores)
        if codegen.target_has_features(["avx2"], target):
            return cls(lanes=8, registers=16, broadcasts_from_memory=False, cores=cores)
        return cls(lanes=4, registers=16, broadcasts_from_memory=False, cores=cores)
