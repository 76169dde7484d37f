"""What the cloud records beside calls of administrators: devices that refused a version, rollouts that moved by
themselves, models that were withdrawn, and a share of the inference requests that it answered.

None of it waits for the disk, and none of it stops what it is about: a device is heard and a request answered whether
or not the audit log can be written. How much of it is written is bounded (security.audit.budget).
"""

from __future__ import annotations

import random
from typing import Any, Final

from cloud.rollout import Plan
from isthmus.v1 import fleet_pb2
from security.audit.budget import Budget
from security.audit.interceptors import request_id, source_of, who_calls
from security.audit.records import Event, Who
from security.audit.writer import NoTrail, Trail
from security.tokens import Claims

ESCALATION: Final = "inference.answered"
_REFUSING: Final = {
    fleet_pb2.UPDATE_STATE_REFUSED: "refused",
    fleet_pb2.UPDATE_STATE_ROLLED_BACK: "rolled-back",
}
_by_lot: Final = random.Random().random  # noqa: S311 - no secret, and no system call for every request


class Recorder:
    """Knows what is worth a record.

    Args:
        trail: Gets the records.
        budget: Of what devices report.
        share: Of the answered inference requests.
        samples: Of those samples.
    """

    def __init__(
        self,
        trail: Trail | None = None,
        budget: Budget | None = None,
        *,
        share: float = 0.0,
        samples: Budget | None = None,
    ) -> None:
        self._trail = trail or NoTrail()
        self._budget = budget or Budget()
        self._share, self._samples = share, samples or Budget(per_s=20.0, burst=200)

    def device_reports(self, report: Any, context: Any) -> None:
        """Record that a version failed on a device."""
        decision = _REFUSING.get(report.state)
        if decision is None:
            return
        who = who_calls(context)
        event = Event(
            "device.report", "failed", who, reason=report.reason or decision, model=report.model,
            version=report.version, device=who.subject, rollout=report.rollout,
            detail={"state": decision, "serving": report.serving_version},
        )  # fmt: skip
        if self._budget.admits(source_of(who), event):
            self._trail.note(event)

    def rollout_moves(self, plan: Plan, tenant: str, kind: str, reason: str, detail: str) -> None:
        """Record what a rollout of a tenant did by itself: promoted, completed, paused or aborted."""
        self._trail.note(
            Event(
                f"rollout.{kind}", "done", Who("cloud", tenant), reason=reason, model=plan.model, version=plan.version,
                rollout=plan.id, detail={"why": detail} if detail else {},
            )
        )  # fmt: skip

    def withdrawn(self, model: str, version: int, why: str, by: Claims) -> None:
        """Record that an operator withdrew a version."""
        who = Who(by.subject, by.tenant, by.token_id, by.thumbprint)
        self._trail.note(Event("model.withdrawn", "done", who, model=model, version=version, detail={"why": why}))

    def draws(self) -> bool:
        """Return whether the lot falls on this answered inference request."""
        return self._share > 0.0 and _by_lot() < self._share

    def answered(self, model: str, version: int, given_id: str, *, sealed: bool, context: Any) -> None:
        """Record an answered inference request, on which the lot fell."""
        who = who_calls(context)
        detail = {"share": repr(self._share)} | ({"sealed": "yes"} if sealed else {})
        event = Event(
            ESCALATION,
            "done",
            who,
            model=model,
            version=version,
            request_id=given_id or request_id(context),
            detail=detail,
        )
        if self._samples.admits(source_of(who), event):
            self._trail.note(event)
