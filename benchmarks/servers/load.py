"""Clients: unmodified `tritonclient`, one request at a time each; and the bare runtime, called in a loop.

`python -m benchmarks.servers.load` reads jobs from its standard input, one JSON object a line, and answers each with
its figures. A job is timed for `seconds`, and for at least `least` requests of each client:

    {"address": "127.0.0.1:1", "model": "small", "inputs": FILE, "clients": 8, "seconds": 1.0}
    {"onnx": FILE, "inputs": FILE, "seconds": 1.0}

With a "rate" the clients send so many requests a second together, on a schedule that does not wait for answers that are
late; every client asks for the rows of the inputs one after the other.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import tritonclient.grpc as triton
from safetensors.numpy import load_file

_TIMEOUT_S: Final = 10.0
_ROUTE: Final = "isthmus.route"


def open_session(path: Path) -> Any:
    """Open a model in ONNX Runtime on one thread, as every server here does."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Load:
    """Runs jobs; connections and sessions are kept for the next job."""

    def __init__(self) -> None:
        self._clients: dict[str, list[Any]] = {}
        self._sessions: dict[str, Any] = {}

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Return the milliseconds of every call, the seconds that all took together, and answers by route."""
        inputs = load_file(job["inputs"])
        routes: Counter[str] = Counter()
        calls = [self._session(job["onnx"], inputs)] if "onnx" in job else self._calls(job, inputs, routes)
        times: list[list[float]] = [[] for _ in calls]
        failures: list[str] = []
        begin, end = threading.Barrier(len(calls) + 1), [0.0]

        def work(place: int, call: Callable[[], object], mine: list[float]) -> None:
            begin.wait()
            try:
                if "rate" in job:
                    _pace(call, mine, end, (place / job["rate"], len(calls) / job["rate"]), failures)
                else:
                    _repeat(call, mine, end, job.get("least", 1))
            except Exception as error:  # reported by the process that asked
                failures.append(repr(error)[:500])

        threads = [threading.Thread(target=work, args=given) for given in zip(itertools.count(), calls, times)]
        for thread in threads:
            thread.start()
        started = time.perf_counter()
        end[0] = started + job["seconds"]
        begin.wait()
        for thread in threads:
            thread.join()
        elapsed = time.perf_counter() - started
        ms = [value for mine in times for value in mine]
        return {"ms": ms, "elapsed_s": elapsed, "failures": failures, "routes": dict(routes)}

    def _session(self, onnx: str, inputs: Mapping[str, Any]) -> Callable[[], object]:
        session = self._sessions.setdefault(onnx, None) or open_session(Path(onnx))
        self._sessions[onnx] = session
        return lambda: session.run(None, inputs)

    def _calls(
        self, job: Mapping[str, Any], inputs: Mapping[str, Any], routes: Counter[str]
    ) -> list[Callable[[], object]]:
        address, model = job["address"], job["model"]
        clients = self._clients.setdefault(address, [])
        while len(clients) < job["clients"]:
            # A channel of its own for each: clients are different programs.
            own = [("grpc.use_local_subchannel_pool", 1)]
            clients.append(triton.InferenceServerClient(address, channel_args=own))
        requests = [_tensors(inputs, row) for row in range(len(next(iter(inputs.values()))))]

        def asking(client: Any) -> Callable[[], object]:
            turn = itertools.cycle(requests)

            def ask() -> object:
                result = client.infer(model, next(turn), client_timeout=_TIMEOUT_S)
                routes[result.get_response().parameters[_ROUTE].string_param] += 1
                return result.as_numpy("logits").shape

            return ask

        return [asking(client) for client in clients[: job["clients"]]]


def _tensors(inputs: Mapping[str, Any], row: int) -> list[Any]:
    tensors = []
    for name, array in inputs.items():
        tensor = triton.InferInput(name, [1, *array.shape[1:]], "FP32")
        tensor.set_data_from_numpy(array[row : row + 1])
        tensors.append(tensor)
    return tensors


def _pace(
    call: Callable[[], object], times: list[float], end: list[float], schedule: tuple[float, float], failures: list[str]
) -> None:
    wait_s, every_s = schedule
    due = time.perf_counter() + wait_s
    while due < end[0]:
        time.sleep(max(0.0, due - time.perf_counter()))
        begun = time.perf_counter()
        try:
            call()
        except Exception as error:  # counted, and the load goes on
            failures.append(repr(error)[:500])
        else:
            times.append((time.perf_counter() - begun) * 1e3)
        due += every_s


def _repeat(call: Callable[[], object], times: list[float], end: list[float], least: int) -> None:
    now = time.perf_counter()
    while now < end[0] or len(times) < least:
        begun = now
        call()
        now = time.perf_counter()
        times.append((now - begun) * 1e3)


def percentile(values: list[float], percent: float) -> float:
    """Return a percentile of measured times."""
    return float(np.percentile(values, percent))


if __name__ == "__main__":
    load = Load()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(load.run(json.loads(line))) + "\n")
        sys.stdout.flush()
