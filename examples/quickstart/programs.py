"""The programs of the story: `isthmus` commands as a person would type them, and the two servers as child processes.

Every command is printed before it runs, so that the terminal reads as a tutorial. Output of commands and servers goes
to log files in the story's folder; when one fails, the end of its log is in the error.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from rich.console import Console

LOG_TAIL: Final = 25  # lines of a log that go into an error
STOP_SECONDS: Final = 20.0


class ProgramError(Exception):
    """A command or server did not do what the story needs; the message carries the end of its log."""


@dataclass(slots=True)
class Shell:
    """Runs `isthmus` commands in the environment of this Python."""

    console: Console
    logs: Path
    last: list[str] = field(default_factory=list)

    def run(self, *args: str | Path) -> str:
        """Run one command to its end and return its standard output.

        Raises:
            ProgramError: It failed.
        """
        words = [str(arg) for arg in args]
        if words != self.last:  # asked again and again while waiting: one line is enough
            self._show(words)
        self.last = words
        done = subprocess.run([*command(), *words], capture_output=True, text=True, check=False, env=environment())
        with (self.logs / "commands.log").open("a") as log:
            log.write(f"$ isthmus {shlex.join(words)}\n{done.stdout}{done.stderr}\n")
        if done.returncode != 0:
            raise ProgramError(f"isthmus {words[0]} ended with {done.returncode}:\n{tail(done.stdout + done.stderr)}")
        return done.stdout

    def run_json(self, *args: str | Path) -> Any:
        """Run one command with --json and return what it printed."""
        return json.loads(self.run(*args, "--json"))

    def start(self, name: str, *args: str | Path) -> Server:
        """Start a server command; its log goes to NAME.log."""
        words = [str(arg) for arg in args]
        self._show([*words, "&"])
        ready = self.logs / f"{name}.ready.json"
        ready.unlink(missing_ok=True)
        log = (self.logs / f"{name}.log").open("a")
        process = subprocess.Popen(
            [*command(), *words, "--ready-file", str(ready)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
        return Server(name, process, ready, self.logs / f"{name}.log", log)

    def _show(self, words: list[str]) -> None:
        shown = shlex.join(words).replace(f"{Path.cwd()}/", "").replace("'&'", "&")
        self.console.print(f"  [dim]$[/] isthmus {shown}", highlight=False, soft_wrap=True)


@dataclass(slots=True)
class Server:
    """A server that says in its ready file where it listens."""

    name: str
    process: subprocess.Popen[bytes]
    ready_file: Path
    log: Path
    log_file: IO[str]

    def wait_ready(self, *, timeout_s: float = 120.0) -> Mapping[str, Any]:
        """Return the content of the ready file once it is there.

        Raises:
            ProgramError: The server ended, or was not ready in time.
        """
        wait_until(lambda: self.ready_file.exists() or not self.alive(), f"{self.name} to be ready", timeout_s)
        if not self.alive():
            raise ProgramError(f"{self.name} ended with {self.process.returncode}:\n{tail(self.log.read_text())}")
        return self.state()

    def state(self) -> Mapping[str, Any]:
        """Return what the server last wrote about itself."""
        content: Mapping[str, Any] = json.loads(self.ready_file.read_text())
        return content

    def alive(self) -> bool:
        """Return whether the process runs."""
        return self.process.poll() is None

    def kill(self) -> None:
        """Kill it the hard way, as a crash would."""
        self.process.kill()
        self.process.wait()
        self.log_file.close()

    def stop(self) -> None:
        """Ask it to end, and insist after a while."""
        if self.alive():
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log_file.close()


def command() -> list[str]:
    """Return how to run `isthmus` with this Python."""
    return [sys.executable, "-m", "isthmus"]


def environment() -> dict[str, str]:
    """Return this process's environment with the checkout's packages importable and this Python first on PATH."""
    paths = [str(Path.cwd()), str(Path.cwd() / "proto"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float, *, every_s: float = 0.05) -> None:
    """Wait until a condition holds.

    Raises:
        ProgramError: It did not within the time.
    """
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise ProgramError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(every_s)


def tail(text: str) -> str:
    """Return the last lines of a log."""
    return "\n".join(text.rstrip().splitlines()[-LOG_TAIL:])
