"""`python -m benchmarks.delta [--quick] [--json FILE] [--pairs TEXT]`: deltas of real updates, against general tools.

Speeds are per core, by processor time: other loads on the machine do not count, waiting for a disk does not either.
The quick form takes a pair of public releases and one of which the weights are made up; the full form makes or finds
all pairs. Tools are measured when their environment is there (`python -m benchmarks.delta.tools`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from safetensors.numpy import save_file

from benchmarks.delta import DeltaPair, ours, tools
from benchmarks.delta.pairs import FORMS, names, pairs
from benchmarks.result import Goal, publish
from isthmus.terminal import note, progress

OURS: Final = "isthmus"
_QUICK: Final = ("silero-vad-6.1-6.2-onnx",)
_SPEED: Final = {"int8": 100.0, "fp16": 60.0}  # MB/s of output
_MAKE: Final = 5.0  # MB/s
_WEIGHTS: Final = 4_000_000

app = typer.Typer()


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="A form of under a minute, for checks.")] = False,
    json: Annotated[Path | None, typer.Option(help="Where the figures go.")] = None,
    only: Annotated[str, typer.Option("--pairs", help="Only pairs with this in their name.")] = "",
    build: Annotated[Path, typer.Option(help="Where data and pairs are kept.")] = Path("build"),
) -> None:
    """Measure size, make and apply of every pair."""
    wanted = [name for name in (_QUICK if quick else names()) if only in name]
    peers = (tools.QUICK if quick else (*tools.BYTES, *tools.MODELS)) if tools.is_installed() else ()
    if not peers:
        note("the tools to compare with are not installed: python -m benchmarks.delta.tools")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, progress() as bars:
        made = [_stand_in(Path(scratch))] if quick and only in "stand-in" else []
        task = bars.add_task("pairs", total=len(wanted) + len(made))
        for pair in _all(wanted, made, build, bars):
            bars.update(task, description=pair.name)
            rows += _rows(pair, peers, repeats=1 if quick else 3)
            bars.update(task, advance=1)
    publish("delta", rows, goals(rows), json)


def _all(wanted: Sequence[str], made: Sequence[DeltaPair], build: Path, bars: Any) -> Iterator[DeltaPair]:
    yield from made
    yield from pairs(wanted, build, bars)


def _stand_in(folder: Path) -> DeltaPair:
    """Return 4 M INT8 weights of which one in twelve moved by one step."""
    rng = np.random.default_rng(0)
    old = np.clip(np.round(rng.normal(size=_WEIGHTS) * 30), -127, 127).astype(np.int8)
    moved = (old + (rng.random(_WEIGHTS) < 1 / 12) * rng.choice([-1, 1], _WEIGHTS)).astype(np.int8)
    paths = folder / "old.safetensors", folder / "new.safetensors"
    for path, weights in zip(paths, (old, moved), strict=True):
        save_file({"weights": weights.reshape(2000, -1)}, path)
    return DeltaPair("stand-in", "int8-safetensors", "stand-in", *paths)


def _rows(pair: DeltaPair, peers: Sequence[str], *, repeats: int) -> list[dict[str, Any]]:
    length = pair.new.stat().st_size
    found = {OURS: ours.measure(pair, repeats), **tools.measure(pair, peers)}
    return [_row(pair, tool, length, figures) for tool, figures in found.items()]


def _row(pair: DeltaPair, tool: str, length: int, figures: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"pair": pair.name, "tool": tool, "bytes": figures.get("bytes")}
    if "refused" in figures:
        return (
            row
            | dict.fromkeys(("percent", "make_mb_per_s", "apply_mb_per_s", "peak_mib"))
            | {"note": figures["refused"]}
        )
    peak = figures.get("peak_mib")
    return row | {
        "percent": round(100 * figures["bytes"] / length, 3),
        "make_mb_per_s": round(length / figures["make_s"] / 1e6, 1),
        "apply_mb_per_s": round(length / figures["apply_s"] / 1e6, 1),
        "peak_mib": None if peak is None else round(peak, 1),
        "note": "",
    }


def goals(rows: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """Return the goals, as far as what was measured allows."""
    sizes: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["bytes"] is not None:
            sizes.setdefault(row["pair"], {})[row["tool"]] = row["bytes"]
    found: list[Goal] = []
    for pair, by_tool in sizes.items():
        found += _size_goals(pair, by_tool)
    mine = [row for row in rows if row["tool"] == OURS]
    for kind, least in _SPEED.items():
        speeds = {row["pair"]: row["apply_mb_per_s"] for row in mine if kind in row["pair"]}
        if speeds:
            slowest = min(speeds, key=lambda pair: float(speeds[pair]))
            found.append(Goal(f"{least:g} MB/s / apply, {kind}, slowest: {slowest}", least / speeds[slowest], 1.0))
    if mine:
        slow = min(mine, key=lambda row: float(row["make_mb_per_s"]))
        found.append(Goal(f"{_MAKE:g} MB/s / make, slowest: {slow['pair']}", _MAKE / slow["make_mb_per_s"], 1.0))
    return [Goal(goal.goal, round(goal.value, 4), goal.limit) for goal in found]


def _size_goals(pair: str, by_tool: Mapping[str, int]) -> Iterator[Goal]:
    mine = by_tool[OURS]
    others = {tool: size for tool, size in by_tool.items() if tool != OURS}
    if not others:
        return
    best = min(others, key=lambda tool: others[tool])
    yield Goal(f"{pair}: ours / {best}, the best of all", mine / others[best], 1.0)
    if not any(f"-{form}-" in pair for form in FORMS):  # releases and stand-ins are no fine-tuned pairs
        return
    fp32 = "fp32" in pair
    if "fm-delta" in others:
        yield Goal(f"{pair}: ours / fm-delta", mine / others["fm-delta"], 0.95 if fp32 else 0.85)
    byte_tools = {tool: size for tool, size in others.items() if tool in tools.BYTES}
    if byte_tools:
        tool = min(byte_tools, key=lambda name: byte_tools[name])
        yield Goal(f"{pair}: ours / {tool}, the best byte tool", mine / byte_tools[tool], 0.95 if fp32 else 0.8)


if __name__ == "__main__":
    app()
