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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from hashlib import sha256
from itertools import pairwise
from statistics import NormalDist
from typing import Final

from isthmus.errors import InputError

POSITIONS: Final = 1 << 53  # positions lie below; every database and every float holds them exactly
MAX_STAGES: Final = 20
MAX_SOAK_S: Final = 30 * 86400
_ALONE: Final = 5  # of so many devices, one may fail whatever the share: it may be the device
_EARLY_FAILURES: Final = 2  # one failed device proves nothing before the stage's end
_AUDIT_ALARM: Final = "audit-alarm"  # the reason of a report that the serving version's answers went wrong


class State(IntEnum):
    """Where a rollout stands; the numbers are those of RolloutState in fleet.proto."""

    ACTIVE = 1
    PAUSED = 2
    COMPLETED = 3
    ABORTED = 4
    SUPERSEDED = 5

    @property
    def is_open(self) -> bool:
        """Return whether it may still go on."""
        return self in (State.ACTIVE, State.PAUSED)


class DeviceState(IntEnum):
    """What a device says of a version; the numbers are those of UpdateState in fleet.proto."""

    ACTIVE = 1
    REFUSED = 2
    UPDATING = 3
    SOAKING = 4
    ROLLED_BACK = 5


class Action(StrEnum):
    """What is to be done with a rollout."""

    WAIT = "wait"
    PROMOTE = "promote"
    COMPLETE = "complete"
    PAUSE = "pause"
    ABORT = "abort"


class Outcome(StrEnum):
    """What became of the version on one device."""

    WAITING = "waiting"
    UPDATING = "updating"
    SOAKING = "soaking"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the devices, all stages before included: a share of them, or a number."""

    share: float = 0.0
    count: int = 0
    soak_s: int = 600

    @property
    def is_everybody(self) -> bool:
        """Return whether no device is left out."""
        return self.share >= 1.0


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits; docs/rollouts.md explains each. Zero stands for no such limit, where that makes sense."""

    max_failure_rate: float = 0.05
    max_failures: int = 0
    confidence: float = 0.99
    max_error_rate: float = 0.02
    min_agreement: float = 0.0
    max_latency_ratio: float = 0.0
    min_samples: int = 100
    done_share: float = 0.95
    stage_limit_s: int = 86400


@dataclass(frozen=True, slots=True)
class Plan:
    """What an operator asked for."""

    id: str
    model: str
    version: int
    stages: tuple[Stage, ...]
    gates: Gates = Gates()
    selector: Mapping[str, str] = field(default_factory=dict)
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is: all that a rollout remembers."""

    state: State
    stage: int
    thresholds: tuple[int, ...]  # of the stages that began; positions below the last are told the version
    started: tuple[float, ...]  # when each began, Unix seconds

    @property
    def threshold(self) -> int:
        """Return the first position that is not told."""
        return self.thresholds[-1]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a device saw of the version while it served."""

    requests: int = 0
    errors: int = 0
    audited: int = 0
    disagreed: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Heard:
    """The newest report of a device on a model."""

    version: int
    state: DeviceState
    serving_version: int
    reason: str = ""
    rollout: str = ""
    attempt: int = 0
    serving_since: float = 0.0  # when the cloud first heard that this version serves
    evidence: Evidence = Evidence()


@dataclass(frozen=True, slots=True)
class Failure:
    """The last failure of a device under a rollout, which later reports on other versions do not hide."""

    rollout: str
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that a rollout is for: labels, runtime and platform fit, and it is not pinned."""

    id: str
    online: bool
    heard: Heard | None = None
    attempt: int = 0  # that the device is told
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """Devices of a cohort by what became of the version on them."""

    cohort: int = 0
    online: int = 0
    considered: int = 0  # online, or settled
    outcomes: Mapping[Outcome, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    offline: int = 0  # and not settled
    pooled: Evidence = Evidence()  # of the devices that did not fail

    def of(self, outcome: Outcome) -> int:
        """Return how many devices there are with this outcome."""
        return self.outcomes.get(outcome, 0)

    @property
    def settled(self) -> int:
        """Return how many devices will not change any more by themselves."""
        return self.of(Outcome.DONE) + self.of(Outcome.FAILED)

    @property
    def tried(self) -> int:
        """Return on how many devices the version has served, or failed to."""
        return self.settled + self.of(Outcome.SOAKING)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and why."""

    action: Action
    reason: str
    detail: str
    tally: Tally
    threshold: int = 0  # of the next stage, when promoted


