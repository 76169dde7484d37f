"""Rollouts, as decisions: who is told a version, when the next stage begins, and when everybody goes back.

Nothing here reads a clock, a database or a socket: the same plan, progress and devices always give the same decision,
so a restarted cloud, or another replica, decides alike. Rules:
1. A device's position in a rollout is a hash of both names. A stage is the devices up to a threshold; it is fixed
   when the stage begins and never falls, so stage k's cohort contains stage k-1's and no device's fate depends on who
   else is there.
2. The unit of evidence is the device: it fails when it refuses the version, takes it back, or its own figures break a
   limit. A stage ends early when the number of failed devices cannot be chance, at its end when there are too many.
3. A rollout goes on when the online part of its stage is done; devices that are away hold nothing up for ever.
4. After an abort nobody is told the version.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from cloud.rollout_evidence import (
    Candidate,
    DeviceState,
    Evidence,
    Failure,
    Heard,
    Outcome,
    Tally,
    binomial_tail,
    count,
    exceeds,
    outcome_of,
)
from cloud.rollout_plan import (
    POSITIONS,
    Gates,
    Plan,
    Progress,
    Stage,
    State,
    check_plan,
    disjoint,
    matches,
    position,
    stage_of,
)

__all__ = [
    "POSITIONS",
    "Action",
    "Candidate",
    "Decision",
    "DeviceState",
    "Evidence",
    "Failure",
    "Gates",
    "Heard",
    "Outcome",
    "Plan",
    "Progress",
    "Stage",
    "State",
    "Tally",
    "advance",
    "begin",
    "binomial_tail",
    "check_plan",
    "count",
    "decide",
    "disjoint",
    "matches",
    "outcome_of",
    "position",
    "size_of",
    "stage_of",
    "tells",
]

_ALONE: Final = 5  # of so many devices, one may fail whatever the share: it may be the device
_EARLY_FAILURES: Final = 2  # one failed device proves nothing before the stage's end


class Action(StrEnum):
    """What is to be done with a rollout."""

    WAIT = "wait"
    PROMOTE = "promote"
    COMPLETE = "complete"
    PAUSE = "pause"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and why."""

    action: Action
    reason: str
    detail: str
    tally: Tally
    threshold: int = 0  # of the next stage, when promoted


def begin(plan: Plan, devices: Iterable[Candidate], now: float) -> Progress:
    """Return the progress of a rollout whose first stage begins now."""
    return Progress(State.ACTIVE, 0, (_threshold(plan, 0, devices, 0),), (now,))


def tells(plan: Plan, progress: Progress, device: str, heard: Heard | None) -> bool:
    """Return whether the rollout wants its version on a device that it is for.

    A paused one wants it only where it has begun: a device that was away, or told a moment ago, does not begin.
    """
    match progress.state:
        case State.COMPLETED:
            return True
        case State.ACTIVE:
            return position(plan.id, device) < progress.threshold
        case State.PAUSED:
            begun = heard is not None and plan.version in (heard.version, heard.serving_version)
            return begun and position(plan.id, device) < progress.threshold
        case _:
            return False


def advance(progress: Progress, decision: Decision, now: float) -> Progress:
    """Return the progress after a decision."""
    match decision.action:
        case Action.PROMOTE:
            thresholds = (*progress.thresholds, max(decision.threshold, progress.threshold))
            return Progress(progress.state, progress.stage + 1, thresholds, (*progress.started, now))
        case Action.COMPLETE:
            return replace(progress, state=State.COMPLETED)
        case Action.PAUSE:
            return replace(progress, state=State.PAUSED)
        case Action.ABORT:
            return replace(progress, state=State.ABORTED)
        case Action.WAIT:
            return progress


def decide(plan: Plan, progress: Progress, devices: Sequence[Candidate], now: float, withdrawn: str = "") -> Decision:
    """Return what is to be done with a rollout now.

    Args:
        plan: What was asked for.
        progress: How far it is.
        devices: All devices that it is for, in or out of the present cohort.
        now: Unix seconds.
        withdrawn: Why operators took the version back, if they did: no stage, and no pause, outlasts that.
    """
    cohort = [device for device in devices if position(plan.id, device.id) < progress.threshold]
    tally = count(plan, progress, cohort, now)
    if not progress.state.is_open:
        return Decision(Action.WAIT, progress.state.name.lower(), "it is over", tally)
    if withdrawn:
        return Decision(Action.ABORT, "withdrawn", withdrawn, tally)
    before = progress.thresholds[-2] if progress.stage else 0
    newcomers = [device for device in cohort if position(plan.id, device.id) >= before]
    fresh = count(plan, progress, newcomers, now)
    for group, name in ((tally, "of the cohort"), (fresh, "of this stage")):
        broken = _broken(plan.gates, group, name)
        if broken:
            return Decision(Action.ABORT, *broken, tally)
    if progress.state is State.PAUSED:
        return Decision(Action.WAIT, "paused", "an operator, or a stage without evidence, paused it", tally)
    return _next(plan, progress, devices, tally, fresh, now)


