"""The best variant of ours for each model, against what the tools give by hand.

`python -m benchmarks.compile [--quick] [--models NAME...] [--json FILE]`. Every variant and every peer is built and
compared with the source in a process of its own (`benchmarks.cells`, kept between runs); those that pass the guard are
then timed in turn in one process on one core. A peer that does not pass the same guard does not count.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.cells import FOLDER, Cell, build_of, work_on
from benchmarks.cells.contest import Contestant, contest, ratio
from benchmarks.cells.verdicts import judge
from benchmarks.peers import PEERS
from benchmarks.result import Goal, publish
from benchmarks.zoo import MODELS, ZooModel
from compiler.targets import load_target
from isthmus.bundle import INT8

BASE: Final = "ort-fp32"
TARGETS: Final = ("openvino", "onnxruntime", "tvm")
QUICK: Final = ("tcn-meter", "mobilenetv3-small")
HALVED: Final = ("resnet18", "resnet50", "efficientnet-lite0", "nudenet", "rapidocr-detector", "vit-tiny")
CONVOLUTIONAL: Final = (
    "resnet18", "resnet50", "mobilenetv3-small", "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2",
    "convnext-atto", "nudenet", "rapidocr-detector", "ddddocr-detector", "minilm",
)  # fmt: skip
_TIE: Final = 1.02  # the same model in the same tool differs by that, once ours and once by hand
_ROUNDS: Final = 21
_QUICK_ROUNDS: Final = 7
_QUICK_LIMIT_S: Final = 60.0  # controlling the accuracy takes longer


@dataclass(frozen=True, slots=True)
class Field:
    """All contestants of a model that pass the guard, their times by round, and those that do not pass."""

    model: str
    contestants: Mapping[str, Contestant]
    precisions: Mapping[str, str]
    times: Mapping[str, Sequence[float]]
    dropped: Mapping[str, str]  # name -> why

    def best(self, *, ours: bool, precisions: Collection[str] = ()) -> str:
        """Return the name of the fastest, or nothing when there is none."""
        names = [
            name
            for name, contestant in self.contestants.items()
            if contestant.ours == ours and (not precisions or self.precisions[name] in precisions)
        ]
        return min(names, key=lambda name: median(self.times[name]), default="")


def gather(
    model: ZooModel, wanted: Sequence[str], *, limit_s: float
) -> tuple[dict[str, Contestant], dict[str, str], dict[str, str]]:
    """Build everything, ours in the wanted precisions; return contestants, their precisions, and why others are not."""
    found: dict[str, Contestant] = {}
    precisions: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for name, peer in PEERS.items():
        if not peer.takes(model):
            continue
        result = work_on(Cell(model.name, "peer", name), limit_s=limit_s)
        verdict = judge(result, peer.precision, classifies=bool(model.logits))
        if verdict.covered or (name == BASE and "entry" in result):
            found[name] = Contestant(name, ours=False, opener=name, entry=result["entry"])
            precisions[name] = peer.precision
        else:
            dropped[name] = verdict.detail
    for target in TARGETS:
        offered = load_target(target, role="light").precisions
        for precision in (precision for precision in offered if not wanted or precision in wanted):
            _add_ours(model, target, precision, limit_s, found, precisions, dropped)
    return found, precisions, dropped


def _add_ours(
    model: ZooModel,
    target: str,
    precision: str,
    limit_s: float,
    found: dict[str, Contestant],
    precisions: dict[str, str],
    dropped: dict[str, str],
) -> None:
    """Add the variant with the target's first setting that passes the guard, as `isthmus compile` does."""
    for setting in load_target(target, role="light").settings(precision):
        result = work_on(build_of(model.name, target, precision, setting), limit_s=limit_s)
        verdict = judge(result, precision, classifies=bool(model.logits))
        name = f"{target}-{precision}"
        if verdict.covered:
            found[name] = Contestant(name, ours=True, opener=target, entry=result["entry"])
            precisions[name] = precision
            dropped.pop(name, None)
            return
        dropped[name] = f"{setting}: {verdict.detail}"
        if verdict.state == "refused":
            return


