"""What a search for faster loops is worth on top of TVM's rules, by how long it may take.

`python -m benchmarks.tuning [--models NAME...] [--minutes M...] [--json FILE]`. Each model is built by the rules alone
and then with one budget after the other, from one database, so that a larger budget goes on where the one before
stopped; what was built is kept between runs, as in benchmarks.cells. All of these and ONNX Runtime are then timed in
turn in one process on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.cells import FOLDER, Cell, build_of, capture_of, key_of, work_on
from benchmarks.cells.contest import Contestant, contest, ratio
from benchmarks.compile import BASE
from benchmarks.result import Goal, publish
from benchmarks.zoo import MODELS
from compiler.targets import BuildOptions, Tuning, load_target

DEFAULT_MODELS: Final = ("efficientnet-lite0", "whisper-tiny-encoder")
DEFAULT_MINUTES: Final = (1.0, 5.0, 15.0, 30.0)
QUICK_MODELS: Final = ("tcn-meter",)
QUICK_MINUTES: Final = (1.0,)
MOST_RATIO: Final = 1.02  # a budget must not make the model slower than the rules do; less is noise
_ROUNDS: Final = 21


def build(name: str, minutes: float, core: int) -> tuple[Contestant, dict[str, Any]]:
    """Build the model with the budget in a process of its own, if it was not before; return it and what it said.

    Raises:
        SystemExit: A longer search has filled the database already, whose schedules this build would take.
    """
    artefact = _folder(name) / f"artefact-{minutes:g}"
    if not _said(artefact).exists():
        if any(_minutes(path) > minutes for path in _folder(name).glob("artefact-*.json")):
            raise SystemExit(f"{name}: a longer search was done before; remove {_folder(name)} to search anew")
        shutil.rmtree(artefact, ignore_errors=True)
        artefact.mkdir(parents=True)
        _run(name, minutes, core)
    said: dict[str, Any] = json.loads(_said(artefact).read_text())
    return Contestant(f"tvm-{minutes:g}", ours=True, opener="tvm", entry=said["entry"]), said


def _folder(name: str) -> Path:
    """Return where what was found lies: elsewhere when anything that it depends on has changed."""
    return FOLDER / name / "tuning" / key_of(_plain(name))


def _said(artefact: Path) -> Path:
    """Return the file that is there once the artefact is whole: what its build said."""
    return artefact.parent / f"{artefact.name}.json"


def _minutes(said: Path) -> float:
    return float(said.name.removeprefix("artefact-").removesuffix(".json"))


def _plain(name: str) -> Cell:
    return build_of(name, "tvm", "fp32", load_target("tvm", role="light").settings("fp32")[0])


def _run(name: str, minutes: float, core: int) -> None:
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TVM_NUM_THREADS"), "1")
    command = ["taskset", "-c", str(core), sys.executable, "-m", "benchmarks.tuning", "--build", name, str(minutes)]
    with (_folder(name) / f"log-{minutes:g}.txt").open("wb") as log:
        subprocess.run(command, stdout=log, stderr=log, env=os.environ | one, check=True)


def _build(name: str, minutes: float) -> None:
    from compiler.worker import read_captured

    artefact = _folder(name) / f"artefact-{minutes:g}"
    options = BuildOptions(
        platform="x86_64", name=name, tuning=Tuning(seconds=60 * minutes, database=_folder(name) / "found")
    )
    captured = read_captured(capture_of(_plain(name)).folder)
    begun = time.perf_counter()
    built = load_target("tvm", role="light").build(captured, artefact, options)
    said = {"entry": str(artefact / built.entry), "note": built.note, "build_s": time.perf_counter() - begun}
    _said(artefact).write_text(json.dumps(said))


def rows_of(name: str, minutes: Sequence[float], *, core: int, rounds: int, limit_s: float) -> list[dict[str, Any]]:
    """Build and time one model; return a row per budget.

    Raises:
        SystemExit: The model cannot be built by the rules or in ONNX Runtime, so that there is nothing to compare.
    """
    results = {cell.name: work_on(cell, limit_s=limit_s) for cell in (Cell(name, "peer", BASE), _plain(name))}
    for cell, result in results.items():
        if "entry" not in result:
            raise SystemExit(f"{name}, {cell}: {result['error']}")
    entries = [result["entry"] for result in results.values()]
    contestants = [Contestant(BASE, ours=False, opener=BASE, entry=entries[0])]
    contestants.append(Contestant("tvm-0", ours=True, opener="tvm", entry=entries[1]))
    notes = {"tvm-0": "the rules alone"}
    for budget in sorted(minutes):
        contestant, said = build(name, budget, core)
        contestants.append(contestant)
        notes[contestant.name] = said["note"]
        print(f"{name}, {budget:g} minutes: {said['note']}", flush=True)
    times = contest(name, contestants, _folder(name) / "contest", rounds=rounds, core=core, limit_s=limit_s)
    return [
        {
            "model": name,
            "minutes": budget,
            "ms": median(times[key]) * 1e3,
            "/ rules": ratio(times, key, "tvm-0"),
            "/ ORT fp32": ratio(times, key, BASE),
            "what": notes[key],
        }
        for budget, key in ((budget, f"tvm-{budget:g}") for budget in (0.0, *sorted(minutes)))
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Build with every budget, time, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model and a minute")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), metavar="NAME")
    parser.add_argument("--minutes", nargs="+", type=float, metavar="M", help=f"default: {DEFAULT_MINUTES}")
    parser.add_argument("--core", type=int, default=0, help="the core that is used (%(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--build", nargs=2, metavar=("NAME", "M"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.build:
        _build(chosen.build[0], float(chosen.build[1]))
        return 0
    names = chosen.models or (QUICK_MODELS if chosen.quick else DEFAULT_MODELS)
    minutes = chosen.minutes or (QUICK_MINUTES if chosen.quick else DEFAULT_MINUTES)
    rows = [row for name in names for row in rows_of(name, minutes, core=chosen.core, rounds=_ROUNDS, limit_s=600.0)]
    last = [row for row in rows if row["minutes"] == max(minutes)]
    goals = [Goal(f"{row['minutes']:g} minutes / rules, {row['model']}", row["/ rules"], MOST_RATIO) for row in last]
    publish("tuning", rows, goals, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
