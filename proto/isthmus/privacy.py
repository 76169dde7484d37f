"""Nothing tells a vendor what runs here.

OpenVINO and NNCF report usage through the package `openvino_telemetry`, from the moment they are imported, without
asking, and from a forked process, which crashes when gRPC's threads run. Both work without it, so it is kept out.
"""

from __future__ import annotations

import sys
from typing import Final

_REPORTER: Final = "openvino_telemetry"


def forbid_usage_reports() -> None:
    """Make `openvino_telemetry` unimportable in this process; call it before importing openvino or nncf."""
    if _REPORTER not in sys.modules:
        sys.modules[_REPORTER] = None  # type: ignore[assignment]  # documented: None makes the import fail