def position(rollout: str, device: str) -> int:
    """Return a device's place in a rollout's order: uniform, and the same for ever."""
    return int.from_bytes(sha256(f"{rollout}\0{device}".encode()).digest()[:8], "big") >> 11


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return whether a device with these labels is meant."""
    return all(labels.get(key) == value for key, value in selector.items())


def disjoint(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Return whether no device can be meant by both: they ask for different values of one label."""
    return any(key in other and other[key] != value for key, value in one.items())


def check_plan(stages: Sequence[Stage], gates: Gates) -> None:
    """Check what an operator asked for.

    Raises:
        InputError: Stages do not grow up to everybody, or a limit is out of its range.
    """
    if not 1 <= len(stages) <= MAX_STAGES:
        raise InputError(f"stages: expected 1 to {MAX_STAGES}, got {len(stages)}")
    for stage in stages:
        if (stage.count > 0) == (stage.share > 0):
            raise InputError("stages: expected either a share or a number of devices, above 0")
        if not (0.0 <= stage.share <= 1.0 and 0 <= stage.soak_s <= MAX_SOAK_S):
            raise InputError(f"stages: expected shares up to 100% and a soak of at most {MAX_SOAK_S} s, got {stage}")
    for sizes in ([s.share for s in stages if s.share], [s.count for s in stages if s.count]):
        if any(later <= earlier for earlier, later in pairwise(sizes)):
            raise InputError("stages: expected each to be larger than the one before", hint="for example 1%,10%,100%")
    if not stages[-1].is_everybody or any(stage.is_everybody for stage in stages[:-1]):
        raise InputError("stages: expected the last one, and only that, to be 100%", hint="for example 1%,10%,100%")
    _check_gates(gates, max(stage.soak_s for stage in stages))


def _check_gates(gates: Gates, soak_s: int) -> None:
    # (name, value, smallest, largest); nothing but a number passes a comparison
    ranges = (
        ("max_failure_rate", gates.max_failure_rate, 0.0, 1.0), ("max_error_rate", gates.max_error_rate, 0.0, 1.0),
        ("min_agreement", gates.min_agreement, 0.0, 1.0), ("max_latency_ratio", gates.max_latency_ratio, 0.0, 1e6),
        ("confidence", gates.confidence, 0.5, 1.0 - 1e-9), ("done_share", gates.done_share, 0.01, 1.0),
        ("min_samples", gates.min_samples, 1, 1 << 31), ("stage_limit_s", gates.stage_limit_s, soak_s + 1, 1 << 31),
    )  # fmt: skip
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise InputError(f"{name}: expected {low:g} to {high:g}, got {value:g}")


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


def stage_of(plan: Plan, progress: Progress, device: str) -> Stage:
    """Return the stage that a device came in with; its soak is the device's."""
    place = position(plan.id, device)
    for stage, threshold in zip(plan.stages, progress.thresholds, strict=False):
        if place < threshold:
            return stage
    return plan.stages[-1]


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


def count(plan: Plan, progress: Progress, cohort: Iterable[Candidate], now: float) -> Tally:
    """Return what became of the version on these devices."""
    outcomes: Counter[Outcome] = Counter()
    reasons: Counter[str] = Counter()
    size = online = considered = offline = requests = errors = audited = disagreed = 0
    for device in cohort:
        outcome, reason = outcome_of(plan, progress, device, now)
        settled = outcome in (Outcome.DONE, Outcome.FAILED)
        outcomes[outcome] += 1
        size, online = size + 1, online + device.online
        considered, offline = considered + (device.online or settled), offline + (not device.online and not settled)
        if outcome is Outcome.FAILED:
            reasons[reason] += 1
        elif outcome in (Outcome.SOAKING, Outcome.DONE) and device.heard is not None:
            seen = device.heard.evidence
            requests, errors = requests + seen.requests, errors + seen.errors
            audited, disagreed = audited + seen.audited, disagreed + seen.disagreed
    pooled = Evidence(requests=requests, errors=errors, audited=audited, disagreed=disagreed)
    return Tally(size, online, considered, dict(outcomes), dict(reasons), offline, pooled)


