"""What the fleet service hears and says, as messages: checked on the way in, made on the way out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp

from cloud import database as db
from cloud.roster import Told
from isthmus.errors import InputError
from isthmus.v1 import fleet_pb2

MAX_NUMBER: Final = 2**53  # as in a manifest; a database holds no more than 2**63 - 1
MAX_LABELS: Final = 64
_MAX_TEXT: Final = 500  # characters of a reason or detail that are kept
_LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}")


def printable(text: str) -> str:
    """Return a device's text as an operator's terminal may show it: no control characters, not endless."""
    return "".join(character if character.isprintable() else " " for character in text[:_MAX_TEXT])


def checked_report(request: Any) -> Any:
    """Return a report as it may be kept.

    Raises:
        InputError: It says nothing, or something that cannot be.
    """
    if not request.model or request.state not in fleet_pb2.UpdateState.values() or not request.state:
        raise InputError("expected a report with a model and a state")
    seen = request.evidence
    counts = (
        request.version, request.serving_version, request.bytes_fetched, request.number, request.attempt,
        seen.requests, seen.escalated, seen.audited, seen.before_requests, seen.before_escalated,
    )  # fmt: skip
    if max(counts) > MAX_NUMBER:
        raise InputError(f"expected versions, counts and bytes of at most {MAX_NUMBER}")
    if seen.errors > seen.requests or seen.disagreed > seen.audited or seen.before_errors > seen.before_requests:
        raise InputError("evidence: expected no more errors than requests, and no more differences than audits")
    figures = (seen.latency_p50_ms, seen.latency_p99_ms, seen.seconds, seen.before_latency_p50_ms)
    if not all(0.0 <= figure <= MAX_NUMBER for figure in figures):
        raise InputError("evidence: expected times that are numbers and not negative")
    report = fleet_pb2.ReportRequest()
    report.CopyFrom(request)
    for name in ("reason", "detail", "variant", "rollout", "step"):
        setattr(report, name, printable(getattr(request, name)))
    return report


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return labels, or a selector, as they may be kept.

    Raises:
        InputError: A name or a value is not one, or there are too many.
    """
    if len(labels) > MAX_LABELS:
        raise InputError(f"expected at most {MAX_LABELS} labels, got {len(labels)}")
    for key, value in labels.items():
        if not _LABEL.fullmatch(key) or not _LABEL.fullmatch(value):
            raise InputError(
                f"expected a label such as group=line-3, got {f'{key}={value}'[:80]!r}",
                hint="letters, digits, dot, dash, underscore and slash; 64 characters at most",
            )
    return dict(labels)


def watch_message(model: str, told: Told) -> Any:
    """Return what a device is told."""
    message = fleet_pb2.WatchResponse(model=model, version=told.version, rollout=told.rollout, attempt=told.attempt)
    if told.gates is not None:
        message.trial.soak_s = told.soak_s
        message.trial.max_error_rate = told.gates.max_error_rate
        message.trial.max_latency_ratio = told.gates.max_latency_ratio
        message.trial.min_agreement = told.gates.min_agreement
    return message


def event_message(event: db.Event) -> Any:
    """Return an event as it travels."""
    return fleet_pb2.FleetEvent(
        at=timestamp(event.at), kind=event.kind, device_id=event.device_id, rollout=event.rollout,
        model=event.model, version=event.version, reason=event.reason, detail=event.detail,
    )  # fmt: skip


def report_message(row: db.Report) -> Any:
    """Return a report as it came."""
    return fleet_pb2.ReportRequest(
        model=row.model,
        version=row.version,
        state=fleet_pb2.UpdateState.ValueType(row.state),
        serving_version=row.serving_version,
        reason=row.reason,
        detail=row.detail,
        bytes_fetched=row.bytes_fetched,
        variant=row.variant,
        rollout=row.rollout,
        attempt=row.attempt,
        number=row.number,
        step=row.step,
        evidence=fleet_pb2.Evidence.FromString(row.evidence) if row.evidence else None,
    )


def timestamp(seconds: float) -> Timestamp:
    """Return Unix seconds as they travel."""
    stamp = Timestamp()
    stamp.FromMilliseconds(round(seconds * 1000))
    return stamp
