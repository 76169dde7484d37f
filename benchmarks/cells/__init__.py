"""One model of the zoo on one target in one precision: a cell, built and compared in a process of its own.

Results are kept in `build/cells/MODEL/CELL`, each under a key of everything that it depends on: the model, the samples,
the versions of the tools and the target's own source. What is there under the same key is not done again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from benchmarks.zoo import MODELS

FOLDER: Final = Path("build/cells")
CALIBRATION: Final = 96  # samples that quantization sees
EVALUATION: Final = 64  # at most; fewer where outputs are large
EVALUATION_BYTES: Final = 64 << 20  # of the reference outputs
MEMORY: Final = 20 << 30  # bytes that one cell may write to
OUTCOME: Final = "outcome.json"  # what the worker writes
RESULT: Final = "result.json"  # the same with the cell and its key, or why there is none

ONE_LENGTH: Final = frozenset({"tvm"})

# The files of the compiler that a target's result depends on, below compiler/.
SOURCES: Final[Mapping[str, Sequence[str]]] = {
    "openvino": ("targets/openvino*.py", "quantize.py"),
    "onnxruntime": ("targets/onnxruntime*.py", "quantize.py", "qdq.py", "onnx_weights.py"),
    "tvm": ("targets/tvm*.py", "schedules/*.py"),
    "tensorrt-rtx": ("targets/tensorrt*.py",),
}
TOOLS: Final[Mapping[str, Sequence[str]]] = {
    "openvino": ("openvino", "nncf"),
    "onnxruntime": ("onnxruntime",),
    "tvm": ("apache-tvm", "onnxruntime"),
    "tensorrt-rtx": ("tensorrt_rtx_cu12_libs", "onnxruntime"),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """What is to be built: `kind` is "capture", "build" (by a target of ours), "peer" or "by-hand"."""

    model: str
    kind: str
    target: str = ""
    precision: str = ""
    setting: str = ""
    fixed: bool = False  # lengths that may vary are fixed at the longest, for targets that compile for one length

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        parts = (self.kind, self.target, self.precision, self.setting, "fixed" if self.fixed else "")
        return "-".join(part for part in parts if part)

    @property
    def folder(self) -> Path:
        """Return where its result lies."""
        return FOLDER / self.model / self.name


def build_of(model: str, target: str, precision: str, setting: str) -> Cell:
    """Return the cell of a target of ours; what compiles for one length gets one."""
    varies = any(low != high for low, high in MODELS[model].lengths.values())
    return Cell(model, "build", target, precision, setting, fixed=varies and target in ONE_LENGTH)


def capture_of(cell: Cell) -> Cell:
    """Return the cell that captures the model of another."""
    return Cell(cell.model, "capture", fixed=cell.fixed)


def key_of(cell: Cell) -> str:
    """Return the digest of everything that the cell's result depends on."""
    parts: dict[str, Any] = {"cell": asdict(cell), "samples": [CALIBRATION, EVALUATION]}
    parts["model"] = json.loads(MODELS[cell.model].onnx().with_suffix(".json").read_text())["sha256"]
    parts["lengths"] = sorted(MODELS[cell.model].lengths.items())
    parts["tools"] = {tool: _version(tool) for tool in TOOLS.get(cell.target, ())}
    root = Path(__file__).parents[2]
    parts["draws"] = [_digest(root / "benchmarks" / "zoo" / f"{name}.py") for name in ("pictures", "texts")]
    compiler = root / "compiler"
    files = sorted(file for pattern in SOURCES.get(cell.target, ()) for file in compiler.glob(pattern))
    if cell.kind == "build":
        parts["source"] = [_digest(file) for file in files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _version(tool: str) -> str:
    try:
        return version(tool)
    except PackageNotFoundError:
        return ""


def result_of(cell: Cell) -> dict[str, Any] | None:
    """Return the cell's result when it is there and nothing that it depends on has changed since."""
    path = cell.folder / RESULT
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result.get("key") == key_of(cell) else None


def work_on(cell: Cell, *, limit_s: float) -> dict[str, Any]:
    """Return the cell's result, worked out in a process of its own when it is not there.

    The result says "error", "reason" and "hint" when there is no artefact.
    """
    if cell.kind != "capture":
        captured = work_on(capture_of(cell), limit_s=limit_s)
        if captured.get("error"):
            return captured
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    with cell.folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two commands may want the same cell
        found = result_of(cell)
        if found is not None:
            return found
        key = key_of(cell)
        shutil.rmtree(cell.folder, ignore_errors=True)
        cell.folder.mkdir()
        (cell.folder / "job.json").write_text(json.dumps(asdict(cell)))
        outcome = _run(cell.folder, limit_s)
        made = cell.folder / OUTCOME
        result = json.loads(made.read_text()) if made.exists() else outcome
        whole: dict[str, Any] = result | {"key": key} | asdict(cell)
        (cell.folder / RESULT).write_text(json.dumps(whole, indent=1) + "\n")
        return whole


def _run(folder: Path, limit_s: float) -> dict[str, Any]:
    """Run the worker; return why there is no result, if there is none."""
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TVM_NUM_THREADS"), "1")
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cells.worker", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"error": f"not done after {limit_s:.0f} s", "reason": "time", "hint": ""}
    record = folder / "error.json"
    if record.exists():
        failure = json.loads(record.read_text())
        return {"error": failure["message"], "reason": failure["reason"], "hint": failure["hint"]}
    lines = [line for line in (folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip()[:300] if lines else ""
    return {"error": f"the process ended with code {code}: {last}", "reason": "crash", "hint": ""}
