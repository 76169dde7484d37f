"""How fast a variant is and how much memory it takes: measured in a process of its own, after warming up.

A process that has built a model, or run another one, has other memory, other caches and other threads than a device
that loads the artefact and serves. `python -m compiler.measure JOB` is that process; `measure` starts it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load_file, save_file

from compiler.processes import Budget, run_process
from isthmus.tensors import Array

WARM_UP_RUNS: Final = 10
LEAST_RUNS: Final = 20
WARM_UP_S: Final = 0.2
_RESULT: Final = "result.json"


class Timing(BaseModel):
    """Times and memory of one variant on this machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    load_ms: float  # from the file to the first possible request, one thread
    p50_ms: float  # one sample, one thread
    p99_ms: float
    least_ms: float
    threads: int  # all cores that may be used
    p50_threads_ms: float  # one sample, all threads
    batch: int
    samples_per_s: float  # in batches of `batch`, all threads
    peak_rss_mib: float  # of the whole process
    model_rss_mib: float  # what loading and running added to a process that had the runtime imported


class MeasureJob(BaseModel):
    """What the process is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    entry: Path
    threads: int
    seconds: float


def measure(
    target: str,
    entry: Path,
    one: Mapping[str, Array],
    many: Mapping[str, Array],
    *,
    folder: Path,
    budget: Budget,
    seconds: float = 0.5,
    batch: int = 1,
) -> Timing:
    """Return what one variant takes.

    Args:
        target: A key of `compiler.targets.TARGETS`.
        entry: What its build wrote.
        one: A request with one sample.
        many: A request with `batch` samples, or the same one.
        folder: An empty folder for the process's files.
        budget: How many threads count as all, and the memory that may be used.
        seconds: How long each of the three figures is measured.
        batch: How many samples `many` holds.
    """
    for name, arrays in (("one", one), ("many", many)):
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, folder / f"{name}.safetensors")
    job = MeasureJob(target=target, entry=entry.resolve(), threads=budget.cores, seconds=seconds)
    (folder / "job.json").write_text(job.model_dump_json())
    run_process("compiler.measure", folder, what=f"measuring {target}", budget=budget)
    figures = MeasureResult.model_validate_json((folder / _RESULT).read_bytes())
    return Timing(
        **figures.model_dump(exclude={"batches_per_s"}), batch=batch, samples_per_s=figures.batches_per_s * batch
    )


class MeasureResult(BaseModel):
    """What the process says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    load_ms: float
    p50_ms: float
    p99_ms: float
    least_ms: float
    threads: int
    p50_threads_ms: float
    batches_per_s: float
    peak_rss_mib: float
    model_rss_mib: float


def _measure(folder: Path) -> MeasureResult:
    from compiler.targets import load_target

    job = MeasureJob.model_validate_json((folder / "job.json").read_bytes())
    one, many = (load_file(folder / f"{name}.safetensors") for name in ("one", "many"))
    target = load_target(job.target, role="light")
    before = _rss_mib()
    begun = time.perf_counter()
    runner = target.open(job.entry, threads=1)
    load_ms = (time.perf_counter() - begun) * 1e3
    alone = times(runner, one, job.seconds)
    rss = _rss_mib() - before
    peak = _peak_mib()
    del runner
    wide = target.open(job.entry, threads=job.threads)
    threaded = times(wide, one, job.seconds)
    batches = times(wide, many, job.seconds)
    return MeasureResult(
        load_ms=load_ms,
        p50_ms=_milliseconds(alone, 50),
        p99_ms=_milliseconds(alone, 99),
        least_ms=min(alone) * 1e3,
        threads=job.threads,
        p50_threads_ms=_milliseconds(threaded, 50),
        batches_per_s=1 / float(np.median(batches)),
        peak_rss_mib=peak,
        model_rss_mib=rss,
    )


def times(runner: Any, inputs: Mapping[str, Array], seconds: float) -> list[float]:
    """Return the seconds of each run, after warming up, for `seconds` and `LEAST_RUNS` runs at least."""
    begun = time.perf_counter()
    for _ in range(WARM_UP_RUNS):
        runner.infer(inputs)
        if time.perf_counter() - begun > WARM_UP_S:
            break
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < LEAST_RUNS:
        start = time.perf_counter()
        runner.infer(inputs)
        found.append(time.perf_counter() - start)
    return found


def _milliseconds(found: list[float], percentile: int) -> float:
    return float(np.percentile(found, percentile)) * 1e3


def _rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / (1 << 20)


def _peak_mib() -> float:
    # Not getrusage: what it says of a new program includes the peak of the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def main() -> None:
    """Measure what the folder on the command line says, as the process of `measure`."""
    from compiler.processes import serve

    def work(folder: Path) -> None:
        (folder / _RESULT).write_text(_measure(folder).model_dump_json())

    serve(Path(sys.argv[1]), work)


if __name__ == "__main__":
    main()
