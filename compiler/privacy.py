"""Nothing leaves the operator's machine while a model is compiled.

OpenVINO and NNCF report usage to their vendor through the package `openvino_telemetry`, from the moment they are
imported and without asking. Both work without that package, so here it cannot be imported.
"""

from __future__ import annotations

import sys
from typing import Final

_REPORTER: Final = "openvino_telemetry"


def forbid_usage_reports() -> None:
    """Make `openvino_telemetry` unimportable in this process; call it before importing openvino or nncf."""
    if _REPORTER not in sys.modules:
        sys.modules[_REPORTER] = None  # type: ignore[assignment]  # documented: None makes the import fail
