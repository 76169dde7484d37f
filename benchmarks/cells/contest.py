"""Contestants for one model, timed in turn in one process on one core: `python -m benchmarks.cells.contest FOLDER`.

In each round every contestant runs its share of requests and keeps the least time, so that other load on the machine
meets all of them alike. Ratios are taken round by round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.zoo.model import Array

_SHARE_S: Final = 0.03  # of one contestant in one round
_MOST_RUNS: Final = 30


@dataclass(frozen=True, slots=True)
class Contestant:
    """An artefact and what opens it."""

    name: str
    ours: bool
    opener: str  # a target of ours, or a peer
    entry: str  # what the target's build wrote, or the peer's folder


def contest(
    model: str, contestants: Sequence[Contestant], folder: Path, *, rounds: int, core: int, limit_s: float
) -> dict[str, list[float]]:
    """Return the least seconds of each contestant in each round."""
    folder.mkdir(parents=True, exist_ok=True)
    job = {"model": model, "rounds": rounds, "contestants": [asdict(contestant) for contestant in contestants]}
    (folder / "job.json").write_text(json.dumps(job))
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TVM_NUM_THREADS"), "1")
    command = ["taskset", "-c", str(core), sys.executable, "-m", "benchmarks.cells.contest", str(folder)]
    with (folder / "log.txt").open("wb") as log:
        subprocess.run(command, stdout=log, stderr=log, env=os.environ | one, check=True, timeout=limit_s)
    times: dict[str, list[float]] = json.loads((folder / "times.json").read_text())
    return times


def ratio(times: Mapping[str, Sequence[float]], first: str, second: str) -> float:
    """Return how long the first takes in terms of the second: the median over the rounds."""
    return median(a / b for a, b in zip(times[first], times[second], strict=True))


def _run(folder: Path) -> None:
    from safetensors.numpy import load_file

    from benchmarks.cells import Cell
    from benchmarks.cells.worker import EVALUATION_FILE
    from compiler.data import request
    from compiler.worker import read_captured

    job = json.loads((folder / "job.json").read_text())
    source = Cell(job["model"], "capture").folder
    samples = load_file(source / EVALUATION_FILE)
    one = request(read_captured(source), samples, 0, 1)
    runs = {entry["name"]: _open(Contestant(**entry)) for entry in job["contestants"]}
    counts = {name: _count(infer, one) for name, infer in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(job["rounds"]):
        for name, infer in runs.items():
            times[name].append(min(_timed(infer, one) for _ in range(counts[name])))
    (folder / "times.json").write_text(json.dumps(times))


def _open(contestant: Contestant) -> Callable[[Mapping[str, Array]], Any]:
    if contestant.ours:
        from compiler.targets import load_target

        return load_target(contestant.opener, role="light").open(Path(contestant.entry), threads=1).infer
    from benchmarks.peers import PEERS

    return PEERS[contestant.opener].open(Path(contestant.entry))


def _count(infer: Callable[[Mapping[str, Array]], Any], one: Mapping[str, Array]) -> int:
    warm = min(_timed(infer, one) for _ in range(3))
    return max(1, min(_MOST_RUNS, int(_SHARE_S / warm)))


def _timed(infer: Callable[[Mapping[str, Array]], Any], one: Mapping[str, Array]) -> float:
    start = time.perf_counter()
    infer(one)
    return time.perf_counter() - start


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
