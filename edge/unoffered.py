"""Calls of the Open Inference Protocol that the agent does not offer, each with what a caller can do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_MODELS: Final = "models come from signed releases: `isthmus model release` changes what devices serve"
_MEMORY: Final = "there is no shared memory here: send tensors in the request"

UNOFFERED: Final[Mapping[str, str]] = {
    "RepositoryModelLoad": _MODELS,
    "RepositoryModelUnload": _MODELS,
    "SystemSharedMemoryStatus": _MEMORY,
    "SystemSharedMemoryRegister": _MEMORY,
    "SystemSharedMemoryUnregister": _MEMORY,
    "CudaSharedMemoryStatus": _MEMORY,
    "CudaSharedMemoryRegister": _MEMORY,
    "CudaSharedMemoryUnregister": _MEMORY,
    "TraceSetting": "there are no traces here; `isthmus edge status` and the metrics tell how the agent is",
    "LogSettings": "logs are set when the agent starts: isthmus --log-level LEVEL edge run",
}
