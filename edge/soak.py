"""A version that serves on trial: evidence is gathered, kept on the disk now and then, and judged."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from edge.audit import Audit
from edge.model import LiveModel
from edge.state import Progress
from edge.tally import Seen
from edge.trial import Evidence, Reason, Verdict, judge

TICK_S: Final = 1.0  # between two looks at the evidence
CHECKPOINT_S: Final = 15.0  # between two writes of it: what a crash may lose
_BELIEVED_S: Final = 15.0  # how long a version that was found to be no slower is not compared again; doubles

log = structlog.get_logger(__name__)


def evidence_of(live: LiveModel, audit: Audit | None, seconds: float) -> Seen:
    """Return what was seen of a version since it was opened."""
    if audit is None:
        return live.tally.seen(seconds=seconds)
    found = audit.report(live)
    return live.tally.seen(audited=found.audited, disagreed=found.disagreed, seconds=seconds)


class Soak:
    """The trial of one version, in this run of the agent.

    Args:
        live: Serves on trial.
        progress: With what earlier runs have seen.
        audit: Compares answers, where it does.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        live: LiveModel,
        progress: Progress,
        audit: Audit | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._live = live
        self._progress = progress
        self._audit = audit
        self._clock = clock
        self._began = clock()
        self._believed_s, self._believed_until = _BELIEVED_S, -math.inf
        earlier = evidence_of(live, audit, 0.0)  # an earlier trial of the version, in this run of the agent
        self._audited, self._disagreed = earlier.audited, earlier.disagreed

    @property
    def evidence(self) -> Evidence:
        """Return all that was seen, earlier runs included."""
        seen = evidence_of(self._live, self._audit, self._clock() - self._began)
        of_this_trial = {
            "audited": max(seen.audited - self._audited, 0),
            "disagreed": max(seen.disagreed - self._disagreed, 0),
        }
        return Evidence(self._progress.seen.plus(seen.model_copy(update=of_this_trial)), self._progress.before)

    @property
    def checkpoint(self) -> Progress:
        """Return what a later run has to know."""
        return self._progress.model_copy(update={"seen": self.evidence.now})

    async def run(
        self,
        keep: Callable[[Progress], Awaitable[None]],
        pause: Callable[[float], Awaitable[None]],
        taken_back: Callable[[], bool],
        slower: Callable[[], Awaitable[bool]],
    ) -> tuple[Verdict, Evidence]:
        """Return the verdict, once there is one.

        Args:
            keep: Writes a checkpoint.
            pause: Waits for so many seconds.
            taken_back: Returns whether somebody has asked for the version before it.
            slower: Compares its latency with that of the version before it, here and now.
        """
        written = self._clock()
        while True:
            evidence = self.evidence
            if taken_back():
                return Verdict(broken=Reason.TAKEN_BACK, detail="the version before it was asked for"), evidence
            verdict = judge(self._progress.terms, evidence)
            if verdict.broken is Reason.LATENCY and not await self._is_slower(slower, verdict.detail):
                verdict = judge(self._progress.terms.model_copy(update={"max_latency_ratio": 0.0}), evidence)
            if verdict.keep or verdict.broken is not None:
                return verdict, evidence
            if self._clock() - written >= CHECKPOINT_S:
                written = self._clock()
                await keep(self.checkpoint)
            await pause(TICK_S)

    async def _is_slower(self, slower: Callable[[], Awaitable[bool]], detail: str) -> bool:
        """Return whether the version is slower than the one before it on the machine as it is now."""
        if self._clock() < self._believed_until:
            return False
        if await slower():
            return True
        log.info("no slower than the version before: the machine is busy", detail=detail)
        self._believed_until = self._clock() + self._believed_s
        self._believed_s *= 2
        return False
