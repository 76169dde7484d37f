"""SIGKILL at every named step and at random instants of an update: the device always starts into a whole version."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # 26 s on a quiet machine, hundreds of processes
KILLS = 200


def kill(folder: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.edge.killed_device", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_kill_at_every_named_step_is_survived(tmp_path: Path) -> None:
    found = kill(tmp_path, "steps")["found"]
    assert len(found) == 18
    before = ("plan", "fetch", "verify", "apply", "self-test")
    assert {found[f"{moment} {step}"] for moment in ("before", "after") for step in before} == {"serves 1"}
    assert found["before soak"] == "serves 2"  # the state has named it, and memory has not
    assert (found["before roll-back"], found["after roll-back"]) == ("serves 3", "serves 2")


def test_kills_at_random_instants_are_survived(tmp_path: Path) -> None:
    told = kill(tmp_path, "random", str(KILLS), "20260302")
    assert sum(told["found"].values()) == KILLS
    assert {"serves 1", "serves 2"} <= set(told["found"])  # how far a life gets is up to the machine
    assert len(told["steps"]) >= 2
