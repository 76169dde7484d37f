"""Measures the gateway; see the package."""

from __future__ import annotations

import asyncio
import json as jsonlib
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any, Final

import typer

from benchmarks.result import Goal, publish
from isthmus import tls13

tls13.enforce()  # before anything imports grpc

import numpy as np  # noqa: E402

from benchmarks.fleet import CloudProcess, connect_devices, open_cloud, raise_file_limit  # noqa: E402
from benchmarks.servers.triton import start as start_triton  # noqa: E402
from benchmarks.servers.triton import wait_until_live  # noqa: E402
from cloud.client import Address, CloudClient  # noqa: E402
from isthmus.tensors import encode_request  # noqa: E402
from security.tokens import TokenIssuer  # noqa: E402
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace  # noqa: E402

ROUNDS: Final = 20
QUICK_ROUNDS: Final = 3
SLICE_S: Final = 0.5
QUICK_SLICE_S: Final = 0.5
DEVICES: Final = 1000
QUICK_DEVICES: Final = 100
CONCURRENCY: Final = (1, 8)
MOST_HOPS: Final = 1.2
MOST_VERIFY_US: Final = 5.0
MOST_KIB: Final = 100.0
QUIET_SHARE: Final = 0.8  # of the processors, idle: other programs would be measured, too
MOST_WAIT_S: Final = 3.0
_SAMPLE_S: Final = 0.1
_QUIET_S: Final = 12.0  # after connecting: until the cloud has given back what handshakes left

app = typer.Typer()


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="A shorter form for checks.")] = False,
    json: Annotated[Path | None, typer.Option(help="Where the figures go.")] = None,
) -> None:
    """Measure latency, the warm path of a token, and memory for each device."""
    raise_file_limit()
    rounds, slice_s = (QUICK_ROUNDS, QUICK_SLICE_S) if quick else (ROUNDS, SLICE_S)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-")))
        workspace = make_workspace(folder / "workspace")
        triton = stack.enter_context(_triton(folder))
        cloud = stack.enter_context(open_cloud(workspace, ("--triton", triton)))
        with CloudClient(Address(cloud.address, workspace.trust, workspace.token_file())) as client:
            client.publish(make_bundle(folder / "bundle", 1), workspace.operator)
        echo = stack.enter_context(
            _process("echo", str(workspace.home / "server.key"), str(workspace.home / "server.pem"))
        )
        callers = stack.enter_context(_process("callers"))
        jobs = _jobs(workspace, cloud, triton, _answer(echo)["address"])
        pids = {"gateway": cloud.pid, "hop": echo.pid}
        rows = [_latency(callers, jobs, pids, count, rounds, slice_s) for count in CONCURRENCY]
        verify_us = _verify_us(workspace)
        kib = asyncio.run(_kib_per_device(workspace, cloud, folder, QUICK_DEVICES if quick else DEVICES))
    goals = [
        *(Goal(f"added p50 / hop, {row['callers']} callers", row["added / hop"], MOST_HOPS) for row in rows),
        Goal("token verification, us", round(verify_us, 2), MOST_VERIFY_US),
        Goal("KiB per connected device", round(kib, 1), MOST_KIB),
    ]
    publish("gateway", rows, goals, json)


def _jobs(workspace: Workspace, cloud: CloudProcess, triton: str, echo: str) -> dict[str, dict[str, Any]]:
    """Return what the callers do in each of the three slices."""
    x = {"x": np.array([[1, 2, 3, 4]], dtype=np.float32)}
    ca = str(workspace.trust / "ca.pem")
    asked = encode_request("triage", x).SerializeToString().hex()
    plain = encode_request("triage@1", x).SerializeToString().hex()
    token = workspace.token("client")
    return {
        "direct": {"address": triton, "ca": "", "token": "", "request": plain},
        "gateway": {"address": cloud.address, "ca": ca, "token": token, "request": asked},
        "hop": {"address": echo, "ca": ca, "token": token, "request": asked},
    }


