"""Audit sampling: a small share of confident requests is sent up as well, so that the agent knows its own error rate.

Under drift a light model can go wrong while its scores stay high: the escalation rate hardly moves, and nothing else on
the device can tell. So a share of the answers that stay, drawn by lot, is compared with the heavy model's, behind the
answer: no caller waits for it, none gets another answer because of it, and a request whose caller asked for the edge is
never sent.

What is counted is disagreement. The calibration record says how often both models disagree among the answers that stay;
the alarm is a test, at every audit, that they now disagree more often. It is an e-detector (Shin, Ramdas & Rinaldo, New
England Journal of Statistics in Data Science, 2024): Shiryaev-Roberts sums of likelihood ratios, averaged over several
alternatives. Without a change, it comes at most once in 10,000 audits on average, however often one looks.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog

from edge.agreement import count_agreement
from edge.answers import check_cloud_answer, wanted_outputs
from edge.intervals import wilson
from edge.model import LiveModel
from edge.question import Question
from edge.uplink import Answer, Check, Failure
from isthmus.bundle import VariantCalibration
from isthmus.errors import UnavailableError
from isthmus.tensors import Array

ALARM: Final = "audit-alarm"  # the reason in what is reported of one
_AUDITS_PER_FALSE_ALARM: Final = 10_000
_WINDOW: Final = 1000  # newest audits, for the interval
_RATIOS: Final = (1.5, 2.0, 3.0, 5.0)  # alternatives, as multiples of the expected disagreement ...
_STEPS: Final = (0.05, 0.1, 0.2)  # ... and as additions to it
_LARGEST: Final = 0.95
_VERSIONS: Final = 2  # of a model: one on trial, and the one before it
_Z: Final = 1.96  # of the 95 % interval

_by_lot: Final = random.Random().random  # noqa: S311 - no secret, and no system call for every request

log = structlog.get_logger(__name__)


class _Escalator(Protocol):
    async def escalate(self, request: bytes, *, remaining_s: float, check: Check) -> Answer | Failure: ...


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What the audits of one version say."""

    audited: int  # rows of answers that were compared
    disagreed: int
    failed: int  # requests that were drawn and not compared: there was no cloud answer
    low: float  # 95 % interval of the rate of disagreement, over the newest audits (Wilson, 1927)
    high: float
    expected: float  # by the calibration record
    risk: float | None  # estimate: the record's share of errors among the edge's answers, and what came on top
    alarm: bool


class Auditor:
    """Watches one version.

    Args:
        point: The calibration record of its variant.
        samples: How many rows the record was made from.
    """

    def __init__(self, point: VariantCalibration, samples: int) -> None:
        kept = max(round(samples * (1.0 - point.escalation_rate)), 1)
        rate = 1.0 - (point.agreement if point.edge_agreement is None else point.edge_agreement)
        # The record's own uncertainty must not raise alarms: what it found, and two standard errors.
        self.expected = min(max(rate + 2.0 * math.sqrt(rate * (1.0 - rate) / kept), 3.0 / kept), _LARGEST - 0.01)
        self._record_rate = rate
        self._record_risk = _risk(point)
        alternatives = [self.expected * ratio for ratio in _RATIOS] + [self.expected + step for step in _STEPS]
        self._alternatives = tuple(min(rate, _LARGEST) for rate in alternatives)
        self._sums = [0.0] * len(self._alternatives)
        self._newest: deque[bool] = deque(maxlen=_WINDOW)
        self.audited = 0
        self.disagreed = 0
        self.failed = 0
        self.alarm = False

    def note(self, *, agreed: bool) -> bool:
        """Note one row; return whether the alarm was raised by it."""
        self.audited += 1
        self.disagreed += not agreed
        self._newest.append(not agreed)
        for place, rate in enumerate(self._alternatives):
            ratio = (1.0 - rate) / (1.0 - self.expected) if agreed else rate / self.expected
            self._sums[place] = (self._sums[place] + 1.0) * ratio
        raised = not self.alarm and sum(self._sums) / len(self._sums) >= _AUDITS_PER_FALSE_ALARM
        self.alarm = self.alarm or raised
        return raised

    def report(self) -> AuditReport:
        """Return what is known."""
        count, hits = len(self._newest), sum(self._newest)
        low, high = wilson(hits, count, _Z)
        rate = hits / count if count else self._record_rate
        risk = None
        if self._record_risk is not None:
            risk = min(max(self._record_risk + rate - self._record_rate, 0.0), 1.0)
        return AuditReport(self.audited, self.disagreed, self.failed, low, high, self.expected, risk, self.alarm)