def _next(
    plan: Plan, progress: Progress, devices: Sequence[Candidate], tally: Tally, fresh: Tally, now: float
) -> Decision:
    is_late = now >= progress.started[-1] + plan.gates.stage_limit_s
    missing = "" if is_late else _missing(plan.gates, tally) or (_missing(plan.gates, fresh) if fresh.cohort else "")
    if missing:
        return Decision(Action.WAIT, "stage-runs", missing, tally)
    for group, name in ((tally, "of the cohort"), (fresh, "of this stage")):
        if (failed := group.of(Outcome.FAILED)) > _allowed(plan.gates, group.settled):
            detail = f"{failed} of {group.settled} devices {name} failed{_why(group)}"
            return Decision(Action.ABORT, "gate-failures", detail, tally)
    if not tally.of(Outcome.DONE):
        return Decision(Action.PAUSE, "no-evidence", "the stage's time is up and no device is past its soak", tally)
    done = f"{tally.of(Outcome.DONE)} of {tally.cohort} devices are past their soak, {tally.offline} are away"
    if progress.stage + 1 == len(plan.stages):
        return Decision(Action.COMPLETE, "all-stages-done", done, tally)
    threshold = _threshold(plan, progress.stage + 1, devices, progress.threshold)
    return Decision(Action.PROMOTE, "time-up" if is_late else "stage-done", done, tally, threshold)


def _threshold(plan: Plan, stage: int, devices: Iterable[Candidate], before: int) -> int:
    wanted = plan.stages[stage]
    if wanted.is_everybody:
        return POSITIONS
    places = sorted(position(plan.id, device.id) for device in devices)
    if not places:
        return max(before, math.ceil(wanted.share * POSITIONS))
    return max(before, places[size_of(wanted, len(places)) - 1] + 1)


def size_of(stage: Stage, devices: int) -> int:
    """Return how many of so many devices a stage takes: at least one, when there is any."""
    size = stage.count or math.ceil(round(stage.share * devices, 9))  # 7% of 100 is 7, not 8
    return min(max(size, 1), devices)


def _broken(gates: Gates, tally: Tally, name: str) -> tuple[str, str] | None:
    """Return reason and detail when a gate is broken already, whatever may still come."""
    failed, tried = tally.of(Outcome.FAILED), tally.tried
    if gates.max_failures and failed >= gates.max_failures:
        return "gate-failures", f"{failed} devices {name} failed, {gates.max_failures} are too many{_why(tally)}"
    if failed >= _EARLY_FAILURES and binomial_tail(failed, tried, gates.max_failure_rate) < 1.0 - gates.confidence:
        return "gate-failures", f"{failed} of {tried} devices {name} failed, which is no chance{_why(tally)}"
    seen = tally.pooled
    if exceeds(seen.errors, seen.requests, gates.max_error_rate, gates):
        return "gate-error-rate", f"{seen.errors} of {seen.requests} requests {name} failed"
    if gates.min_agreement and exceeds(seen.disagreed, seen.audited, 1.0 - gates.min_agreement, gates):
        return (
            "gate-agreement",
            f"{seen.disagreed} of {seen.audited} audited answers {name} disagree with the heavy model",
        )
    return None


def _missing(gates: Gates, tally: Tally) -> str:
    """Return what a stage still waits for."""
    if 2 * tally.settled < tally.cohort:
        return f"{tally.settled} of {tally.cohort} devices are past their soak; half of them must be"
    needed = math.ceil(round(gates.done_share * tally.considered, 9))
    if not tally.considered:
        return "no device of the cohort is online"
    if tally.settled < needed:
        return f"{tally.settled} of {tally.considered} devices that are online are past their soak; {needed} must be"
    return ""


def _allowed(gates: Gates, settled: int) -> int:
    alone = 1 if settled >= _ALONE and gates.max_failure_rate > 0 else 0
    return max(alone, math.floor(round(gates.max_failure_rate * settled, 9)))


def _why(tally: Tally) -> str:
    most = sorted(tally.reasons.items(), key=lambda item: (-item[1], item[0]))[:3]
    return f" ({', '.join(f'{reason}: {number}' for reason, number in most)})" if most else ""
