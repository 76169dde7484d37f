"""Requests as an application sends them: the unmodified `tritonclient.grpc`, one client for each worker.

Every request is kept as one row (`Record`), failures included; all figures of the report are computed from these rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from examples.quickstart.datasets import Array, Split

DEADLINE_S: Final = 1.0
ROUTES: Final = ("edge", "cloud", "fallback", "failed")
BATCH: Final = 32
_DATATYPES: Final = {"int64": "INT64", "int32": "INT32", "float32": "FP32"}


@dataclass(frozen=True, slots=True)
class Record:
    """One request and what came back."""

    sample: int
    started: float  # seconds since the epoch
    latency_ms: float
    route: str
    reason: str
    version: int
    prediction: int  # -1 when it failed
    score: float


@dataclass(slots=True)
class Recording:
    """Rows in the order in which requests ended."""

    records: list[Record] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write all rows as one array per column."""
        columns = {
            name: np.array([getattr(record, name) for record in self.records]) for name in Record.__dataclass_fields__
        }
        np.savez_compressed(path, **columns)

    def routes(self) -> dict[str, int]:
        """Count the rows of each route."""
        return {route: sum(record.route == route for record in self.records) for route in ROUTES}


class Application:
    """What runs beside the agent and asks it: a model name, samples, and a deadline for each request."""

    def __init__(self, address: str, model: str, *, route: str = "") -> None:
        self._client = triton.InferenceServerClient(address)
        self._model = model
        self._parameters: dict[str, Any] = {"isthmus.route": route} if route else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, inputs: Mapping[str, Array], rows: slice, *, deadline_s: float = DEADLINE_S) -> list[Record]:
        """Send the rows as one request and return one record for each row."""
        tensors = []
        for name, array in inputs.items():
            tensor = triton.InferInput(name, list(array[rows].shape), _DATATYPES[array.dtype.name])
            tensor.set_data_from_numpy(np.ascontiguousarray(array[rows]))
            tensors.append(tensor)
        started, clock = time.time(), time.perf_counter()
        try:
            result = self._client.infer(
                self._model, tensors, client_timeout=deadline_s, parameters=self._parameters or None
            )
        except InferenceServerException as error:
            latency = (time.perf_counter() - clock) * 1e3
            reason = f"{error.status()}: {error.message()}"
            return [Record(i, started, latency, "failed", reason, 0, -1, 0.0) for i in range(rows.start, rows.stop)]
        latency = (time.perf_counter() - clock) * 1e3
        return _records(result, rows, started, latency)


def _records(result: Any, rows: slice, started: float, latency_ms: float) -> list[Record]:
    response = result.get_response()
    parameters = response.parameters
    predictions = np.asarray(result.as_numpy("logits")).argmax(axis=1)
    return [
        Record(
            sample=rows.start + offset,
            started=started,
            latency_ms=latency_ms,
            route=parameters["isthmus.route"].string_param,
            reason=parameters["isthmus.reason"].string_param,
            version=int(response.model_version),
            prediction=int(prediction),
            score=parameters["isthmus.score"].double_param,
        )
        for offset, prediction in enumerate(predictions)
    ]


def send_all(
    address: str,
    model: str,
    split: Split,
    *,
    workers: int,
    route: str = "",
    tick: Callable[[Recording], None],
) -> Recording:
    """Send every sample once, one by one; batches only for the heavy model alone, where no score is of interest.

    (A batch is one request with one route and one score, the smallest of its rows.)

    Args:
        address: Where the agent listens.
        model: Its model.
        split: The samples.
        workers: Clients that send at the same time.
        route: "edge" or "cloud" to force it, empty to let the agent decide; a forced one that is not to be had fails.
        tick: Called after each request with all rows so far.
    """
    recording, lock = Recording(), threading.Lock()
    jobs = _slices(len(split), BATCH if route == "cloud" else 1)

    def work() -> None:
        with Application(address, model, route=route) as application:
            while True:
                with lock:
                    rows = next(jobs, None)
                if rows is None:
                    return
                records = application.ask(split.inputs, rows, deadline_s=30.0 if route else DEADLINE_S)
                with lock:
                    recording.records.extend(records)
                    tick(recording)

    with ThreadPoolExecutor(workers) as pool:
        for worker in [pool.submit(work) for _ in range(workers)]:
            worker.result()  # a defect in a worker must not pass for fewer requests
    return recording


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


class SteadyLoad:
    """Samples over and over from a few clients in the background, while something happens to the servers.

    Between two requests each client waits, so that the load stays the same whether the cloud answers or not.
    """

    def __init__(self, address: str, model: str, split: Split, *, workers: int = 2, rate: float = 40.0) -> None:
        self.recording = Recording()
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._pool = ThreadPoolExecutor(workers)
        self._clients = [
            partial(self._work, address, model, split, worker, workers, workers / rate) for worker in range(workers)
        ]
        self._running: list[Future[None]] = []

    def __enter__(self) -> Self:
        self._running = [self._pool.submit(client) for client in self._clients]
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._pool.shutdown()
        for client in self._running:
            client.result()  # a defect in a client must not pass for requests that did not fail

    def since(self, moment: float) -> list[Record]:
        """Return the rows of requests that started after `moment` (seconds since the epoch)."""
        with self._lock:
            return [record for record in self.recording.records if record.started >= moment]

    def _work(self, address: str, model: str, split: Split, first: int, step: int, interval_s: float) -> None:
        with Application(address, model) as application:
            sample = first
            while not self._done.is_set():
                begun = time.monotonic()
                records = application.ask(split.inputs, slice(sample, sample + 1))
                with self._lock:
                    self.recording.records.extend(records)
                sample = (sample + step) % len(split)
                self._done.wait(max(0.0, begun + interval_s - time.monotonic()))
