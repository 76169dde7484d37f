"""`python -m benchmarks [--quick]`: run every benchmark and keep the results in build/benchmarks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

NAMES: Final = (
    "agent",
    "uplink",
    "soak",
    "swap",
    "policy",
    "sequences",
    "delta",
    "overhead",
    "compile",
    "tuning",
    "fleet",
    "gateway",
    "authentication",
    "limits",
)

folder = Path("build/benchmarks")
folder.mkdir(parents=True, exist_ok=True)
failed = [
    name
    for name in NAMES
    if subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--json", str(folder / f"{name}.json"), *sys.argv[1:]], check=False
    ).returncode
]
sys.exit(f"these benchmarks failed: {', '.join(failed)}" if failed else 0)
