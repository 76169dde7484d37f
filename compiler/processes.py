"""Each build and each measurement is a process of its own, within a budget of cores and memory.

The tools are large C++ libraries: one that crashes, leaks or keeps threads must not take the compilation with it. A
process gets a folder with its job, writes its result there, and says on standard output how far it is. What the tools
print goes to `log.txt` in that folder.

Rules:
* A process that asks for more than the memory that is left is ended, and tried again while nothing else runs; when the
  whole budget is not enough for it alone, that is the error.
* Errors of this project pass from the process to its parent as they are. Anything else becomes a `ToolCrashError` with
  the last line of the log.
* No process outlives its parent, whatever ends it.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from isthmus.errors import ConfigError, InputError, IsthmusError, UnavailableError

Advance = Callable[[str, int, int], None]

LOG: Final = "log.txt"
_ERROR: Final = "error.json"
_POLL_S: Final = 0.1
_PR_SET_PDEATHSIG: Final = 1
_MEMORY_SHARE: Final = 0.8  # of what is free, when nobody says how much may be used
_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TVM_NUM_THREADS")


class ToolCrashError(InputError):
    """A tool ended without an error of its own: by a signal, or by an exception that this project does not know."""

    reason = "tool-crashed"


class NotEnoughMemoryError(ConfigError):
    """A build needs more memory than it may have."""

    reason = "not-enough-memory"


class CancelledError(UnavailableError):
    """Somebody ended the compilation."""

    reason = "cancelled"
    exit_code = 130


@dataclass(slots=True)
class Budget:
    """What all processes together may use.

    Args:
        cores: Threads of all processes.
        memory: Bytes of all processes.
        jobs: Processes at the same time.
    """

    cores: int
    memory: int
    jobs: int
    _free: threading.Condition = field(default_factory=threading.Condition)
    _running: dict[int, _Process] = field(default_factory=dict)
    _used: int = 0  # places that are taken
    _exclusive: bool = False  # by one that wants no other beside it
    stopped: bool = False

    @property
    def threads(self) -> int:
        """Return how many threads one of `jobs` processes has."""
        return max(1, self.cores // self.jobs)

    def stop(self) -> None:
        """End all processes; those that wait do not start."""
        with self._free:
            self.stopped = True
            for process in self._running.values():
                process.kill()
            self._free.notify_all()

    @contextmanager
    def place(self, *, alone: bool) -> Iterator[None]:
        """Wait for one of the places, or for all of them."""
        limit = 1 if alone else self.jobs
        with self._free:
            self._free.wait_for(lambda: self.stopped or (not self._exclusive and self._used < limit))
            if self.stopped:
                raise CancelledError("the compilation was ended")
            self._exclusive = alone
            self._used += 1
        try:
            yield
        finally:
            with self._free:
                self._used -= 1
                self._exclusive = False
                self._free.notify_all()

    def add(self, process: _Process) -> None:
        """Count a process."""
        with self._free:
            self._running[process.popen.pid] = process
            if self.stopped:
                process.kill()

    def remove(self, process: _Process) -> None:
        """Count a process no more."""
        with self._free:
            self._running.pop(process.popen.pid, None)

    def excess(self, process: _Process) -> bool:
        """Return whether memory is exceeded and this process has to go: the youngest of those that run."""
        with self._free:
            total = sum(other.rss() for other in self._running.values())
            youngest = max(self._running.values(), key=lambda other: other.begun, default=process)
            return total > self.memory and process is youngest


def default_budget(cores: int = 0, memory_gib: float = 0.0, jobs: int = 0) -> Budget:
    """Return a budget; zero means all cores, most of the free memory, a process for each core (four at most)."""
    available = len(os.sched_getaffinity(0))
    cores = min(cores or available, available)
    memory = int(memory_gib * (1 << 30)) or int(_free_memory() * _MEMORY_SHARE)
    return Budget(cores=cores, memory=memory, jobs=min(jobs or min(cores, 4), cores))


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 4 << 30


@dataclass(slots=True)
class _Process:
    popen: subprocess.Popen[bytes]
    begun: float

    def rss(self) -> int:
        """Return the resident memory of the process and its children, in bytes."""
        total = 0
        for pid in (self.popen.pid, *_children(self.popen.pid)):
            with suppress(OSError, ValueError, IndexError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        return total

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    try:
        direct = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*direct, *(deeper for child in direct for deeper in _children(child))]


def run_process(
    module: str, folder: Path, *, what: str, budget: Budget, advance: Advance | None = None, path: Path | None = None
) -> None:
    """Run `python -m module folder` and wait for it.

    Args:
        module: One whose `main` calls `serve`.
        folder: The process's own, with its job.
        what: What it does, for messages.
        budget: Where it finds a place.
        advance: Told (stage, done, total) as the process says it.
        path: A further folder from which Python modules may be imported.

    Raises:
        IsthmusError: What the process raised.
        ToolCrashError: It ended in another way.
        NotEnoughMemoryError: It needs more than all the memory of the budget.
    """
    with budget.place(alone=False):
        done = _attempt(module, folder, what, budget, advance, path)
    if not done:
        with budget.place(alone=True):
            done = _attempt(module, folder, what, budget, advance, path)
    if not done:
        raise NotEnoughMemoryError(
            f"{what} needs more than the {budget.memory / (1 << 30):.3g} GiB that may be used",
            hint="give more with --memory, free some, or leave this variant out of the recipe",
        )


def _attempt(module: str, folder: Path, what: str, budget: Budget, advance: Advance | None, path: Path | None) -> bool:
    """Return whether the process came to an end; False: it was ended for its memory."""
    for old in folder.glob(_ERROR):
        old.unlink()
    search = [str(path)] if path else []
    environment = os.environ | dict.fromkeys(_THREAD_VARIABLES, str(budget.threads))
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, sys.path), *search])
    with (folder / LOG).open("wb") as log:
        popen = subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True, env=environment,
        )  # fmt: skip
    process = _Process(popen, time.monotonic())
    budget.add(process)
    try:
        fits = _follow(process, budget, advance)
        code = popen.wait()
    finally:
        process.kill()
        popen.wait()
        budget.remove(process)
        if popen.stdout is not None:
            popen.stdout.close()
    if budget.stopped:
        raise CancelledError("the compilation was ended")
    if fits and code != 0:
        raise _error(folder, what, code)
    return fits


def _follow(process: _Process, budget: Budget, advance: Advance | None) -> bool:
    """Pass on what the process says until it closes its output; return False when its memory is too much."""
    stream = process.popen.stdout
    assert stream is not None  # noqa: S101  # it was opened as a pipe
    os.set_blocking(stream.fileno(), False)
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if budget.excess(process):
                process.kill()
                return False
            if not selector.select(_POLL_S):
                continue
            data = stream.read()
            if data == b"":
                return True
            *lines, rest = (rest + (data or b"")).split(b"\n")
            for line in lines:
                _pass_on(line, advance)


def _pass_on(line: bytes, advance: Advance | None) -> None:
    if advance is None:
        return
    stage, done, total = json.loads(line)
    advance(stage, done, total)


def _error(folder: Path, what: str, code: int) -> IsthmusError:
    record = folder / _ERROR
    if record.is_file():
        return _restore(json.loads(record.read_text()))
    lines = [line for line in (folder / LOG).read_text(errors="replace").splitlines() if line.strip()]
    ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return ToolCrashError(
        f"{what}: the process ended with {ending}" + (f": {lines[-1].strip()[:300]}" if lines else ""),
        hint="this is a defect of the tool or of the model: use another target or precision",
    )


def serve(folder: Path, work: Callable[[Path], None]) -> None:
    """Be the process: do the work, write what goes wrong for the parent, and end with its parent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _claim_output()
    try:
        work(folder)
    except IsthmusError as error:
        _record(folder, error)
        sys.exit(1)
    except OSError as error:  # a full disk, a file that went away
        what = f"{error.filename}: " if error.filename else ""
        _record(folder, InputError(f"{what}{error.strerror or error}", reason="input-output"))
        sys.exit(1)
    except MemoryError:
        _record(folder, NotEnoughMemoryError("memory ran out", hint="give more with --memory, or use another target"))
        sys.exit(1)


_output: Any = None  # where progress goes: the standard output that this process began with


def _claim_output() -> None:
    """Keep standard output for progress; what tools print goes to the log."""
    global _output  # a process has one standard output
    _output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)


def say(stage: str, done: int, total: int) -> None:
    """Tell the parent how far this process is."""
    if _output is not None:
        _output.write(json.dumps([stage, done, total]) + "\n")


def _record(folder: Path, error: IsthmusError) -> None:
    kind = type(error)
    record = {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "message": error.message,
        "hint": error.hint,
        "reason": error.reason,
    }
    (folder / _ERROR).write_text(json.dumps(record))


def _restore(record: dict[str, str]) -> IsthmusError:
    """Return the error of the process; its class is one of this project's, which take message, hint and reason."""
    module, _, name = record["class"].partition(":")
    kind = getattr(import_module(module), name)
    error: IsthmusError = kind.__new__(kind)
    IsthmusError.__init__(error, record["message"], hint=record["hint"], reason=record["reason"])
    return error
