"""This machine's platform, by the name that variants have for it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Final

_NAMES: Final[Mapping[str, str]] = {"AMD64": "x86_64", "arm64": "aarch64", "ARM64": "aarch64"}


def machine() -> str:
    """Return this machine's platform, for example "x86_64" or "aarch64"."""
    return _NAMES.get(platform.machine(), platform.machine())
