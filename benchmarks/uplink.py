"""What a bad cloud costs the device: the real agent, escalating through a link and to a gateway that fail in six ways.

`python -m benchmarks.uplink [--quick] [--json FILE]`. The cloud, the agent (`isthmus edge run`, default settings) and
the clients are three processes on this machine. Two clients (tritonclient) send at a steady pace: one only requests of
which the light model is sure, one only hard ones. In turn, the cloud is healthy for a while, then one of

    refuses      its port is closed
    black hole   connections and bytes are taken, and nothing is ever said
    stalls       answers begin with their headers and never go on
    garbage      answers are no messages
    errors       answers are INTERNAL
    flaps        the port opens and closes, three times a second

and then healthy again. A ratio is the p99 of the sure requests during a fault over the mean of those in the healthy
times just before and after; the median of all rounds counts. All times are from the moment of the change at the cloud.
After a fault
the agent waits for a new connection (refuses, black hole, flaps) or for its next probe (the others), whose wait has
doubled with each that failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from isthmus import tls13

tls13.enforce()  # before anything imports grpc

import grpc  # noqa: E402
import numpy as np  # noqa: E402
import tritonclient.grpc as triton  # noqa: E402
from tritonclient.utils import InferenceServerException  # noqa: E402

from benchmarks.result import Goal, publish  # noqa: E402
from edge.status_client import fetch_status  # noqa: E402
from isthmus.oip import read_parameters  # noqa: E402
from isthmus.v1 import agent_pb2, agent_pb2_grpc  # noqa: E402
from tests.edge import bundles, faulty_cloud  # noqa: E402
from tests.edge.simulated_cloud import CODE, SimulatedCloud, simulated_cloud  # noqa: E402

MODEL: Final = "triage"
DEADLINE_S: Final = 0.5
SURE_EVERY_S: Final = 0.005
HARD_EVERY_S: Final = 0.05
PATIENCE_S: Final = 60.0
HEALTHY: Final = "healthy"
ANSWERS: Final[dict[str, faulty_cloud.Behaviour]] = {
    "stalls": faulty_cloud.stall_after_headers,
    "garbage": faulty_cloud.garbage,
    "errors": faulty_cloud.refusing(grpc.StatusCode.INTERNAL),
}
FAULTS: Final = ("refuses", "black hole", *ANSWERS, "flaps")
REASONS: Final = {  # those that the agent may give, on a busy machine "deadline"; "uncertain" is an answer of the cloud
    "refuses": {"deadline", "unavailable"},
    "black hole": {"deadline", "unavailable"},
    "stalls": {"deadline", "unavailable"},
    "garbage": {"bad-response", "deadline", "unavailable"},
    "errors": {"deadline", "unavailable"},
    "flaps": {"deadline", "unavailable", "uncertain"},
}


@dataclass(slots=True)
class Segment:
    """What the clients saw during one state of the cloud."""

    sure_ms: list[float] = field(default_factory=list)
    hard_ms: list[float] = field(default_factory=list)
    late: int = 0  # not answered within the deadline
    wrong: int = 0  # answered with a reason that is not the fault's
    opened_s: float | None = None
    recovered_s: float | None = None

    @property
    def p99_ms(self) -> float:
        """Return the p99 of the sure requests."""
        return float(np.percentile(self.sure_ms, 99))


class Client:
    """Sends one row at a time and keeps what came back."""

    def __init__(self, address: str, row: Any) -> None:
        self._client = triton.InferenceServerClient(address)
        self._tensor = triton.InferInput("x", list(row.shape), "FP32").set_data_from_numpy(row)

    def ask(self) -> tuple[float, dict[str, Any] | None]:
        """Return the milliseconds that a request took, and its explanation; None when there was no answer."""
        begun = time.perf_counter()
        try:
            result = self._client.infer(MODEL, [self._tensor], client_timeout=DEADLINE_S)
        except InferenceServerException:
            return (time.perf_counter() - begun) * 1e3, None
        return (time.perf_counter() - begun) * 1e3, read_parameters(result.get_response().parameters)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


@dataclass(frozen=True, slots=True)
class Site:
    """A running cloud and a running agent."""

    commands: IO[str]  # to the cloud
    echo: IO[str]  # of the commands that have been done
    agent: agent_pb2_grpc.AgentServiceStub
    sure: Client
    hard: Client

    def tell(self, state: str) -> None:
        """Change the state of the cloud; return when it has changed."""
        self.commands.write(state + "\n")
        self.commands.flush()
        self.echo.readline()

    def breaker(self) -> str:
        """Return the state of the agent's breaker."""
        return str(self.agent.GetStatus(agent_pb2.GetStatusRequest(), timeout=PATIENCE_S).uplink.breaker)

    def observe(self, state: str, seconds: float) -> Segment:
        """Load the agent for so long from now on."""
        segment, begun = Segment(), time.monotonic()
        end = begun + seconds
        thread = threading.Thread(target=self._hard, args=(segment, state, begun, end))
        thread.start()
        for _ in _paced(SURE_EVERY_S, end):
            took_ms, told = self.sure.ask()
            segment.sure_ms.append(took_ms)
            segment.late += told is None or took_ms > DEADLINE_S * 1e3
            segment.wrong += told is not None and told["isthmus.route"] != "edge"
        thread.join()
        return segment

    def _hard(self, segment: Segment, state: str, begun: float, end: float) -> None:
        expected = {"uncertain"} if state == HEALTHY else REASONS[state]
        for _ in _paced(HARD_EVERY_S, end):
            took_ms, told = self.hard.ask()
            segment.hard_ms.append(took_ms)
            segment.late += told is None or took_ms > DEADLINE_S * 1e3
            segment.wrong += told is not None and told["isthmus.reason"] not in expected
            if state != HEALTHY and segment.opened_s is None and self.breaker() == "open":
                segment.opened_s = time.monotonic() - begun

    def recover(self) -> float:
        """Make the cloud healthy and return the seconds until it answers a request again.

        Raises:
            SystemExit: It does not.
        """
        self.tell(HEALTHY)
        begun = time.monotonic()
        for _ in _paced(0.02, begun + PATIENCE_S):
            _, told = self.hard.ask()
            if told is not None and told["isthmus.route"] == "cloud":
                return time.monotonic() - begun
        raise SystemExit("the agent did not find the cloud again")


