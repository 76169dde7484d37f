"""Servers of one and the same model, each a process of its own, and the processes that put load on them.

Every server gets the model's ONNX file and computes with ONNX Runtime on one thread; every one listens on a TCP port of
the loopback interface and speaks the Open Inference Protocol. A server says `{"address": ...}` in a line of its
standard output when it listens.

    floor.py      the gRPC stack alone: a servicer on tritonclient's stubs
    site.py       `isthmus edge run`, installed from a real cloud by the usual commands
    bundle.py     what is installed
    mlserver.py   MLServer, in an environment of its own
    triton.py     the real Triton with its Python backend
    load.py       clients, and the bare runtime
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from examples.quickstart.programs import environment

_STOP_S: Final = 10.0


class ServerError(Exception):
    """A process of the benchmark does not do what it should; the message names its log."""


@dataclass(slots=True)
class Child:
    """A process that says in lines of JSON what it has to say."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    def read(self) -> Any:
        """Return the next line.

        Raises:
            ServerError: The process ended.
        """
        assert self.process.stdout is not None  # noqa: S101 - opened as a pipe
        line = self.process.stdout.readline()
        if not line:
            raise ServerError(f"{self.name} ended with {self.process.wait()}; its log is {self.log}")
        return json.loads(line)

    def ask(self, question: Mapping[str, Any]) -> Any:
        """Write a line and return the one that answers it."""
        assert self.process.stdin is not None  # noqa: S101
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.read()


@contextmanager
def child(
    name: str,
    arguments: Sequence[str | Path],
    folder: Path,
    *,
    python: str = sys.executable,
    variables: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> Iterator[Child]:
    """Run `python ARGUMENTS`; its standard error goes to NAME.log in the folder. It ends with the context.

    Args:
        name: Of the process and its log.
        arguments: Of the interpreter.
        folder: Where the log goes.
        python: The interpreter, for servers with an environment of their own.
        variables: The environment; this process's own when left out.
        quiet: It has nothing to say: its standard output goes to the log as well.
    """
    path = folder / f"{name}.log"
    with path.open("a") as log:
        process = subprocess.Popen(
            [python, *(str(argument) for argument in arguments)],
            stdin=subprocess.PIPE,
            stdout=log if quiet else subprocess.PIPE,
            stderr=log,
            text=True,
            env=dict(environment() if variables is None else variables),
            start_new_session=True,
        )
    try:
        yield Child(name, process, path)
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it started, too
    process.wait()
    for pipe in (process.stdin, process.stdout):
        _close(pipe)


def _close(pipe: IO[str] | None) -> None:
    if pipe is not None:
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model under its name, with typical requests for it."""

    name: str
    onnx: Path
    inputs: Path  # safetensors, one request a row
