"""This machine: its platform, by the name that variants have for it, and what its processor can do."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_BFLOAT16: Final = frozenset({"avx512_bf16", "amx_bf16"})
_NAMES: Final[Mapping[str, str]] = {"AMD64": "x86_64", "arm64": "aarch64", "ARM64": "aarch64"}


def machine() -> str:
    """Return this machine's platform, for example "x86_64" or "aarch64"."""
    return _NAMES.get(platform.machine(), platform.machine())


def processor_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return what the first processor of /proc/cpuinfo says that it can do; empty when it says nothing."""
    return frozenset(_first(cpuinfo, "flags", "Features").split())


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return what the first processor of /proc/cpuinfo is called (on Arm: its part number); empty when nothing is."""
    return _first(cpuinfo, "model name", "CPU part")


def _first(cpuinfo: Path, *keys: str) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def computes_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 numbers (x86-64 with AVX512-BF16 or AMX)."""
    return bool(processor_features() & _BFLOAT16)
