"""A long steady load, and a cloud that dies and comes back: no error, no growth of memory, no lost file descriptors.

`python -m benchmarks.soak [--minutes 20] [--quick] [--json FILE]`. A real agent serves the smart-meter story's light
model, a third of whose requests escalate to a real cloud. Capacity is measured first, with eight clients that ask
without pause; then they send 70 % of it. After a third of the time the cloud is killed, after two thirds it is started
again. Growth is that of the last tenth of the time over the first tenth, the warm-up before it left out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from isthmus import tls13

tls13.enforce()  # before anything imports grpc

from safetensors.numpy import load_file  # noqa: E402

from benchmarks.result import Goal, publish  # noqa: E402
from benchmarks.servers import Child, ServedModel, child, workload  # noqa: E402
from benchmarks.servers.load import open_session, percentile  # noqa: E402
from benchmarks.servers.site import Site, running  # noqa: E402
from edge.status_client import fetch_status  # noqa: E402
from isthmus.scores import ScoreOptions, open_score  # noqa: E402
from isthmus.terminal import note  # noqa: E402

LOAD: Final = 0.7  # of the capacity
ESCALATED: Final = 0.33
MOST_GROWTH: Final = 0.05  # of the resident memory
CLIENTS: Final = 8
_ROWS: Final = 256
PHASES: Final = ("healthy", "cloud dead", "healthy again")


@dataclass(slots=True)
class Sample:
    """What one slice of the load saw, and what the agent held after it."""

    phase: str
    ms: list[float]
    routes: Counter[str]
    failures: list[str]
    rss_kib: int
    descriptors: int


@dataclass(slots=True)
class Soak:
    """The samples so far, and the answers of the warm-up before them."""

    warm: int = 0
    samples: list[Sample] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """Return the table's rows, one for each phase."""
        return [_row(phase, [sample for sample in self.samples if sample.phase == phase]) for phase in PHASES]

    def goals(self, *, counted: int) -> list[Goal]:
        """Return the goals; `counted` is how many answers the agent itself has counted."""
        tenth = max(1, len(self.samples) // 10)
        first, last = self.samples[:tenth], self.samples[-tenth:]
        rss = median(s.rss_kib for s in last) / median(s.rss_kib for s in first) - 1
        descriptors = median(s.descriptors for s in last) - median(s.descriptors for s in first)
        answered = self.warm + sum(sample.routes.total() for sample in self.samples)
        return [
            Goal("errors", sum(len(sample.failures) for sample in self.samples), 0),
            Goal("growth of resident memory", round(rss, 4), MOST_GROWTH),
            Goal("growth of file descriptors", descriptors, 0),
            Goal("answers that agent and clients count differently", abs(counted - answered), 0),
        ]


def _row(phase: str, samples: Sequence[Sample]) -> dict[str, Any]:
    times = [value for sample in samples for value in sample.ms]
    routes = sum((sample.routes for sample in samples), Counter[str]())
    return {
        "phase": phase,
        "answers": len(times),
        **{route: routes[route] for route in ("edge", "cloud", "fallback")},
        "errors": sum(len(sample.failures) for sample in samples),
        "p50 ms": percentile(times, 50),
        "p99 ms": percentile(times, 99),
        "RSS MiB": round(median(sample.rss_kib for sample in samples) / 1024, 1),
        "descriptors": median(sample.descriptors for sample in samples),
    }


def threshold_of(model: ServedModel) -> float:
    """Return the score below which a third of the model's requests lie."""
    session = open_session(model.onnx)
    logits = session.run(["logits"], load_file(model.inputs))[0]
    scores = open_score("max_probability", ScoreOptions("logits"))({"logits": logits})
    return float(np.quantile(scores, ESCALATED))


def resident_kib(pid: int) -> int:
    """Return the resident memory of a process, KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])


def descriptors(pid: int) -> int:
    """Return how many file descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@dataclass(frozen=True, slots=True)
class Length:
    """How long the load lasts, each of its slices, and the warm-up before it."""

    minutes: float
    slice_s: float
    warm_s: float


QUICK: Final = Length(0.4, slice_s=1.0, warm_s=2.0)


def run(folder: Path, model: ServedModel, length: Length) -> tuple[list[dict[str, Any]], list[Goal]]:
    """Start the servers and soak them; return the rows of the table, and the goals."""
    with (
        running(folder, {model.name: model}, threshold=threshold_of(model)) as site,
        child("load", ["-m", "benchmarks.servers.load"], folder) as load,
    ):
        result = soak(site, load, model, length)
        return result.rows(), result.goals(counted=counted(site))


def soak(site: Site, load: Child, model: ServedModel, length: Length) -> Soak:
    """Measure the capacity, then put 70 % of it on the agent for so many minutes, the cloud's death included."""
    job = {"address": site.agent_address, "model": model.name, "inputs": str(model.inputs), "clients": CLIENTS}
    warm = [load.ask(job | {"seconds": length.warm_s / 2}) for _ in range(2)]
    capacity = len(warm[-1]["ms"]) / warm[-1]["elapsed_s"]
    note(f"capacity {capacity:.0f} requests/s; {LOAD:.0%} of it for {length.minutes:g} minutes")
    warm.append(load.ask(job | {"seconds": length.warm_s, "rate": LOAD * capacity}))
    result, pid = Soak(warm=sum(len(part["ms"]) for part in warm)), site.agent.process.pid
    for phase in PHASES:
        if phase == "cloud dead":
            site.cloud.kill()
        elif phase == "healthy again":
            site.restart_cloud()
        until = time.monotonic() + length.minutes * 60 / len(PHASES)
        while time.monotonic() < until:
            done = load.ask(job | {"seconds": length.slice_s, "rate": LOAD * capacity})
            told = Counter(done["routes"]), done["failures"], resident_kib(pid), descriptors(pid)
            result.samples.append(Sample(phase, done["ms"], *told))
    return result


def counted(site: Site) -> int:
    """Return how many answers the agent has counted."""
    return sum(sum(model["answers"].values()) for model in fetch_status(site.agent_address)["models"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Start, soak, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="how long the load lasts (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="half a minute")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    length = QUICK if chosen.quick else Length(chosen.minutes, slice_s=5.0, warm_s=30.0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows, goals = run(folder, workload.small(folder, rows=_ROWS), length)
    publish("soak", rows, goals, chosen.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
