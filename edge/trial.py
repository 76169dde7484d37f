"""The verdict on a version that serves on trial. Pure: terms and evidence in, a verdict out.

A limit is broken when the evidence says so, not when a count is above it: few requests decide nothing. Errors and
disagreement are tested exactly (binomial), latency by a sign test (were the new median within the limit, at most half
of the new times were above the limit times the old median), the change of the escalation rate by Newcombe's interval.
Evidence is looked at again and again, and each look is another chance to be wrong, so each test is a strict one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from edge.intervals import chance_of, difference
from edge.tally import Seen

LEAST: Final = 20  # requests of each version before two of them are compared
PATIENCE: Final = 10  # times `soak_s` that a trial waits for `min_requests`
_ALPHA: Final = 1e-4  # chance to break a limit that is just kept, at one look
_Z: Final = 3.72  # the same, in standard errors


class Terms(BaseModel):
    """What a version must stand while it serves, before the device keeps it for good; 0 stands for no such limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    soak_s: float = Field(default=0.0, ge=0, le=31_536_000)  # how long; 0: it is kept at once
    min_requests: int = Field(default=0, ge=0)  # and over how many requests, where any come
    shadow_requests: int = Field(default=0, ge=0, le=1_000_000)  # answered in the dark before it may serve
    max_error_rate: float = Field(default=0.0, ge=0, le=1)  # share of requests that the light model fails
    max_latency_ratio: float = Field(default=0.0, ge=0)  # its median latency, new over old
    max_escalation_change: float = Field(default=0.0, ge=0, le=1)  # of the escalation rate, either way
    min_agreement: float = Field(default=0.0, ge=0, le=1)  # of confident answers with the heavy model's


class Reason(StrEnum):
    """Why a trial failed."""

    ERRORS = "trial-errors"
    LATENCY = "trial-latency"
    ESCALATION = "trial-escalation"
    AGREEMENT = "trial-agreement"
    CRASHES = "trial-crashes"
    TAKEN_BACK = "taken-back"  # the cloud asked for the version before it


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen of a version on trial, and of the one before it."""

    now: Seen
    before: Seen


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of the version: neither field set stands for going on."""

    keep: bool = False
    broken: Reason | None = None
    detail: str = ""


def judge(terms: Terms, evidence: Evidence) -> Verdict:
    """Return the verdict on the evidence so far."""
    for check in (_errors, _latency, _escalation, _agreement):
        verdict = check(terms, evidence)
        if verdict is not None:
            return verdict
    now = evidence.now
    if now.seconds < terms.soak_s:
        return Verdict()
    enough = now.requests >= terms.min_requests or now.requests == 0
    return Verdict(keep=enough or now.seconds >= PATIENCE * terms.soak_s)


def _errors(terms: Terms, evidence: Evidence) -> Verdict | None:
    now = evidence.now
    if not terms.max_error_rate or chance_of(now.errors, now.requests, terms.max_error_rate) >= _ALPHA:
        return None
    told = f"{now.errors} of {now.requests} requests failed, expected at most {terms.max_error_rate:.2%}"
    return Verdict(broken=Reason.ERRORS, detail=told)


def _latency(terms: Terms, evidence: Evidence) -> Verdict | None:
    if slower := compare_latency(terms.max_latency_ratio, evidence):
        return Verdict(broken=Reason.LATENCY, detail=slower)
    return None


def compare_latency(most: float, evidence: Evidence) -> str:
    """Return what is wrong with the new median latency, or nothing.

    Args:
        most: Largest ratio of the medians, new over old; 0 for none.
        evidence: Of both versions.
    """
    if not most or evidence.before.requests < LEAST:
        return ""
    median = evidence.before.quantile_ms(0.5)
    slower, count = evidence.now.slower_than(most * median)
    if not count or chance_of(slower, count, 0.5) >= _ALPHA:
        return ""
    now = evidence.now.quantile_ms(0.5)
    return f"median latency {now:.3g} ms, {median:.3g} ms before: expected at most {most:g} times that"


def _escalation(terms: Terms, evidence: Evidence) -> Verdict | None:
    now, before = evidence.now, evidence.before
    if not terms.max_escalation_change or min(now.requests, before.requests) < LEAST:
        return None
    low, high = difference(now.escalated, now.requests, before.escalated, before.requests, _Z)
    if -terms.max_escalation_change <= high and low <= terms.max_escalation_change:
        return None
    rate, was = now.escalated / now.requests, before.escalated / before.requests
    told = f"{rate:.1%} escalated, {was:.1%} before: expected a change of at most {terms.max_escalation_change:.1%}"
    return Verdict(broken=Reason.ESCALATION, detail=told)


def _agreement(terms: Terms, evidence: Evidence) -> Verdict | None:
    now = evidence.now
    if not terms.min_agreement or chance_of(now.disagreed, now.audited, 1.0 - terms.min_agreement) >= _ALPHA:
        return None
    told = (
        f"{now.disagreed} of {now.audited} confident answers differ from the cloud's, "
        f"expected {terms.min_agreement:.1%} to agree"
    )
    return Verdict(broken=Reason.AGREEMENT, detail=told)
