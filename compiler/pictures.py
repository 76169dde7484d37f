"""Pictures of a bundle: its variants (time against accuracy, size as area), and what calibration found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from compiler.report import Report, VariantReport
from isthmus.bundle import Calibration, VariantCalibration

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


def draw_calibration(calibration: Calibration, path: Path) -> None:
    """Write risk against coverage and accuracy against escalations as PNG, the same bytes for the same record."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    risk, accuracy = figure.subplots(1, 2)
    for number, (name, point) in enumerate(calibration.variants.items()):
        colour = f"C{number}"
        known = [(1 - at.escalation_rate, at.risk) for at in point.curve if at.risk is not None]
        risk.plot([x for x, _ in known], [y for _, y in known], color=colour, label=name)
        rates = [at.escalation_rate for at in point.curve]
        accuracy.plot(rates, [at.accuracy for at in point.curve], color=colour, label=name)
        chosen = min(point.curve, key=lambda at, t=point.threshold: abs(at.threshold - t))  # type: ignore[misc]
        if chosen.risk is not None:
            risk.plot(1 - chosen.escalation_rate, chosen.risk, "o", color=colour)
        accuracy.plot(point.escalation_rate, point.accuracy, "o", color=colour)
    _draw_limits(accuracy, next(iter(calibration.variants.values())))
    asked = calibration.operating_point
    if asked.kind == "max_risk":
        risk.axhline(asked.value, color="#999999", linestyle="--", label="bound that was asked for")
    elif asked.kind == "target_accuracy":
        accuracy.axhline(asked.value, color="#999999", linestyle="--", label="accuracy that was asked for")
    else:
        accuracy.axvline(asked.value, color="#999999", linestyle="--", label="rate that was asked for")
    risk.set_xlabel("coverage: share of answers that stay on the edge")
    risk.set_ylabel("risk: errors among them")
    accuracy.set_xlabel("share of requests that escalate")
    accuracy.set_ylabel("accuracy of the whole")
    risk.legend(fontsize=8)
    accuracy.legend(fontsize=8)
    figure.suptitle(
        f"{calibration.model}@{calibration.version}: {asked.kind} {asked.value:g} with confidence {1 - asked.delta:g}, "
        f"{calibration.score}, {calibration.data.samples} samples",
        fontsize=10,
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_limits(axes: Any, point: VariantCalibration) -> None:
    """Draw what lots would do, and what one would do who knows the truth."""
    cloud = point.curve[-1].accuracy
    axes.plot([0, 1], [point.edge_accuracy, cloud], color="#999999", linestyle=":", label="random")
    if point.mends is not None and point.spoils is not None:
        best = point.edge_accuracy + point.mends
        axes.plot(
            [0, point.mends, 1 - point.spoils, 1], [point.edge_accuracy, best, best, cloud], color="#bbbbbb",
            label="oracle",
        )  # fmt: skip
