"""The tools that we are measured against, in an environment of their own: `python -m benchmarks.delta.tools` makes it.

It goes under build/peers. xdelta3 is a program: where it is not installed (Debian: `apt-get install xdelta3`), its rows
say so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.delta import DeltaPair
from benchmarks.delta.spans import aligned

ENVIRONMENT: Final = Path("build/peers/delta")
# zipnn brings torch: a wider range would pull gigabytes of CUDA packages.
_TORCH: Final = "torch==2.13.0"
_PACKAGES: Final = (
    "bsdiff4==1.3.2", "hdiffpatch==2.6.0", "zipnn==0.5.4", "zstandard==0.25.0", "constriction==0.5.0", "numpy==1.26.4",
)  # fmt: skip
_WORKER: Final = Path(__file__).with_name("worker.py")
_LIMIT_S: Final = 1800.0

ALONE: Final = ("zstd -19", "xz -9")  # of the new file alone
BYTES: Final = (*ALONE, "zstd -19 --patch-from --long", "bsdiff4", "hdiffpatch", "xdelta3")  # know nothing of tensors
MODELS: Final = ("zipnn", "fm-delta")
QUICK: Final = ("zstd -19 --patch-from --long", "bsdiff4", "fm-delta")


def install() -> None:
    """Make the environment."""
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pip = [str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet"]
    subprocess.run([*pip, _TORCH], check=True)
    subprocess.run([*pip, _TORCH, *_PACKAGES], check=True)


def is_installed() -> bool:
    """Return whether the environment is there."""
    return (ENVIRONMENT / "bin" / "python").exists()


def measure(pair: DeltaPair, tools: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return by tool its bytes, make_s and apply_s, or why it was `refused`."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(aligned(pair.old, pair.new), file)
        file.flush()
        return {tool: _run(tool, pair, Path(file.name)) for tool in tools}


def _run(tool: str, pair: DeltaPair, spans: Path) -> dict[str, Any]:
    python = ENVIRONMENT / "bin" / "python"
    command = [str(python), str(_WORKER), tool, str(pair.old), str(pair.new), str(spans)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"refused": f"not done after {_LIMIT_S:.0f} s"}
    if done.returncode != 0:
        return {"refused": (done.stderr.strip().splitlines() or ["ended"])[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    install()
