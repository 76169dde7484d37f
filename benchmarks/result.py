"""The one form of a benchmark's result: rows, goals, machine and commit; printed as tables, written as JSON."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isthmus.terminal import show_table


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio that should stay at or below a limit."""

    goal: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        """Return whether the limit is kept."""
        return self.value <= self.limit


def publish(name: str, rows: Sequence[Mapping[str, Any]], goals: Sequence[Goal], out: Path | None) -> None:
    """Print the tables of one benchmark and write its JSON file when one is wanted."""
    show_table(name, rows)
    goal_rows = [asdict(goal) | {"holds": goal.holds} for goal in goals]
    show_table("goals", goal_rows)
    if out is not None:
        write(name, rows, goals, out)


def write(name: str, rows: Sequence[Mapping[str, Any]], goals: Sequence[Goal], out: Path) -> None:
    """Write the JSON file of one benchmark; rows may have columns of their own."""
    told = [asdict(goal) | {"holds": goal.holds} for goal in goals]
    record = {"name": name, "machine": machine(), "commit": commit(), "rows": list(rows), "goals": told}
    out.write_text(json.dumps(record, indent=2) + "\n")


def machine() -> str:
    """Return what the figures were measured on, in words."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.processor() or "unknown processor",
    )
    count = sum(line.startswith("processor") for line in _lines(Path("/proc/cpuinfo")))
    return f"{count} x {model}, {platform.system()} {platform.release()}, Python {platform.python_version()}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def commit() -> str:
    """Return the commit of the checkout, or nothing outside one."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()
