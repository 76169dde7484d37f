"""A candidate answers copies of live requests in the dark, before it may serve: what no golden file shows.

Copies are taken behind the light model's answer and wait in a short queue; where it is full, the request is not copied.
No caller waits for the candidate, and none ever gets an answer of it. Compared are finite numbers, the class that was
chosen where the version that serves was sure, and the times.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import structlog

from edge.agreement import count_agreement
from edge.intervals import chance_of
from edge.model import LiveModel
from edge.tally import Tally
from edge.trial import Evidence, Terms, compare_latency
from isthmus.errors import IsthmusError, OverloadedError, VerificationError
from isthmus.tensors import Array

_WAITING: Final = 4  # copies; one more is not taken
_ALPHA: Final = 1e-4  # chance that a candidate is refused which just keeps a limit

log = structlog.get_logger(__name__)


class ShadowRun:
    """One candidate's run; on the event loop only.

    Args:
        candidate: Is compared.
        terms: How many requests, and the limits.
        clock: Monotonic seconds.
    """

    def __init__(self, candidate: LiveModel, terms: Terms, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._candidate = candidate
        self._terms = terms
        self._clock = clock
        self._running: set[asyncio.Task[None]] = set()
        self._serving = Tally()
        self.compared = 0  # requests
        self.dropped = 0
        self._not_finite = self._failed = 0
        self._sure = self._agreed = 0  # rows
        self.done = asyncio.Event()

    def offer(
        self, live: LiveModel, inputs: Mapping[str, Array], outputs: Mapping[str, Array], elapsed_s: float
    ) -> None:
        """Copy a request that the version that serves has computed; returns at once."""
        if self.done.is_set():
            return
        if len(self._running) >= _WAITING:
            self.dropped += 1
            return
        self._serving.computed(elapsed_s)
        task = asyncio.get_running_loop().create_task(self._compare(live, inputs, outputs))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def settle(self) -> None:
        """Wait for the copies that are being computed."""
        await asyncio.gather(*self._running, return_exceptions=True)

    def check(self) -> None:
        """Check what was found.

        Raises:
            VerificationError: The candidate is not fit to serve; `reason` says why.
        """
        tally = self._candidate.tally
        if self._failed:
            raise _unfit(f"{self._failed} of {self.compared} live requests failed", "shadow-errors")
        if self._not_finite:
            told = f"{self._not_finite} of {self.compared} answers to live requests were not finite"
            raise _unfit(told, "shadow-not-finite")
        differ, least = self._sure - self._agreed, self._terms.min_agreement
        if least and chance_of(differ, self._sure, 1.0 - least) < _ALPHA:
            told = f"{differ} of {self._sure} confident answers differ, expected {least:.1%} to agree"
            raise _unfit(told, "shadow-agreement")
        slower = compare_latency(self._terms.max_latency_ratio, Evidence(tally.seen(), self._serving.seen()))
        if slower:
            raise _unfit(slower, "shadow-latency")

    async def _compare(self, live: LiveModel, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        started = self._clock()
        try:
            with self._candidate.in_use():
                found = await self._candidate.infer(inputs)
        except OverloadedError:
            self.dropped += 1
            return
        except IsthmusError as error:
            log.info("candidate failed a live request", error=error.message)
            self._failed += 1
        else:
            self._candidate.tally.computed(self._clock() - started)
            self._note(live, outputs, found)
        self.compared += 1
        if self.compared >= self._terms.shadow_requests:
            self.done.set()

    def _note(self, live: LiveModel, outputs: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        if any(not np.isfinite(found[name]).all() for name, values in outputs.items() if np.isfinite(values).all()):
            self._not_finite += 1
        output = live.calibration.output
        if live.score(outputs) < live.operating_point.threshold or found[output].shape != outputs[output].shape:
            return
        agreed, rows = count_agreement(found[output], outputs[output], live.calibration.decoding)
        self._agreed += agreed
        self._sure += rows


class Shadow:
    """Where the router offers what it has computed; the run of each model that has a candidate gets it."""

    def __init__(self) -> None:
        self._runs: dict[str, ShadowRun] = {}

    def offer(
        self, live: LiveModel, inputs: Mapping[str, Array], outputs: Mapping[str, Array], elapsed_s: float
    ) -> None:
        """Pass a computed request on, if there is a candidate for its model; returns at once."""
        run = self._runs.get(live.manifest.name)
        if run is not None:
            run.offer(live, inputs, outputs, elapsed_s)

    async def test(self, candidate: LiveModel, terms: Terms, *, limit_s: float) -> ShadowRun:
        """Let a candidate answer copies of live requests.

        Args:
            candidate: Has passed its self-test, and does not serve.
            terms: How many requests it has to answer, and the limits.
            limit_s: Longest wait for them; what came until then counts.

        Raises:
            VerificationError: It is not fit to serve; `reason` says why.
        """
        model = candidate.manifest.name
        run = self._runs[model] = ShadowRun(candidate, terms)
        try:
            async with asyncio.timeout(limit_s):
                await run.done.wait()
        except TimeoutError:
            log.info("few requests to try a version with", model=model, compared=run.compared)
        finally:
            del self._runs[model]
            await run.settle()
        run.check()
        return run


def _unfit(told: str, reason: str) -> VerificationError:
    return VerificationError(f"in the dark: {told}", reason=reason)
