"""What devices say of a version under a rollout, added up, and what of that is no chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from statistics import NormalDist
from typing import Final

from cloud.rollout_plan import Gates, Plan, Progress, stage_of

_AUDIT_ALARM: Final = "audit-alarm"  # the reason of a report that the serving version's answers went wrong


class DeviceState(IntEnum):
    """What a device says of a version; the numbers are those of UpdateState in fleet.proto."""

    ACTIVE = 1
    REFUSED = 2
    UPDATING = 3
    SOAKING = 4
    ROLLED_BACK = 5


class Outcome(StrEnum):
    """What became of the version on one device."""

    WAITING = "waiting"
    UPDATING = "updating"
    SOAKING = "soaking"
    DONE = "done"
    FAILED = "failed"


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
    if exceeds(seen.errors, seen.requests, gates.max_error_rate, gates):
        return "error-rate"
    if gates.min_agreement and exceeds(seen.disagreed, seen.audited, 1.0 - gates.min_agreement, gates):
        return "agreement"
    return ""


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


def exceeds(bad: int, total: int, limit: float, gates: Gates) -> bool:
    """Return whether a share lies above its limit beyond chance: Wilson's lower bound (JASA 22, 1927) does."""
    if not 0.0 < limit < 1.0 or total < gates.min_samples or bad <= 0:
        return False
    z = NormalDist().inv_cdf(gates.confidence)
    share = bad / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(max(share * (1 - share), 0.0) / total + z * z / (4 * total * total))
    return (centre - spread) / (1 + z * z / total) > limit
