"""Devices, rollouts and their history as rows for tables and records for scripts; knows messages, no connection."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from isthmus.v1 import fleet_pb2


def moment(stamp: Any) -> str:
    """Return a time as people and scripts read it."""
    return datetime.fromtimestamp(stamp.seconds, UTC).isoformat()


def device_rows(device: Any) -> list[dict[str, Any]]:
    """Return one row for each model of a device, one for a device that runs none yet."""
    reports = {report.model: report for report in device.reports}
    desired = {told.model: told for told in device.desired}
    models = sorted({*reports, *desired}) or [""]
    return [_device_row(device, model, reports.get(model), desired.get(model)) for model in models]


def _device_row(device: Any, model: str, report: Any, told: Any) -> dict[str, Any]:
    return {
        "device": device.device_id,
        "online": device.online,
        "revoked": device.HasField("revoked_at"),
        "last_seen": moment(device.last_seen_at),
        "labels": _labels(device.labels) or None,
        "model": model or None,
        "serving": (report.serving_version or None) if report is not None else None,
        "told": _told(told),
        "variant": (report.variant or None) if report is not None else None,
        "last_update": f"{report.version} {_state(report)}" if report is not None else None,
        "reason": (report.reason or None) if report is not None else None,
        "bytes_fetched": report.bytes_fetched if report is not None else None,
    }


def device_record(device: Any, events: Iterable[Any]) -> dict[str, Any]:
    """Return all that is known of a device."""
    reports = {report.model: report for report in device.reports}
    desired = {told.model: told for told in device.desired}
    return {
        "device": device.device_id,
        "online": device.online,
        "enrolled": moment(device.enrolled_at),
        "last_seen": moment(device.last_seen_at),
        "labels": dict(sorted(device.labels.items())),
        "platform": device.facts.platform or None,
        "runtimes": list(device.facts.runtimes),
        "agent_version": device.facts.agent_version or None,
        "key_sha256": device.key_sha256,
        "revoked": moment(device.revoked_at) if device.HasField("revoked_at") else None,
        "revoked_reason": device.revoked_reason or None,
        "models": [
            _model_record(model, reports.get(model), desired.get(model)) for model in sorted({*reports, *desired})
        ],
        "history": event_rows(events),
    }


def _model_record(model: str, report: Any, told: Any) -> dict[str, Any]:
    report = report or fleet_pb2.ReportRequest()
    seen = report.evidence
    return {
        "model": model,
        "told": _told(told),
        "serving": report.serving_version or None,
        "version": report.version or None,
        "state": _state(report) if report.state else None,
        "step": report.step or None,
        "reason": report.reason or None,
        "detail": report.detail or None,
        "variant": report.variant or None,
        "rollout": report.rollout or None,
        "attempt": report.attempt,
        "bytes_fetched": report.bytes_fetched,
        "requests": seen.requests,
        "errors": seen.errors,
        "audited": seen.audited,
        "disagreed": seen.disagreed,
        "latency_p50_ms": round(seen.latency_p50_ms, 3),
        "before_latency_p50_ms": round(seen.before_latency_p50_ms, 3),
    }


def event_rows(events: Iterable[Any]) -> list[dict[str, Any]]:
    """Return a history, newest first."""
    return [
        {
            "at": moment(event.at),
            "what": event.kind,
            "model": f"{event.model}@{event.version}" if event.version else event.model or None,
            "rollout": event.rollout or None,
            "reason": event.reason or None,
            "detail": event.detail or None,
        }
        for event in events
    ]


def rollout_row(rollout: Any) -> dict[str, Any]:
    """Return a rollout as one row of a list."""
    tally = rollout.tally
    return {
        "rollout": rollout.id,
        "model": f"{rollout.model}@{rollout.version}",
        "state": rollout_state(rollout),
        "stage": f"{rollout.stage + 1} of {len(rollout.stages)}",
        "to": _labels(rollout.selector) or "all devices",
        "cohort": tally.cohort,
        "done": tally.done,
        "failed": tally.failed,
        "reason": rollout.reason or None,
        "started": moment(rollout.created_at),
    }


def rollout_record(rollout: Any) -> dict[str, Any]:
    """Return all that is known of a rollout."""
    tally = rollout.tally
    return {
        "rollout": rollout.id,
        "model": rollout.model,
        "version": rollout.version,
        "from_version": rollout.from_version or None,
        "state": rollout_state(rollout),
        "reason": rollout.reason or None,
        "detail": rollout.detail or None,
        "to": dict(sorted(rollout.selector.items())),
        "stage": rollout.stage + 1,
        "stages": [stage_row(place, stage, rollout) for place, stage in enumerate(rollout.stages)],
        "started": moment(rollout.created_at),
        "by": rollout.created_by,
        "devices": {
            name: getattr(tally, name)
            for name in (
                "cohort", "online", "waiting", "updating", "soaking", "done", "failed", "offline", "taken", "returned",
            )
        },
        "failures": dict(sorted(tally.reasons.items())),
    }  # fmt: skip


def stage_row(place: int, stage: Any, rollout: Any) -> dict[str, Any]:
    """Return a stage as one row."""
    started = stage.HasField("started_at")
    if not started:
        state = "to come"
    elif place < rollout.stage:
        state = "over"
    else:
        state = rollout_state(rollout)
    return {
        "stage": place + 1,
        "size": f"{100 * stage.share:g}%" if stage.share else str(stage.count),
        "devices": stage.devices,
        "soak_s": stage.soak_s,
        "state": state,
        "started": moment(stage.started_at) if started else None,
    }


def rollout_state(rollout: Any) -> str:
    """Return a rollout's state as a word."""
    known = rollout.state in fleet_pb2.RolloutState.values()  # a newer cloud may know more
    return fleet_pb2.RolloutState.Name(rollout.state).removeprefix("ROLLOUT_STATE_").lower() if known else "?"


def _state(report: Any) -> str:
    known = report.state in fleet_pb2.UpdateState.values()
    return fleet_pb2.UpdateState.Name(report.state).removeprefix("UPDATE_STATE_").lower() if known else "?"


def _told(told: Any) -> str | None:
    if told is None:
        return None
    if not told.version:
        return str(told.why)
    return f"{told.version} by {told.rollout or told.why}"


def _labels(labels: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))