def outcome_of(plan: Plan, progress: Progress, device: Candidate, now: float) -> tuple[Outcome, str]:
    """Return what became of the version on a device, and why it failed."""
    failure, heard = device.failure, device.heard
    # A smaller attempt is one before an operator had it try again.
    if failure is not None and failure.rollout == plan.id and failure.attempt >= device.attempt:
        return Outcome.FAILED, failure.reason
    if heard is None or plan.version not in (heard.version, heard.serving_version):
        return Outcome.WAITING, ""
    if heard.version == plan.version and heard.rollout == plan.id:
        reason = _AUDIT_ALARM if heard.reason == _AUDIT_ALARM else _verdict(plan.gates, heard.evidence)
        if reason:
            return Outcome.FAILED, reason
    if heard.serving_version != plan.version:
        return Outcome.UPDATING if heard.state is DeviceState.UPDATING else Outcome.WAITING, ""
    served_s = max(now - heard.serving_since, heard.evidence.seconds)
    is_done = heard.state is DeviceState.ACTIVE and served_s >= stage_of(plan, progress, device.id).soak_s
    return Outcome.DONE if is_done else Outcome.SOAKING, ""


def _verdict(gates: Gates, seen: Evidence) -> str:
    """Return which limit one device's own figures break beyond chance.

    Not latency: only the device can tell a slow version from a machine that has become busy, and goes back by itself.
    """
    if _exceeds(seen.errors, seen.requests, gates.max_error_rate, gates):
        return "error-rate"
    if gates.min_agreement and _exceeds(seen.disagreed, seen.audited, 1.0 - gates.min_agreement, gates):
        return "agreement"
    return ""


def _broken(gates: Gates, tally: Tally, name: str) -> tuple[str, str] | None:
    """Return reason and detail when a gate is broken already, whatever may still come."""
    failed, tried = tally.of(Outcome.FAILED), tally.tried
    if gates.max_failures and failed >= gates.max_failures:
        return "gate-failures", f"{failed} devices {name} failed, {gates.max_failures} are too many{_why(tally)}"
    if failed >= _EARLY_FAILURES and binomial_tail(failed, tried, gates.max_failure_rate) < 1.0 - gates.confidence:
        return "gate-failures", f"{failed} of {tried} devices {name} failed, which is no chance{_why(tally)}"
    seen = tally.pooled
    if _exceeds(seen.errors, seen.requests, gates.max_error_rate, gates):
        return "gate-error-rate", f"{seen.errors} of {seen.requests} requests {name} failed"
    if gates.min_agreement and _exceeds(seen.disagreed, seen.audited, 1.0 - gates.min_agreement, gates):
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


def binomial_tail(successes: int, trials: int, rate: float) -> float:
    """Return the probability of at least so many successes: the p-value of the exact (Clopper-Pearson) test."""
    if successes <= 0 or rate >= 1.0:
        return 1.0
    if rate <= 0.0:
        return 0.0
    at = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(rate) + (trials - k) * math.log1p(-rate)
        for k in range(successes, trials + 1)
    ]  # fmt: skip
    return min(1.0, math.fsum(map(math.exp, at)))


def _exceeds(bad: int, total: int, limit: float, gates: Gates) -> bool:
    """Return whether a share lies above its limit beyond chance: Wilson's lower bound (JASA 22, 1927) does."""
    if not 0.0 < limit < 1.0 or total < gates.min_samples or bad <= 0:
        return False
    z = NormalDist().inv_cdf(gates.confidence)
    share = bad / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(max(share * (1 - share), 0.0) / total + z * z / (4 * total * total))
    return (centre - spread) / (1 + z * z / total) > limit