def _latency(
    callers: subprocess.Popen[str],
    jobs: dict[str, dict[str, Any]],
    pids: dict[str, int],
    count: int,
    rounds: int,
    slice_s: float,
) -> dict[str, Any]:
    """Return the medians of the three, and what the gateway adds; the first round warms up.

    `pids` are the processes whose time is taken, by the names of the jobs that they do.
    """
    found: dict[str, list[float]] = {name: [] for name in jobs}
    p99: dict[str, list[float]] = {name: [] for name in jobs}
    cpu_us: dict[str, list[float]] = {name: [] for name in pids}
    quiet = 0
    for place in range(rounds + 1):
        quiet += _wait_for_quiet() if place else 0
        for name, job in jobs.items():
            before_s = _cpu_s(pids[name]) if name in pids else 0.0
            ms = _ask(callers, job | {"callers": count, "seconds": slice_s})
            if place:
                if name in pids:
                    cpu_us[name].append((_cpu_s(pids[name]) - before_s) / len(ms) * 1e6)
                found[name].append(median(ms))
                p99[name].append(quantiles(ms, n=100)[98])
    added = [gateway - direct for gateway, direct in zip(found["gateway"], found["direct"], strict=True)]
    return {
        "callers": count,
        "quiet rounds": f"{quiet} of {rounds}",
        "direct p50 ms": round(median(found["direct"]), 3),
        "gateway p50 ms": round(median(found["gateway"]), 3),
        "gateway p99 ms": round(median(p99["gateway"]), 3),
        "hop p50 ms": round(median(found["hop"]), 3),
        "added p50 ms": round(median(added), 3),
        "added / hop": round(median(a / hop for a, hop in zip(added, found["hop"], strict=True)), 3),
        "gateway CPU us": round(median(cpu_us["gateway"])),
        "hop CPU us": round(median(cpu_us["hop"])),
        "CPU / hop": round(median(a / hop for a, hop in zip(cpu_us["gateway"], cpu_us["hop"], strict=True)), 3),
    }


def _cpu_s(pid: int) -> float:
    """Return the processor seconds of a process's threads so far, to the nanosecond: /proc/PID/stat counts in ticks."""
    spent = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has just ended
            spent += int((thread / "schedstat").read_text().split()[0])
    return spent / 1e9


def _wait_for_quiet() -> bool:
    """Wait until the machine has little else to do, for a while; return whether it has."""
    until = time.monotonic() + MOST_WAIT_S
    while time.monotonic() < until:
        before = _processor_time()
        time.sleep(_SAMPLE_S)
        after = _processor_time()
        if (after[1] - before[1]) >= QUIET_SHARE * max(after[0] - before[0], 1):
            return True
    return False


def _processor_time() -> tuple[int, int]:
    """Return how many ticks of all processors have passed, and how many of them idle."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return sum(ticks), ticks[3]


def _ask(callers: subprocess.Popen[str], job: dict[str, Any]) -> list[float]:
    if callers.stdin is None:
        raise SystemExit("a process of the benchmark reads nothing")
    callers.stdin.write(jsonlib.dumps(job) + "\n")
    callers.stdin.flush()
    answer = _answer(callers)
    if answer["failures"]:
        raise SystemExit(f"calls to {job['address']} failed: {answer['failures'][0]}")
    return [float(value) for value in answer["ms"]]


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line:
        raise SystemExit("a process of the benchmark has ended")
    answer: dict[str, Any] = jsonlib.loads(line)
    return answer


def _verify_us(workspace: Workspace) -> float:
    """Return the microseconds of verifying a token that was seen before."""
    verifier, token = TokenIssuer.load(workspace.home).verifier(), workspace.token("client")
    verifier.verify(token)
    timer = timeit.Timer(lambda: verifier.verify(token))
    return min(timer.repeat(repeat=7, number=20_000)) / 20_000 * 1e6


async def _kib_per_device(workspace: Workspace, cloud: CloudProcess, folder: Path, count: int) -> float:
    """Return the memory that the gateway takes for each device with an open stream, beyond what it took before."""
    async with connect_devices(workspace, cloud, folder, 20):  # what the first ones cost once is not theirs
        pass
    (folder / "devices").mkdir()
    before = cloud.rss_mib()
    async with connect_devices(workspace, cloud, folder / "devices", count):
        await asyncio.sleep(_QUIET_S)
        return (cloud.rss_mib() - before) * 1024 / count


@contextmanager
def _triton(folder: Path) -> Iterator[str]:
    (folder / "repository").mkdir()
    process, address = start_triton(folder / "repository", folder, ("--model-control-mode=explicit",))
    try:
        wait_until_live(process, address)
        yield address
    finally:
        process.kill()
        process.wait()


@contextmanager
def _process(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", f"benchmarks.gateway.{module}", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


if __name__ == "__main__":
    app()
