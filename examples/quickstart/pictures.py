"""The two pictures: what routing buys, and what an application saw while the servers changed and died."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from examples.quickstart.report import Rows, deferral
from examples.quickstart.traffic import DEADLINE_S

COLOURS: Final = {"edge": "#1b9e77", "cloud": "#386cb0", "fallback": "#e6851e", "failed": "#d7301f"}
GREY: Final = "#777777"


def draw_policy(folder: Path, report: dict[str, Any], out: Path) -> None:
    """Draw accuracy against escalation rate for both versions, between chance and oracle."""
    raw = folder / "raw"
    labels = np.load(raw / "test-labels.npy", allow_pickle=False)
    cloud = Rows.load(raw / "v1-cloud.npz").by_sample()
    figure = _figure(8.0, 5.2)
    axes = figure.add_subplot()
    for version, colour in (("v1", "#386cb0"), ("v2", "#1b9e77")):
        curve = deferral(Rows.load(raw / f"{version}-edge.npz").by_sample(), cloud, labels)
        point = report["isthmus"] if version == "v1" else report["after_update"]["isthmus"]
        edge = report["edge_only"] if version == "v1" else report["after_update"]["edge_only"]
        axes.plot(100 * curve.share, 100 * curve.by_oracle, color=colour, lw=1, ls=":", label=f"oracle, {version}")
        axes.plot(100 * curve.share, 100 * curve.by_score, color=colour, lw=2, label=f"least sure first, {version}")
        axes.plot(100 * curve.share, 100 * curve.by_chance, color=colour, lw=1, ls="--", label=f"random, {version}")
        axes.plot(0, 100 * edge["accuracy"], "s", color=colour, ms=7, clip_on=False, label=f"edge only, {version}")
        place = (100 * point["escalation_rate"], 100 * point["accuracy"])
        axes.plot(*place, "o", color=colour, ms=10, mec="black", label=f"isthmus {version}, as served", zorder=5)
        offset = (10, -16) if version == "v1" else (-96, 10)
        axes.annotate(f"{place[1]:.1f} % at {place[0]:.0f} %", place, xytext=offset, textcoords="offset points")
    heavy = 100 * report["cloud_only"]["accuracy"]
    axes.plot(100, heavy, "D", color="black", ms=7, clip_on=False, label="cloud only")
    axes.axhline(heavy, color=GREY, lw=0.8, zorder=0)
    axes.set(xlabel="escalated to the cloud, % of test messages", ylabel="accuracy, %", xlim=(0, 100))
    axes.set_title(f"{report['story']['title']}: what escalation buys", loc="left")
    axes.legend(fontsize=8, ncols=2, loc="lower right", frameon=False)
    figure.savefig(out)


def draw_timeline(folder: Path, out: Path) -> None:
    """Draw the latency of every request over time, with the update and the outages marked."""
    raw = folder / "raw"
    facts = json.loads((raw / "facts.json").read_text())
    update, outage = Rows.load(raw / "update.npz"), Rows.load(raw / "outage.npz")
    events = facts["update_events"]
    figure = _figure(10.0, 6.4)
    above, below = figure.subplots(2, 1, sharey=True)
    marks = {"version 2 published": events["published"], "version 2 serves": events["serving"]}
    _timeline(above, update, marks, [], "a signed delta update under load")
    names = facts["outage_events"]
    away = [(names["triton killed"], names["triton back"]), (names["gateway killed"], names["gateway back"])]
    _timeline(below, outage, names, away, "Triton killed, then the gateway")
    below.set_xlabel("seconds")
    figure.savefig(out)


def _figure(width: float, height: float) -> Figure:
    mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _timeline(axes: Any, rows: Rows, marks: dict[str, float], away: list[tuple[float, float]], title: str) -> None:
    start = rows.started.min()
    for begin, end in away:
        axes.axvspan(begin - start, end - start, color="#f3e3d3", lw=0, zorder=0)
    for route, colour in COLOURS.items():
        chosen = rows.only(rows.route == route)
        if len(chosen.sample) or route != "failed":
            label = f"{route} ({len(chosen.sample):,})"
            axes.plot(chosen.started - start, chosen.latency_ms, ".", ms=4, color=colour, label=label)
    for place, (name, moment) in enumerate(sorted(marks.items(), key=lambda item: item[1])):
        axes.axvline(moment - start, color="black", lw=0.8)
        height = 0.98 - 0.09 * (place % 2)
        axes.text(moment - start, height, f" {name}", transform=axes.get_xaxis_transform(), fontsize=8, va="top")
    axes.axhline(DEADLINE_S * 1e3, color="#d7301f", lw=0.8, ls="--")
    axes.text(rows.started.max() - start, DEADLINE_S * 1e3, "deadline", fontsize=8, va="top", ha="right")
    axes.set(yscale="log", ylabel="latency, ms", ylim=(0.5, 2e4))
    axes.set_title(title, loc="left")
    axes.legend(fontsize=8, ncols=4, loc="upper left", frameon=False, bbox_to_anchor=(0.45, 1.13))
