"""The variants of a bundle as a picture: time against accuracy, size as area."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from compiler.report import Report, VariantReport

_COLOURS: Final = {"openvino": "#0068b5", "onnxruntime": "#6b4c9a", "tvm": "#c0562f", "tensorrt-rtx": "#5a8f00"}
_OTHER: Final = "#555555"


def draw_variants(report: Report, path: Path) -> None:
    """Write the picture of a report as PNG."""
    draw(report.variants, report.pareto, f"{report.guard.metric} of the source: {report.light_accuracy:.4f}", path)


def draw(variants: Sequence[VariantReport], best: Sequence[str], title: str, path: Path) -> None:
    """Write a picture of these variants as PNG; those that were not measured are not in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    measured = [(entry, entry.timing) for entry in variants if entry.timing is not None]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    largest = max((entry.bytes for entry, _ in measured), default=1)
    for entry, timing in measured:
        colour = _COLOURS.get(entry.target, _OTHER)
        low, high = entry.interval
        axes.errorbar(
            timing.p50_ms, entry.accuracy, yerr=[[max(entry.accuracy - low, 0)], [max(high - entry.accuracy, 0)]],
            color=colour, alpha=0.35, capsize=3,
        )  # fmt: skip
        axes.scatter(
            timing.p50_ms, entry.accuracy, s=40 + 400 * entry.bytes / largest, color=colour,
            alpha=0.8 if entry.id in best else 0.3,
        )  # fmt: skip
        axes.annotate(f"{entry.id}\n{entry.bytes / 1e6:.2f} MB", (timing.p50_ms, entry.accuracy), (6, 6),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    line = sorted((timing.p50_ms, entry.accuracy) for entry, timing in measured if entry.id in best)
    axes.plot([ms for ms, _ in line], [value for _, value in line], color="#999999", linestyle=":", zorder=0)
    axes.set_xscale("log")
    for kind in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        kind(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("time of one sample on one thread, ms (median)")
    axes.set_ylabel("metric, with 95 % interval")
    axes.set_title(title, loc="left", fontsize=10)
    axes.margins(x=0.3, y=0.15)
    figure.savefig(path, dpi=120)
