"""The support table: every model of the zoo on every target and precision, tried, compared and timed.

`python -m benchmarks.support --markdown docs/targets.md --json FILE`. Results are kept (benchmarks.cells), so another
run does only what is missing or depends on something that has changed. A time is the least of about a second of single
requests on one thread, on a machine that did other things too: good for seeing magnitudes, not for comparing targets,
which is what `benchmarks.compile` does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.cells import Cell, build_of, result_of, work_on
from benchmarks.cells.verdicts import LEAST_AGREEMENT, Verdict, judge
from benchmarks.result import commit, machine
from benchmarks.zoo import MODELS, ZooModel
from compiler.targets import load_target
from compiler.verify import LEAST_COSINE
from isthmus.terminal import show_table

TARGETS: Final = ("openvino", "onnxruntime", "tvm", "tensorrt-rtx")
ORDER: Final = ("fp32", "int8", "int8-bf16", "bf16", "fp16", "int8w", "int4w")  # the most asked for first
PRECISIONS: Final = ("bf16", "fp16", "int8", "int8-bf16", "int8w", "int4w")
TRIED_BY_HAND: Final = ("openvino", "onnxruntime")
OTHERS: Final = frozenset({  # beyond the models that the table must have
    "silero-vad-ifless", "silero-vad-openvino", "rapidocr-orientation", "segformer-b0", "whisper-tiny-encoder",
    "gru-tagger", "tcn-meter",
})  # fmt: skip
_MARKS: Final[Mapping[str, str]] = {"green": "✓", "built": "built", "inexact": "✗", "refused": "–", "failed": "✗"}


@dataclass(frozen=True, slots=True)
class Column:
    """A target in one precision."""

    target: str
    precision: str

    @property
    def title(self) -> str:
        """Return its name in the table."""
        return f"{self.target} {self.precision}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One place of the table."""

    model: str
    column: Column
    verdict: Verdict
    setting: str = ""  # when it is not the target's first
    least_ms: float = 0.0
    build_s: float = 0.0
    by_hand: str = ""  # what the tool alone says to the model; empty: it takes it, or was not asked


def columns_of(targets: Sequence[str], precisions: Sequence[str]) -> list[Column]:
    """Return the columns: what the targets offer of the precisions, or all that they offer."""
    found: list[Column] = []
    for name in targets:
        offered = load_target(name, role="light").precisions
        wanted = [precision for precision in (*ORDER, *offered) if not precisions or precision in precisions]
        found += [Column(name, precision) for precision in dict.fromkeys(wanted) if precision in offered]
    return found


def entry_of(model: ZooModel, column: Column, *, limit_s: float, run: bool) -> Entry | None:
    """Return what the target makes of the model: with its first setting, or the first gentler one that is right."""
    entry: Entry | None = None
    for place, setting in enumerate(load_target(column.target, role="light").settings(column.precision)):
        cell = build_of(model.name, column.target, column.precision, setting)
        result = work_on(cell, limit_s=limit_s) if run else result_of(cell)
        if result is None:
            break
        verdict = judge(result, column.precision, classifies=bool(model.logits))
        if entry is None or verdict.covered:
            times = result.get("least_ms", 0.0), result.get("build_s", 0.0)
            entry = Entry(model.name, column, verdict, setting if place else "", *times)
        if verdict.covered or verdict.state == "refused":
            break
    refused = entry is not None and not entry.verdict.covered and column.precision == "fp32"
    if entry is not None and refused and column.target in TRIED_BY_HAND:
        hand = Cell(model.name, "by-hand", column.target)
        result = work_on(hand, limit_s=limit_s) if run else result_of(hand)
        said = (result or {}).get("refused", "") or (result or {}).get("error", "")
        return Entry(entry.model, column, entry.verdict, by_hand=said)
    return entry


def fill(
    models: Sequence[str], columns: Sequence[Column], *, jobs: int, limit_s: float, run: bool
) -> Iterator[list[Entry]]:
    """Yield the entries of each model, column after column; several models at a time."""
    ordered = sorted(columns, key=lambda column: (*ORDER, column.precision).index(column.precision))

    def row(name: str, wave: Sequence[Column]) -> list[Entry]:
        entries = [entry_of(MODELS[name], column, limit_s=limit_s, run=run) for column in wave]
        return [entry for entry in entries if entry is not None]

    for precision in dict.fromkeys(column.precision for column in ordered):
        wave = [column for column in ordered if column.precision == precision]
        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(lambda name, wave=wave: row(name, wave), models)


def coverage(entries: Sequence[Entry], column: Column, models: Sequence[str]) -> tuple[int, int]:
    """Return how many of the models the column covers, and how many were tried."""
    tried = [entry for entry in entries if entry.column == column and entry.model in models]
    return sum(entry.verdict.covered for entry in tried), len(tried)


