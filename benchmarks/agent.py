"""What the agent adds to its light model, and what other servers add to the same one.

`python -m benchmarks.agent [--quick] [--json FILE]`. Unmodified `tritonclient`, 1 and 8 clients, one request at a time
each, asks in turn: a floor (the agent's gRPC stack with nothing behind it, which decodes and echoes; and the same with
the runtime called in the handler), the agent as `isthmus edge run` starts it, MLServer, and Triton with its Python
backend. All compute with ONNX Runtime on one thread; every server and the clients are processes of their own.

The floor's time is that of the echo plus that of the bare runtime call; the floor's throughput is that of the server
which calls the runtime in its handler. Ratios are taken in each round and their median is shown, with the quartiles.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from isthmus import tls13

tls13.enforce()  # before anything imports grpc

from benchmarks.result import Goal, publish  # noqa: E402
from benchmarks.servers import Child, ServedModel, ServerError, child, mlserver, workload  # noqa: E402
from benchmarks.servers.bundle import write_triton_model  # noqa: E402
from benchmarks.servers.load import percentile  # noqa: E402
from benchmarks.servers.site import running  # noqa: E402
from isthmus.terminal import note  # noqa: E402

MOST_LATENCY: Final = 1.15  # of the floor's p50, one client
LEAST_THROUGHPUT: Final = 0.9  # of the floor's, eight clients
MANY: Final = 8
BARE: Final = "runtime, bare"
ECHO: Final = "floor, echo"
FLOOR: Final = "floor, with runtime"
AGENT: Final = "agent"
MLSERVER: Final = "MLServer"
TRITON: Final = "Triton, Python backend"
_LEAST: Final = 4  # calls of each client


@dataclass(slots=True)
class Measured:
    """What each server did for one model, by round; `times` are milliseconds of every call."""

    times: dict[tuple[str, int], list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    rates: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))

    def p50s(self, server: str, clients: int = 1) -> Any:
        """Return the median time of each round."""
        return np.array([percentile(times, 50) for times in self.times[server, clients]])

    def throughputs(self, server: str) -> Any:
        """Return the calls a second of many clients, by round."""
        return np.array(self.rates[server, MANY])


@contextmanager
def servers(models: Mapping[str, ServedModel], folder: Path) -> Iterator[dict[str, str]]:
    """Start all that there are; yield where each listens."""
    files = [f"{name}={model.onnx}" for name, model in models.items()]
    floor = ["-m", "benchmarks.servers.floor"]
    with ExitStack() as stack:
        site = stack.enter_context(running(folder, models))
        echo = stack.enter_context(child("echo", [*floor, *files], folder))
        infer = stack.enter_context(child("floor", [*floor, "--infer", *files], folder))
        addresses = {ECHO: echo.read()["address"], FLOOR: infer.read()["address"], AGENT: site.agent_address}
        for name, model in models.items():
            write_triton_model(folder / "repository" / name, model)
        command = ("-m", "benchmarks.servers.triton", folder / "repository")
        addresses[TRITON] = stack.enter_context(child("triton", command, folder)).read()["address"]
        if mlserver.is_installed():
            (folder / "mlserver").mkdir()
            addresses[MLSERVER] = stack.enter_context(mlserver.serving(models.values(), folder / "mlserver"))
        else:
            note("MLServer is left out: python -m benchmarks.servers.mlserver installs it")
        yield addresses


def measure(load: Child, model: ServedModel, addresses: Mapping[str, str], *, rounds: int, seconds: float) -> Measured:
    """Ask every server in turn, again and again.

    Raises:
        ServerError: A request failed.
    """
    measured = Measured()
    for index in range(-1, rounds):  # the first one warms up
        for server, clients in [(BARE, 1), *((server, count) for count in (1, MANY) for server in addresses)]:
            job: dict[str, Any] = {"inputs": str(model.inputs), "seconds": seconds if index >= 0 else 0.0}
            if server == BARE:
                job |= {"onnx": str(model.onnx), "least": _LEAST}
            else:
                job |= {"address": addresses[server], "model": model.name, "clients": clients, "least": _LEAST}
            done = load.ask(job)
            if done["failures"]:
                raise ServerError(f"{server}: {done['failures'][0]}")
            if index >= 0:
                measured.times[server, clients].append(done["ms"])
                measured.rates[server, clients].append(len(done["ms"]) / done["elapsed_s"])
    return measured


def rows_of(model: str, measured: Measured) -> list[dict[str, Any]]:
    """Return the table's rows of one model; p50 and p99 over all calls, throughput as the median of the rounds."""
    rows = []
    for server in dict.fromkeys(server for server, _ in measured.times):
        row: dict[str, Any] = {"model": model, "server": server}
        for clients in (1, MANY):
            times = [time for part in measured.times.get((server, clients), []) for time in part]
            row |= {
                f"p50 ms, {clients}": percentile(times, 50) if times else None,
                f"p99 ms, {clients}": percentile(times, 99) if times else None,
            }
        rate = measured.rates.get((server, MANY))
        rows.append(row | {f"calls/s, {MANY}": round(float(np.median(rate))) if rate else None})
    return rows


def goals_of(model: str, measured: Measured) -> list[Goal]:
    """Return the goals: a ratio below its limit, the median of the rounds."""
    agent, agent_rate = measured.p50s(AGENT), measured.throughputs(AGENT)
    floor = measured.p50s(ECHO) + measured.p50s(BARE)
    goals = [
        _goal(f"{model}: agent p50 / floor p50, 1 client", agent / floor, MOST_LATENCY),
        _goal(
            f"{model}: floor calls/s / agent calls/s, {MANY} clients",
            measured.throughputs(FLOOR) / agent_rate,
            round(1 / LEAST_THROUGHPUT, 3),
        ),
    ]
    for peer in (MLSERVER, TRITON):
        if (peer, 1) in measured.times:
            goals.append(_goal(f"{model}: agent p50 / {peer} p50, 1 client", agent / measured.p50s(peer), 1.0))
            ratio = measured.throughputs(peer) / agent_rate
            goals.append(_goal(f"{model}: {peer} calls/s / agent calls/s, {MANY} clients", ratio, 1.0))
    return goals


def _goal(name: str, ratios: Any, limit: float) -> Goal:
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return Goal(f"{name} (quartiles {low:.2f}, {high:.2f})", round(float(middle), 3), limit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Start, measure, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agent", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few short rounds")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    rounds, seconds = (3, 0.3) if chosen.quick else (15, 1.0)
    rows: list[dict[str, Any]] = []
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = {model.name: model for model in (workload.small(folder), workload.medium(folder))}
        with (
            servers(models, folder) as addresses,
            child("load", ["-m", "benchmarks.servers.load"], folder) as load,
        ):
            for name, model in models.items():
                measured = measure(load, model, addresses, rounds=rounds, seconds=seconds)
                rows += rows_of(name, measured)
                goals += goals_of(name, measured)
    publish("agent", rows, goals, chosen.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