def row_of(field: Field) -> dict[str, Any]:
    """Return the table's row of one model; times in milliseconds, medians over the rounds."""
    ours, peer = field.best(ours=True), field.best(ours=False)
    int8, tvm = field.best(ours=True, precisions=INT8), "tvm-fp32"
    return {
        "model": field.model,
        "ORT fp32 ms": _milliseconds(field, BASE),
        "best by hand": peer,
        "by hand ms": _milliseconds(field, peer),
        "ours": ours,
        "ours ms": _milliseconds(field, ours),
        "ours / by hand": ratio(field.times, ours, peer) if ours and peer else None,
        "int8": int8,
        "int8 / ORT fp32": ratio(field.times, int8, BASE) if int8 else None,
        "tvm / ORT fp32": ratio(field.times, tvm, BASE) if tvm in field.times else None,
    }


def _milliseconds(field: Field, name: str) -> float | None:
    return median(field.times[name]) * 1e3 if name else None


def goals_of(rows: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """Return the goals, as far as the models in the rows allow."""
    by_model = {row["model"]: row for row in rows}
    goals: list[Goal] = []
    against = {name: row["ours / by hand"] for name, row in by_model.items() if row["ours / by hand"] is not None}
    if against:
        worst = max(against, key=lambda name: float(against[name]))
        goals.append(Goal("best of ours / best by hand, geometric mean", geometric_mean(against.values()), 1.0))
        goals.append(Goal(f"best of ours / best by hand, worst: {worst}", against[worst], _TIE))
    goals += [
        Goal(f"best INT8 / ORT fp32, {name}", by_model[name]["int8 / ORT fp32"], 0.5)
        for name in HALVED
        if name in by_model and by_model[name]["int8 / ORT fp32"] is not None
    ]
    tvm = {name: by_model[name]["tvm / ORT fp32"] for name in CONVOLUTIONAL if name in by_model}
    compiled = {name: value for name, value in tvm.items() if value is not None}
    if compiled:
        slowest = max(compiled, key=lambda name: float(compiled[name]))
        goals.append(Goal("TVM untuned / ORT fp32, geometric mean", geometric_mean(compiled.values()), 1.2))
        goals.append(Goal(f"TVM untuned / ORT fp32, worst: {slowest}", compiled[slowest], 2.0))
    return goals


def geometric_mean(values: Any) -> float:
    """Return the geometric mean."""
    logarithms = [log(value) for value in values]
    return exp(sum(logarithms) / len(logarithms))


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, time, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help=f"only {', '.join(QUICK)}, in a few rounds, a minute for a build"
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), metavar="NAME")
    parser.add_argument("--precisions", nargs="+", default=[], metavar="NAME", help="default: all that targets offer")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--core", type=int, default=0, help="the core that is measured on (%(default)s)")
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds for one build (%(default)s)")
    chosen = parser.parse_args(arguments)
    names = chosen.models or (QUICK if chosen.quick else list(MODELS))
    limit_s = min(chosen.limit_s, _QUICK_LIMIT_S) if chosen.quick else chosen.limit_s
    rows: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    for name in names:
        found, precisions, dropped = gather(MODELS[name], chosen.precisions, limit_s=limit_s)
        print(f"{name}: {len(found)} in the contest, {len(dropped)} not", flush=True)
        if BASE not in found:
            details[name] = {"dropped": dropped}
            continue
        rounds = _QUICK_ROUNDS if chosen.quick else _ROUNDS
        folder = FOLDER / name / "contest"
        times = contest(name, list(found.values()), folder, rounds=rounds, core=chosen.core, limit_s=2 * limit_s)
        field = Field(name, found, precisions, times, dropped)
        rows.append(row_of(field))
        details[name] = {
            "ms": {contestant: median(values) * 1e3 for contestant, values in times.items()},
            "dropped": dropped,
        }
        print(json.dumps(rows[-1]), flush=True)
    publish("compile", rows, goals_of(rows), chosen.json)
    if chosen.json is not None:
        record = json.loads(chosen.json.read_text())
        chosen.json.write_text(json.dumps(record | {"contestants": details}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