def markdown(entries: Sequence[Entry], columns: Sequence[Column], models: Sequence[str]) -> str:
    """Return the page."""
    places = {(entry.model, entry.column): entry for entry in entries}
    cosines = ", ".join(f"{name} {least:g}" for name, least in LEAST_COSINE.items() if name in PRECISIONS)
    lines = [_INTRODUCTION.format(machine=machine(), commit=commit(), cosines=cosines, agreement=LEAST_AGREEMENT)]
    lines += ["| model | " + " | ".join(column.title for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for model in models:
        star = "\\*" if MODELS[model].random_weights else ""
        cells = [_cell(places.get((model, column))) for column in columns]
        lines.append(f"| {model}{star} | " + " | ".join(cells) + " |")
    required = [model for model in models if model not in OTHERS]
    for title, group in (("**of the models above**", models), ("without the extra ones", required)):
        shares = [_share(*coverage(entries, column, group)) for column in columns]
        lines.append(f"| {title} | " + " | ".join(shares) + " |")
    lines += [
        "",
        "\\* random weights, the last layer fitted to a small task.",
        "",
        "## Gaps and what to use instead",
        "",
    ]
    gaps = [entry for entry in entries if not entry.verdict.covered]
    lines += [_gap(entry, places) for entry in sorted(gaps, key=lambda e: (e.column.title, e.model))] or ["None."]
    return "\n".join(lines) + "\n"


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return ""
    mark = _MARKS[entry.verdict.state]
    if entry.verdict.state == "green":
        setting = f" ({entry.setting})" if entry.setting else ""
        return f"{mark} {entry.least_ms:.3g} ms, {entry.verdict.detail}{setting}"
    return f"{mark} {entry.verdict.detail}" if entry.verdict.state in {"built", "inexact"} else mark


def _share(covered: int, tried: int) -> str:
    return f"{covered} of {tried} ({covered / tried:.0%})" if tried else ""


def _gap(entry: Entry, places: Mapping[tuple[str, Column], Entry]) -> str:
    text = " ".join(entry.verdict.detail.split()).rstrip(".")
    if entry.verdict.state == "inexact":
        text = f"outside the tolerance of {entry.column.precision}: {text}"
    others = [
        other.column.title
        for (model, _), other in places.items()
        if model == entry.model and other.verdict.state == "green" and other.column != entry.column
    ]
    instead = entry.verdict.hint or (f"use {' or '.join(others[:2])}" if others else "")
    hand = f" By hand, the tool itself: {entry.by_hand}." if entry.by_hand else ""
    return f"- **{entry.column.title}, {entry.model}**: {text}.{hand} Instead: {instead or 'nothing yet'}."


_INTRODUCTION: Final = """# Targets: which models run where

Written by `python -m benchmarks.support --markdown docs/targets.md`; do not edit. Commit {commit}, {machine}.

Every model of `benchmarks/zoo` was captured and built for every target and precision, and its answers to up to 64
typical inputs compared with those of the source in ONNX Runtime.

- **✓** within the tolerance: fp32 differs by at most 1e-3 of the output's range (the figure shown); other precisions
  have the least cosine with the source that `isthmus compile` asks for ({cosines}), and classifiers the same
  best class for {agreement:.0%} of the inputs. The time is the least of about a second of single requests on one
  thread, beside other work: for comparisons see [benchmarks.md](benchmarks.md).
- **built**: an artefact was made that needs a device this machine lacks (a GPU); its size is shown.
- **✗** it was built but is outside the tolerance, or the build failed; **–** the target cannot take the model. Reasons
  and what to use instead are below the table. `isthmus compile` says the same, and ships nothing outside its guard.
- A blank place was not tried yet.

For tvm, which compiles for one length, lengths that may vary were fixed at the longest. A cell had a few minutes.
A setting in brackets is a gentler one that the guard had to go down to.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the table, print it, and write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.support", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME")
    parser.add_argument("--precisions", nargs="+", default=[], metavar="NAME", help="default: all that targets offer")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time (%(default)s)")
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds for one cell (%(default)s)")
    parser.add_argument("--no-run", action="store_true", help="only what is there already")
    parser.add_argument("--markdown", type=Path, help="write the page here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    chosen = parser.parse_args(arguments)
    columns = columns_of(chosen.targets, chosen.precisions)
    entries: list[Entry] = []
    for row in fill(chosen.models, columns, jobs=chosen.jobs, limit_s=chosen.limit_s, run=not chosen.no_run):
        entries += row
        for entry in row:
            print(f"{entry.model:24} {entry.column.title:22} {_cell(entry)} {_remark(entry)}", flush=True)
    show_table("coverage", [{"target": c.title} | _counted(entries, c, chosen.models) for c in columns])
    if chosen.markdown is not None:
        chosen.markdown.write_text(markdown(entries, columns, chosen.models), encoding="utf-8")
    if chosen.json is not None:
        record = {"name": "support", "machine": machine(), "commit": commit(), "rows": [asdict(e) for e in entries]}
        chosen.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


def _remark(entry: Entry) -> str:
    return "" if entry.verdict.covered else " ".join(entry.verdict.detail.split())[:160]


def _counted(entries: Sequence[Entry], column: Column, models: Sequence[str]) -> dict[str, Any]:
    covered, tried = coverage(entries, column, models)
    return {"covered": covered, "tried": tried, "share": covered / tried if tried else 0.0}


if __name__ == "__main__":
    sys.exit(main())
