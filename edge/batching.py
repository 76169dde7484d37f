"""Dynamic batching: requests that come close together run as one batch of the light model.

The rules:

1. Requests whose inputs have equal names, types and shapes beyond the batch axis may share a batch.
2. A batch begins with its first request and takes more until it is full, or until its delay has passed and the model is
   free: a busy model costs no extra delay, and an idle one costs `delay_s` at most.
3. Batches run one after the other, in the order in which they began.
4. When a batch fails as a whole, each of its requests runs alone: one bad request does not spoil the others.
5. A caller that goes away before its batch runs is left out of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog

from edge.runtimes import Worker
from isthmus.bundle import Manifest
from isthmus.errors import InputError, OverloadedError
from isthmus.tensors import Array

_Signature = tuple[tuple[str, str, tuple[int, ...]], ...]

log = structlog.get_logger(__name__)


def takes_batches(manifest: Manifest) -> bool:
    """Return whether the first axis of every input and output is the batch."""
    return all(spec.shape[:1] == (-1,) for spec in (*manifest.inputs, *manifest.outputs))


@dataclass(eq=False, slots=True)
class _Waiting:
    inputs: Mapping[str, Array]
    rows: int
    answer: asyncio.Future[dict[str, Array]]


@dataclass(eq=False, slots=True)
class _Batch:
    requests: list[_Waiting] = field(default_factory=list)
    rows: int = 0
    full: asyncio.Event = field(default_factory=asyncio.Event)


class Batcher:
    """Gathers requests for a worker; used from the event loop only.

    Args:
        worker: Runs the batches, one at a time.
        delay_s: How long a request may wait for others.
        max_rows: Rows of a batch; a request that has more runs alone.
        queue: Requests that may wait; one more is refused.
    """

    def __init__(self, worker: Worker, *, delay_s: float, max_rows: int, queue: int = 64) -> None:
        self.pending = 0  # requests that wait or run
        self.worker = worker
        self._delay_s = delay_s
        self._max_rows = max_rows
        self._queue = queue
        self._running = 0  # requests of the batch that runs
        self._gathering: dict[_Signature, _Batch] = {}
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs for these inputs, whatever they ran with.

        Raises:
            OverloadedError: The queue is full.
            InputError: The model cannot compute these values.
        """
        if self.pending - self._running >= self._queue:
            raise OverloadedError(f"the light model is busy: {self.pending} requests are waiting")
        request = _Waiting(inputs, _rows(inputs), asyncio.get_running_loop().create_future())
        self._add(request)
        self.pending += 1
        try:
            return await request.answer
        finally:
            self.pending -= 1

    def close(self) -> None:
        """Close the runtime; nothing waits any more."""
        self.worker.close()

    def _add(self, request: _Waiting) -> None:
        signature = tuple((name, array.dtype.str, array.shape[1:]) for name, array in request.inputs.items())
        batch = self._gathering.get(signature)
        if batch is not None and batch.rows + request.rows > self._max_rows:
            batch.full.set()
            batch = None
        if batch is None:
            batch = self._gathering[signature] = _Batch()
            task = asyncio.create_task(self._run(signature, batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        batch.requests.append(request)
        batch.rows += request.rows
        if batch.rows >= self._max_rows:
            batch.full.set()

    async def _run(self, signature: _Signature, batch: _Batch) -> None:
        try:
            async with asyncio.timeout(self._delay_s):
                await batch.full.wait()
        except TimeoutError:
            pass
        async with self._turn:
            if self._gathering.get(signature) is batch:
                del self._gathering[signature]
            requests = [request for request in batch.requests if not request.answer.done()]
            self._running = len(requests)
            try:
                await self._answer(requests)
            finally:
                self._running = 0

    async def _answer(self, requests: Sequence[_Waiting]) -> None:
        if len(requests) > 1:
            try:
                await self._answer_together(requests)
            except Exception as error:  # whatever it was, each request finds out for itself
                log.warning("batch failed, its requests run alone", requests=len(requests), error=str(error)[:200])
        for request in requests:
            if not request.answer.done():
                await self._answer_alone(request)

    async def _answer_together(self, requests: Sequence[_Waiting]) -> None:
        joined = {name: np.concatenate([request.inputs[name] for request in requests]) for name in requests[0].inputs}
        outputs = await self.worker.infer(joined)
        total = sum(request.rows for request in requests)
        for name, array in outputs.items():
            if array.ndim == 0 or len(array) != total:
                raise InputError(f"output {name!r}: expected {total} rows, got shape {list(array.shape)}")
        start = 0
        for request in requests:
            stop = start + request.rows
            if not request.answer.done():
                request.answer.set_result({name: array[start:stop] for name, array in outputs.items()})
            start = stop

    async def _answer_alone(self, request: _Waiting) -> None:
        try:
            outputs = await self.worker.infer(request.inputs)
        except Exception as error:
            if not request.answer.done():
                request.answer.set_exception(error)
        else:
            if not request.answer.done():
                request.answer.set_result(outputs)


def _rows(inputs: Mapping[str, Array]) -> int:
    return len(next(iter(inputs.values())))