class Audit:
    """Draws requests, compares the answers behind the callers' backs, and raises the alarm.

    Args:
        uplink: Where audited requests go.
        share: Of confident requests.
        deadline_s: Of an audit.
        at_most: Audits in progress; one more is not drawn.
        alarm: Told the version and what is wrong, once for each version.
        draw: Numbers in [0, 1).
    """

    def __init__(
        self,
        uplink: _Escalator,
        *,
        share: float,
        deadline_s: float = 10.0,
        at_most: int = 4,
        alarm: Callable[[LiveModel, str], None] = lambda *_: None,
        draw: Callable[[], float] = _by_lot,
    ) -> None:
        self._uplink = uplink
        self._share = share
        self._deadline_s = deadline_s
        self._at_most = at_most
        self._alarm = alarm
        self._draw = draw
        self._running: set[asyncio.Task[None]] = set()
        self._auditors: dict[str, dict[str, Auditor]] = {}  # by model, and by its calibration record's id

    def offer(self, question: Question, light: Mapping[str, Array], live: LiveModel, score: float) -> None:
        """Audit this answer, if the lot falls on it; returns at once."""
        if self._draw() >= self._share or len(self._running) >= self._at_most:
            return
        if score < live.operating_point.threshold:  # another policy keeps more than the record speaks of
            return
        if live.calibration.output not in question.wanted:  # the cloud would not send what is compared
            return
        task = asyncio.get_running_loop().create_task(self._compare(question, light, live))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def report(self, live: LiveModel) -> AuditReport:
        """Return what the audits of the version that serves say."""
        return self._auditor(live).report()

    async def settle(self) -> None:
        """Wait for the audits in progress."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def stop(self) -> None:
        """End the audits in progress."""
        for task in self._running:
            task.cancel()
        await self.settle()

    async def _compare(self, question: Question, light: Mapping[str, Array], live: LiveModel) -> None:
        expected, heavy = wanted_outputs(question, light, live), dict[str, Array]()

        def check(response: Any) -> None:
            heavy.update(check_cloud_answer(response, expected))

        auditor = self._auditor(live)
        try:
            request = question.to_cloud(live)
        except UnavailableError:  # its inputs are to be sealed and cannot be
            auditor.failed += 1
            return
        outcome = await self._uplink.escalate(request, remaining_s=self._deadline_s, check=check)
        if isinstance(outcome, Failure):
            auditor.failed += 1
            return
        output = live.calibration.output
        agreed, rows = count_agreement(light[output], heavy[output], live.calibration.decoding)
        # The record's rate is one of rows: a batch is as many audits as it has rows.
        raised = [auditor.note(agreed=row < agreed) for row in range(rows)]
        if True in raised:
            report = auditor.report()
            what = (
                f"{report.low:.1%} to {report.high:.1%} of the confident answers disagree with the cloud's, "
                f"the calibration record lets expect at most {report.expected:.1%} ({report.audited} compared)"
            )
            log.warning(
                "confident answers have gone wrong",
                model=live.manifest.name,
                version=live.manifest.version,
                audit=what,
                hint="the data have changed: lower the operating point, or train and calibrate anew",
            )
            self._alarm(live, what)

    def _auditor(self, live: LiveModel) -> Auditor:
        kept = self._auditors.setdefault(live.manifest.name, {})
        found = kept.get(live.calibration_id)
        if found is None:
            found = kept[live.calibration_id] = Auditor(live.operating_point, live.calibration.data.samples)
            for oldest in list(kept)[:-_VERSIONS]:
                del kept[oldest]
        return found


def _risk(point: VariantCalibration) -> float | None:
    known = [at for at in point.curve if at.risk is not None]
    return min(known, key=lambda at: abs(at.threshold - point.threshold)).risk if known else None
