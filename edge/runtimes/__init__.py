"""What executes the light model: one adapter file for each runtime, loaded only when it is chosen.

A runtime is added with one file, one line in `RUNTIMES` and one extra in pyproject.toml; one contract suite
(tests/edge/test_runtimes.py) runs over the whole table.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

from isthmus.errors import BundleError, ConfigError, MissingExtraError, OverloadedError
from isthmus.memory import trim
from isthmus.tensors import Array

RUNTIMES: Final[Mapping[str, str]] = {
    "openvino": "edge.runtimes.openvino:OpenVinoRuntime",
    "onnxruntime": "edge.runtimes.onnxruntime:OnnxRuntime",
    "tvm": "edge.runtimes.tvm:TvmRuntime",
}


class Runtime(Protocol):
    """An opened light model. Calls come from one thread at a time."""

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name, as arrays that nothing else writes to; `inputs` may be read-only.

        Raises:
            InputError: The model cannot compute these values.
        """
        ...

    def close(self) -> None:
        """Free the model; nothing is called afterwards."""
        ...


class _Adapter(Protocol):
    def __call__(self, path: Path, *, threads: int, inference_precision: str) -> Runtime: ...


def is_installed(name: str) -> bool:
    """Return whether the runtime is known and its library can be imported here."""
    return name in RUNTIMES and importlib.util.find_spec(name) is not None


def open_runtime(name: str, path: Path, *, threads: int = 1, inference_precision: str = "f32") -> Runtime:
    """Open the model file at `path` (seconds for a large model).

    Args:
        name: A key of `RUNTIMES`.
        path: The variant's entry file.
        threads: Threads that one inference may use.
        inference_precision: The precision that the variant was verified with: "f32", "bf16" or "f16".

    Raises:
        ConfigError: There is no such runtime, or it cannot compute in this precision.
        MissingExtraError: Its library is not installed.
        BundleError: It refuses the file.
    """
    if name not in RUNTIMES:
        raise ConfigError(f"no runtime {name!r}; there are {', '.join(RUNTIMES)}")
    if not is_installed(name):
        raise MissingExtraError(f"runtime {name}", f"edge-{name}")
    if not path.is_file():
        raise BundleError(f"runtime {name}: there is no model file {path.name}", reason="model-file-missing")
    module, _, attribute = RUNTIMES[name].partition(":")
    adapter: _Adapter = getattr(importlib.import_module(module), attribute)
    return adapter(path, threads=threads, inference_precision=inference_precision)


_INLINE_S: Final = 0.001  # a call that takes less costs the event loop less than two changes of threads cost the caller
_PACE_WEIGHT: Final = 0.2  # of the newest call in the usual time of one


class Worker:
    """Runs one runtime's blocking calls, one at a time, with a bounded queue before it.

    Calls run on a thread of this worker's own. A call that is expected to take under a millisecond, by what the calls
    before it took for each byte of input, runs where it is made when nothing waits or runs: changing threads twice
    would take several times as long as a small model.

    Args:
        runtime: Used and closed by this worker only.
        queue: Calls that may wait; one more is refused.
    """

    def __init__(self, runtime: Runtime, *, queue: int = 64) -> None:
        self._runtime = runtime
        self._limit = queue + 1  # the one that runs
        self.pending = 0  # calls that wait or run
        self._turn = threading.Lock()  # a call whose caller went away may still run on the thread
        self._pace = math.inf  # usual seconds for a byte of input; nothing is known before the first call
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="light-model")

    async def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs; a caller that is cancelled while it waits frees its place in the queue.

        Raises:
            OverloadedError: The queue is full.
        """
        if self.pending >= self._limit:
            raise OverloadedError(f"the light model is busy: {self.pending} requests are waiting")
        size = max(1, sum([array.nbytes for array in inputs.values()]))
        if self.pending == 0 and self._pace * size < _INLINE_S and self._turn.acquire(blocking=False):
            try:
                return self._timed(inputs, size)
            finally:
                self._turn.release()
        self.pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._in_turn, inputs, size)
        finally:
            self.pending -= 1

    def _in_turn(self, inputs: Mapping[str, Array], size: int) -> dict[str, Array]:
        with self._turn:
            return self._timed(inputs, size)

    def _timed(self, inputs: Mapping[str, Array], size: int) -> dict[str, Array]:
        started = time.perf_counter()
        outputs = self._runtime.infer(inputs)
        pace = (time.perf_counter() - started) / size
        self._pace = pace if self._pace == math.inf else self._pace + _PACE_WEIGHT * (pace - self._pace)
        return outputs

    async def time_beside(
        self, other: Worker, inputs: Mapping[str, Array], others: Mapping[str, Array]
    ) -> tuple[float, float]:
        """Return the seconds that one call takes here and one takes there, one right after the other.

        Neither runs beside a call of its own worker, and none of the time that they wait for that counts.

        Args:
            other: A worker that is open.
            inputs: For this one's runtime.
            others: For the other's.

        Raises:
            InputError: A runtime cannot compute its inputs.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._time_both, other, inputs, others)

    def _time_both(
        self, other: Worker, inputs: Mapping[str, Array], others: Mapping[str, Array]
    ) -> tuple[float, float]:
        with self._turn, other._turn:
            return _seconds(self._runtime, inputs), _seconds(other._runtime, others)

    def close(self) -> None:
        """Close the runtime after the calls that are queued; returns at once."""
        self._executor.submit(_close, self._runtime)
        self._executor.shutdown(wait=False)


def _seconds(runtime: Runtime, inputs: Mapping[str, Array]) -> float:
    started = time.perf_counter()
    runtime.infer(inputs)
    return time.perf_counter() - started


def _close(runtime: Runtime) -> None:
    """Close a runtime, and return to the system what the C library keeps of its memory: versions come and go."""
    runtime.close()
    trim()