def _paced(interval_s: float, end: float) -> Iterator[None]:
    due = time.monotonic()
    while due < end:
        time.sleep(max(0.0, due - time.monotonic()))
        yield
        due = max(due + interval_s, time.monotonic())


@contextmanager
def _site(folder: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        cloud = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.uplink", "--cloud", str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
        stack.callback(cloud.kill)
        if cloud.stdin is None or cloud.stdout is None:
            raise RuntimeError("the cloud has no pipes")
        address = cloud.stdout.readline().strip()
        command = [sys.executable, "-m", "isthmus", "edge"]
        home, ready, trust = folder / "device", folder / "ready.json", folder / "workspace/trust"
        enrolment = ["enrol", "--cloud", address, "--code", CODE, "--trust", str(trust), "--home", str(home)]
        subprocess.run([*command, *enrolment], check=True, capture_output=True)
        running = ["run", "--home", str(home), "--model", MODEL, "--listen", "127.0.0.1:0", "--ready-file", str(ready)]
        log = stack.enter_context((folder / "agent.log").open("wb"))
        agent = stack.enter_context(subprocess.Popen([*command, *running], stderr=log, stdout=log))
        stack.callback(agent.terminate)
        _wait(ready.exists)
        listening = json.loads(ready.read_bytes())["address"]
        _wait(lambda: fetch_status(listening)["models"][0]["version"] == 1)
        clients = Client(listening, bundles.SURE), Client(listening, bundles.HARD)
        for client in clients:
            stack.callback(client.close)
        channel = stack.enter_context(grpc.insecure_channel(listening))
        yield Site(cloud.stdin, cloud.stdout, agent_pb2_grpc.AgentServiceStub(channel), *clients)


def _wait(condition: Callable[[], bool]) -> None:
    for _ in _paced(0.05, time.monotonic() + PATIENCE_S):
        if condition():
            return
    raise SystemExit("the agent did not start")


async def _serve_cloud(folder: Path) -> None:
    cloud = SimulatedCloud(folder / "workspace")
    cloud.publish(1)
    cloud.release(1)
    async with simulated_cloud(cloud), faulty_cloud.Link(cloud.address) as link:
        _say(link.address)
        flapping: asyncio.Future[None] | None = None
        while state := (await asyncio.to_thread(sys.stdin.readline)).strip():
            if flapping is not None:
                flapping.cancel()
                await asyncio.wait([flapping])
            flapping = asyncio.ensure_future(_flap(link)) if state == "flaps" else None
            await _change(cloud, link, state)
            _say(state)


async def _change(cloud: SimulatedCloud, link: faulty_cloud.Link, state: str) -> None:
    cloud.inference.behaviour = ANSWERS.get(state, faulty_cloud.right)
    if state == HEALTHY:
        await link.heal()
    elif state == "refuses":
        await link.refuse()
    elif state == "black hole":
        link.black_hole()


async def _flap(link: faulty_cloud.Link) -> None:
    while True:
        await link.refuse()
        await asyncio.sleep(1 / 6)
        await link.heal()
        await asyncio.sleep(1 / 6)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _measure(site: Site, *, rounds: int, seconds: float) -> tuple[list[Segment], dict[str, list[Segment]]]:
    """Return the healthy times, one more than there are faults, and what came between them, by fault."""
    site.recover()
    healthy, faulty = [site.observe(HEALTHY, seconds)], {fault: list[Segment]() for fault in FAULTS}
    for fault in FAULTS * rounds:
        site.tell(fault)
        during = site.observe(fault, seconds)
        during.recovered_s = site.recover()
        faulty[fault].append(during)
        healthy.append(site.observe(HEALTHY, seconds))
    return healthy, faulty


def _ratios(healthy: Sequence[Segment], faulty: Sequence[Segment], place: int) -> list[float]:
    """Return the ratios of the fault at this place of each round."""
    around = zip(healthy[place :: len(FAULTS)], healthy[place + 1 :: len(FAULTS)], faulty, strict=False)
    return [2 * during.p99_ms / (before.p99_ms + after.p99_ms) for before, after, during in around]


def _row(name: str, segments: Sequence[Segment], ratios: Sequence[float]) -> dict[str, Any]:
    count = sum(len(segment.sure_ms) + len(segment.hard_ms) for segment in segments)
    opened = [segment.opened_s for segment in segments if segment.opened_s is not None]
    recovered = [segment.recovered_s for segment in segments if segment.recovered_s is not None]
    return {
        "cloud": name,
        "requests": count,
        "in_time": 1 - sum(segment.late for segment in segments) / count,
        "wrong_reason": sum(segment.wrong for segment in segments),
        "sure_p99_ms": round(float(np.median([segment.p99_ms for segment in segments])), 2),
        "ratio": round(float(np.median(ratios)), 3) if ratios else None,
        "ratio_quartiles": "-".join(f"{q:.2f}" for q in np.percentile(ratios, [25, 75])) if ratios else None,
        "hard_p50_ms": round(float(np.percentile([ms for segment in segments for ms in segment.hard_ms], 50)), 2),
        "opens_s": round(float(np.median(opened)), 2) if opened else None,
        "recovers_s": round(float(np.median(recovered)), 2) if recovered else None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.uplink", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--cloud", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.cloud is not None:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_serve_cloud(chosen.cloud))
        return 0
    with tempfile.TemporaryDirectory(prefix="uplink-") as scratch, _site(Path(scratch)) as site:
        site.observe(HEALTHY, 1.0)  # warm
        healthy, faulty = _measure(site, rounds=1 if chosen.quick else 15, seconds=2.0)
    rows = [_row(HEALTHY, healthy, [])]
    rows += [
        _row(fault, segments, _ratios(healthy, segments, place))
        for place, (fault, segments) in enumerate(faulty.items())
    ]
    faults = {row["cloud"]: row for row in rows[1:]}
    goals = [
        Goal("requests not answered in time, share", 1 - min(row["in_time"] for row in rows), 0.0),
        Goal("answers with a wrong reason", sum(row["wrong_reason"] for row in rows), 0.0),
        Goal("p99 of sure requests, worst fault / healthy", max(row["ratio"] for row in faults.values()), 1.1),
        Goal("the breaker opens, s", max(row["opens_s"] or 0.0 for row in faults.values()), 3 * DEADLINE_S),
        Goal("recovery by a new connection, s", _worst(faults, "refuses", "black hole", "flaps"), 2.0),
        Goal("recovery by a probe, s", _worst(faults, *ANSWERS), 5.0),
    ]
    publish("uplink", rows, goals, chosen.json)
    return 0


def _worst(rows: dict[str, dict[str, Any]], *faults: str) -> float:
    return float(max(rows[fault]["recovers_s"] for fault in faults))


if __name__ == "__main__":
    sys.exit(main())
