"""Fuzz one target, or all in turn: with atheris (extra `fuzz`) by coverage, without it by mutation alone."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus import tls13


def fuzz(
    target: Annotated[str, typer.Argument(help="A name in tests.fuzz.targets, or `all`.")],
    seconds: Annotated[float, typer.Option(min=0.1, help="How long, for all targets together.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the mutations.")] = 0,
) -> None:
    """Print how many inputs were tried and accepted; end with an error, and the input, where one broke the target."""
    tls13.enforce()
    from tests.fuzz.targets import TARGETS

    names = list(TARGETS) if target == "all" else [target]
    if not set(names) <= set(TARGETS):
        raise typer.BadParameter(f"expected one of {', '.join(TARGETS)}, or all")
    run = _with_coverage if importlib.util.find_spec("atheris") else _by_mutation
    for name in names:
        typer.echo(json.dumps({"target": name, **run(name, seconds / len(names), seed)}))


def _by_mutation(name: str, seconds: float, seed: int) -> dict[str, Any]:
    from tests.fuzz.mutation import mutations
    from tests.fuzz.targets import TARGETS

    target, tried, accepted, end = TARGETS[name], 0, 0, time.monotonic() + seconds
    for data in mutations(target.seeds(), random.Random(seed)):
        if tried % 64 == 0 and time.monotonic() > end:
            break
        try:
            accepted += target.check(data)
        except Exception:
            typer.echo(f"{name} broke on {data!r}", err=True)
            raise
        tried += 1
    return {"engine": "mutation", "tried": tried, "accepted": accepted}


def _with_coverage(name: str, seconds: float, seed: int) -> dict[str, Any]:
    """Run libFuzzer in a process of its own: it ends the process that it runs in."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.fuzz.coverage", name, folder]
        flags = [
            f"-max_total_time={max(1, int(seconds))}",
            "-max_len=65536",
            f"-seed={seed + 1}",
            "-print_final_stats=1",
        ]
        done = subprocess.run(
            [*command, *flags], capture_output=True, text=True, errors="replace", check=False, cwd=Path.cwd(),
            env=os.environ | {"TMPDIR": folder},
        )  # fmt: skip
    if done.returncode != 0:
        typer.echo(done.stderr[-6000:], err=True)
        raise typer.Exit(1)
    stats = dict(line[6:].split(": ", 1) for line in done.stderr.splitlines() if line.startswith("stat::"))
    return {"engine": "atheris", "tried": int(stats["number_of_executed_units"]), "peak_mib": int(stats["peak_rss_mb"])}


if __name__ == "__main__":
    typer.run(fuzz)
