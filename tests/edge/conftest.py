"""What the agent's tests share."""

from __future__ import annotations

import sys
from typing import Any, cast

# As edge.runtimes.openvino does, and before any test module imports openvino: its telemetry forks the process.
sys.modules.setdefault("openvino_telemetry", cast("Any", None))
