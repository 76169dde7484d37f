"""Runs the device's own adapters on an emulated Arm processor, in a Python of its own; see `setup`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors.numpy import load_file, save_file

from isthmus.tensors import Array

CHECKOUT: Final = Path(__file__).resolve().parents[2]
FOLDER: Final = CHECKOUT / "build" / "aarch64"
ROOT: Final = FOLDER / "root"
SITE: Final = FOLDER / "site"
CPUINFO: Final = ROOT / "proc" / "cpuinfo"
_SECONDS: Final = 170


def what_is_missing() -> str:
    """Return what keeps this machine from emulating the device; empty when nothing does."""
    if shutil.which("qemu-aarch64") is None:
        return "qemu-aarch64 is missing: apt install qemu-user"
    if not (FOLDER / "complete").is_file():
        return "no Arm Python: make aarch64"
    return ""


@dataclass(frozen=True, slots=True)
class Job:
    """One model, one call."""

    runtime: str  # a key of edge.runtimes.RUNTIMES
    entry: Path
    inputs: Mapping[str, Array]


def infer(jobs: Sequence[Job], folder: Path) -> list[dict[str, Array]]:
    """Return what `edge.runtimes` computes on the emulated device, all in one process there.

    Raises:
        subprocess.CalledProcessError: It failed there; `stderr` holds why.
    """
    arguments = []
    for number, job in enumerate(jobs):
        work = folder / f"job-{number}"
        work.mkdir()
        save_file(dict(job.inputs), work / "inputs.safetensors")
        arguments += [job.runtime, str(job.entry), str(work)]
    run(["-m", "tests.aarch64.infer", *arguments])
    return [load_file(folder / f"job-{number}" / "outputs.safetensors") for number in range(len(jobs))]


def run(arguments: list[str]) -> str:
    """Run the emulated Python with these arguments; return what it printed.

    Raises:
        subprocess.CalledProcessError: It failed; `stderr` holds why.
    """
    path = ":".join(str(folder) for folder in (SITE, CHECKOUT / "proto", CHECKOUT))
    command = ["qemu-aarch64", "-L", str(ROOT), "-E", f"PYTHONPATH={path}", "-E", "PYTHONDONTWRITEBYTECODE=1"]
    done = subprocess.run(
        [*command, str(ROOT / "usr" / "bin" / "python3.11"), *arguments],
        check=True, capture_output=True, text=True, timeout=_SECONDS, cwd=FOLDER,
    )  # fmt: skip
    return done.stdout
