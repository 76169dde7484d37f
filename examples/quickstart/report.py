"""The report: every figure computed from the raw rows that the run left behind, and nothing else.

`python -m examples.quickstart --report-only` recomputes it. Accuracy is the share of test messages whose predicted
label is the true one; a failed request counts as wrong. Escalated means that the cloud was wanted: route "cloud" or
"fallback".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.quickstart.site import VARIANT
from examples.quickstart.traffic import DEADLINE_S, Record

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one recording, one array per column; see `traffic.Record`."""

    sample: npt.NDArray[np.int64]
    started: Floats
    latency_ms: Floats
    route: npt.NDArray[np.str_]
    reason: npt.NDArray[np.str_]
    version: npt.NDArray[np.int64]
    prediction: npt.NDArray[np.int64]
    score: Floats

    @classmethod
    def load(cls, path: Path) -> Rows:
        """Read what `Recording.save` wrote."""
        with np.load(path, allow_pickle=False) as columns:
            return cls(**{name: columns[name] for name in Record.__dataclass_fields__})

    def by_sample(self) -> Rows:
        """Return the rows in the order of their samples."""
        order = np.argsort(self.sample, kind="stable")
        return Rows(**{name: getattr(self, name)[order] for name in Record.__dataclass_fields__})

    def only(self, keep: npt.NDArray[np.bool_]) -> Rows:
        """Return the rows that are marked."""
        return Rows(**{name: getattr(self, name)[keep] for name in Record.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Deferral:
    """Accuracy as a function of the share of escalated messages, for one pair of models."""

    share: Floats
    by_score: Floats
    by_chance: Floats
    by_oracle: Floats


def deferral(edge: Rows, cloud: Rows, labels: npt.NDArray[np.int64]) -> Deferral:
    """Return the curves of escalating the least sure first, at random, and where it helps first."""
    light, heavy = edge.prediction == labels, cloud.prediction == labels
    count = len(labels)
    gain = heavy.astype(np.int64) - light.astype(np.int64)
    ranked = np.concatenate([[0], np.cumsum(gain[np.argsort(edge.score, kind="stable")])])
    ideal = np.concatenate([[0], np.cumsum(np.sort(gain)[::-1])])
    share = np.arange(count + 1) / count
    return Deferral(
        share=share,
        by_score=(light.sum() + ranked) / count,
        by_chance=light.mean() + share * gain.mean(),
        by_oracle=(light.sum() + ideal) / count,
    )


def build_report(folder: Path) -> dict[str, Any]:
    """Compute the report from the files in FOLDER/raw."""
    raw = folder / "raw"
    facts: dict[str, Any] = json.loads((raw / "facts.json").read_text())
    labels: npt.NDArray[np.int64] = np.load(raw / "test-labels.npy", allow_pickle=False)
    rows = {path.stem: Rows.load(path) for path in raw.glob("*.npz")}
    edge, cloud = _accuracy(rows["v1-edge"], labels), _accuracy(rows["v1-cloud"], labels)
    first = _routed(rows["v1-isthmus"], labels, facts["bytes_up"]["v1"])
    second = _routed(rows["v2-isthmus"], labels, facts["bytes_up"]["v2"])
    curve = deferral(rows["v2-edge"].by_sample(), rows["v1-cloud"].by_sample(), labels)
    return {
        "story": facts["story"],
        "test_messages": len(labels),
        "edge_only": {"accuracy": edge},
        "cloud_only": {"accuracy": cloud},
        "isthmus": first | {"gain_recovered": _gain(first["accuracy"], edge, cloud)},
        "after_update": {
            "edge_only": {"accuracy": _accuracy(rows["v2-edge"], labels)},
            "isthmus": second,
            "escalation_rate_for_v1_accuracy": _share_for(curve, first["accuracy"]),
        },
        "bundle": facts["bundle"],
        "runtimes": _runtimes(rows, labels),
        "update": _update(facts, rows["update"]),
        "outage": _outage(facts, rows["outage"]),
        "tls": {"version": facts["cloud_status"]["tls_version"], "group": facts["cloud_status"]["tls_group"]},
        "triton": _triton(facts),
        "step_seconds": facts["step_seconds"],
        "wall_s": facts["wall_s"],
    }


def _accuracy(rows: Rows, labels: npt.NDArray[np.int64]) -> float:
    ordered = rows.by_sample()
    if not np.array_equal(ordered.sample, np.arange(len(labels))):
        raise ValueError(f"expected each of {len(labels)} samples once, got {len(ordered.sample)} rows")
    return round(float((ordered.prediction == labels).mean()), 4)


def _routed(rows: Rows, labels: npt.NDArray[np.int64], bytes_up: int) -> dict[str, Any]:
    at_edge, at_cloud = rows.route == "edge", rows.route == "cloud"
    return {
        "accuracy": _accuracy(rows, labels),
        "escalation_rate": round(float(np.isin(rows.route, ["cloud", "fallback"]).mean()), 4),
        "failed": int((rows.route == "failed").sum()),
        "fallback": int((rows.route == "fallback").sum()),
        "p50_ms": _percentile(rows.latency_ms, 50),
        "p99_ms": _percentile(rows.latency_ms, 99),
        "edge_p50_ms": _percentile(rows.latency_ms[at_edge], 50),
        "cloud_p50_ms": _percentile(rows.latency_ms[at_cloud], 50),
        "bytes_up": bytes_up,
    }


def _runtimes(rows: Mapping[str, Rows], labels: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return accuracy and latency of each other variant, and of the device's own on the same messages."""
    found: dict[str, Any] = {}
    for name, recording in sorted(rows.items()):
        if not name.startswith("runtime-"):
            continue
        count = len(recording.sample)
        found[name.removeprefix("runtime-")] = _alone(recording, labels[:count])
        found[VARIANT] = _alone(rows["v1-edge"].only(rows["v1-edge"].sample < count), labels[:count])
    return found


def _alone(rows: Rows, labels: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {
        "messages": len(labels),
        "accuracy": _accuracy(rows, labels),
        "p50_ms": _percentile(rows.latency_ms, 50),
        "failed": int((rows.route == "failed").sum()),
    }


def _percentile(values: Floats, percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 3) if len(values) else None


def _gain(routed: float, edge: float, cloud: float) -> float | None:
    """Return which part of the heavy model's advantage the routed whole has."""
    return round((routed - edge) / (cloud - edge), 3) if cloud > edge else None


def _share_for(curve: Deferral, accuracy: float) -> float | None:
    """Return the smallest share of escalations that reaches an accuracy."""
    reached = np.flatnonzero(curve.by_score >= accuracy)
    return round(float(curve.share[reached[0]]), 4) if len(reached) else None


def _update(facts: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    update = facts["update"]
    variant = [file for file in update["files"] if file["path"].startswith("variants/")]
    return {
        "from": update["from_version"],
        "to": update["to_version"],
        "full_bytes": sum(file["bytes_full"] for file in variant),
        "delta_bytes": sum(file["bytes_fetched"] for file in variant),
        "all_files_full_bytes": update["bytes_full"],
        "all_files_fetched_bytes": update["bytes_fetched"],
        "rebuilt_equal": update["rebuilt_equal"],
        "requests": len(rows.sample),
        "failed": int((rows.route == "failed").sum()),
    }


def _outage(facts: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    answered = rows.route != "failed"
    last = max(facts["outage_events"].values())
    return {
        "requests": len(rows.sample),
        "answered": int(answered.sum()),
        "within_deadline": int((answered & (rows.latency_ms <= DEADLINE_S * 1e3)).sum()),
        "fallback": int((rows.route == "fallback").sum()),
        "cloud_after_recovery": int(((rows.route == "cloud") & (rows.started >= last)).sum()),
        "slowest_ms": round(float(rows.latency_ms.max()), 1),
        "same_agent": facts["agent_pid_unchanged"],
    }


def _triton(facts: Mapping[str, Any]) -> dict[str, Any]:
    status = facts["cloud_status"]
    return {"version": status["triton_version"], "inferences": sum(m["inferences"] for m in status["models"])}
