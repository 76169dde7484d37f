"""What follows when a version begins to serve: its trial, and then it is kept or the one before it serves again.

Also without a trial, a new version has to live for a while before the device stops counting the deaths of its process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from edge.audit import Audit
from edge.model import LiveModel, ServedModels
from edge.outcome import Outcome
from edge.side_by_side import Side, is_slower
from edge.soak import TICK_S, Soak, evidence_of
from edge.state import Became, Course, Order, Progress, Step
from edge.store import SlotStore
from edge.tally import Seen
from edge.trial import Evidence, Reason, Verdict
from isthmus.errors import IsthmusError, UnavailableError

PROVEN_S: Final = 60.0  # a version that lived for so long does not kill its process at once
_ROOM: Final = 8  # times the files of a version that must be free for it to stay open beside another

log = structlog.get_logger(__name__)


class Tell(Protocol):
    """Makes an outcome of the model's update."""

    def __call__(
        self,
        from_version: int,
        became: Became,
        reason: str = "",
        detail: str = "",
        evidence: Evidence | None = None,
        *,
        order: Order | None = None,
    ) -> Outcome:
        """Return it."""
        ...


class Probation:
    """The trials of one model's versions.

    Args:
        model: Its name.
        store: Its slots.
        models: Where it serves.
        course: The step that it is at.
        open_slot: Opens and self-tests a slot's variant; blocks.
        outcome: Makes an outcome.
        conclude: Hears the final ones.
        audit: Compares answers with the cloud's, where it does.
        clock: Monotonic seconds.
        pause: Waits for so many seconds.
    """

    def __init__(
        self,
        model: str,
        store: SlotStore,
        models: ServedModels,
        *,
        course: Course,
        open_slot: Callable[[Path, str], LiveModel],
        outcome: Tell,
        conclude: Callable[[Outcome], None],
        audit: Audit | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep,
    ) -> None:
        self._model = model
        self._store = store
        self._models = models
        self._course = course
        self._open_slot = open_slot
        self._outcome = outcome
        self._conclude = conclude
        self._audit = audit
        self._clock = clock
        self._pause = pause
        self._opened = clock()  # when the version that serves was
        self._before: LiveModel | None = None  # the version before it, open, while it is on trial
        self._new = asyncio.Event()  # a version has begun to serve
        self._over = asyncio.Event()  # no version is on trial
        self._soak: Soak | None = None
        self._taken_back = False

    @property
    def trial(self) -> Progress | None:
        """Return the trial of the version that serves, with all that was seen; None when it is on none."""
        if not self._store.state.on_trial:
            return None
        return self._store.state.progress if self._soak is None else self._soak.checkpoint

    def evidence_before(self, serving: LiveModel) -> Seen:
        """Return what was seen of the version that serves, to compare the next one with."""
        return evidence_of(serving, self._audit, self._clock() - self._opened)

    def begin(self, live: LiveModel, *, on_trial: bool, before: int) -> None:
        """Serve a version that the state names already.

        Args:
            live: The version.
            on_trial: Whether the state says that it is.
            before: The version before it.
        """
        self._taken_back = False
        earlier = self.serve(live)
        if earlier is not None and on_trial and _memory_allows(self._store.slot(before)):
            self._before = earlier
        elif earlier is not None:
            earlier.retire()

    def serve(self, live: LiveModel) -> LiveModel | None:
        """Serve a version from now on; return the one before it, open."""
        self._opened = self._clock()
        before = self._models.exchange(self._model, live)
        self._new.set()
        return before

    async def watch(self) -> None:
        """Judge versions on trial, and note of others that they live; until cancelled."""
        self._new.set()  # an earlier call may have failed in the middle of a trial
        while True:
            await self._new.wait()
            self._new.clear()
            live, progress = self._models.live(self._model), self._store.state.progress
            if live is not None and progress is not None and progress.step is Step.SOAK:
                await self._try_out(live, progress)
            elif not self._store.state.proven:
                version = self._store.state.current
                if await self._lives():
                    await self._persist(partial(self._store.prove, version))

    async def _lives(self) -> bool:
        """Wait until the version that serves has lived for a while; return False as soon as another one serves."""
        waits = [asyncio.ensure_future(self._new.wait()), asyncio.ensure_future(self._pause(PROVEN_S))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return not self._new.is_set()

    async def settled(self) -> None:
        """Wait until no version is on trial."""
        while self._store.state.on_trial:
            self._over.clear()
            await self._over.wait()

    def take_back(self, order: Order) -> bool:
        """End the trial when the order is for the version before the one on trial; return whether it is."""
        if not self._store.state.on_trial or order.version != self._store.state.previous:
            return False
        self._taken_back = True
        return True

    async def stop(self) -> None:
        """Note an orderly end, with what a trial has seen until now."""
        before, self._before = self._before, None
        if before is not None:
            before.retire()
        try:
            if self._soak is not None and self._course.step is not Step.ROLL_BACK:
                await asyncio.to_thread(self._store.enter, self._soak.checkpoint)
            await asyncio.to_thread(self._store.end_run)
        except OSError as error:
            log.warning("cannot note the end", model=self._model, error=str(error))

    async def _try_out(self, live: LiveModel, progress: Progress) -> None:
        self._soak = soak = Soak(live, progress, self._audit, clock=self._clock)
        self._course.enter(Step.SOAK, progress.order.version)

        async def keep(checkpoint: Progress) -> None:
            await self._persist(lambda: self._store.enter(checkpoint))

        async def slower() -> bool:
            return await self._is_slower(live, progress.terms.max_latency_ratio)

        verdict, evidence = await soak.run(keep, self._pause, lambda: self._taken_back, slower)
        self._course.enter(Step.COMMIT if verdict.keep else Step.ROLL_BACK, progress.order.version)
        if verdict.keep:
            await self._commit(progress.order, evidence)
        else:
            await self._roll_back(progress.order, verdict, evidence)
        self._soak = None
        self._course.end()
        self._over.set()

    async def _is_slower(self, live: LiveModel, most: float) -> bool:
        """Compare a version with the one before it, side by side; where that cannot be, what was seen stands."""
        state = self._store.state
        slot, slot_before = self._store.slot(state.current), self._store.slot(state.previous)
        before = self._before
        try:
            if before is None:
                variant = state.previous_variant or state.variant
                before = await asyncio.to_thread(self._open_slot, slot_before, variant)
            return await is_slower(Side(live, slot), Side(before, slot_before), most)
        except Exception as error:  # whatever a version provokes in a runtime: a trial must come to its end
            log.warning("cannot compare with the version before", model=self._model, error=str(error)[:500])
            return True
        finally:
            if before is not None and before is not self._before:
                before.retire()

    async def _commit(self, order: Order, evidence: Evidence, reason: str = "", detail: str = "") -> None:
        outcome = self._outcome(self._store.state.previous, Became.ACTIVE, reason, detail, evidence, order=order)
        await self._persist(lambda: self._store.commit(outcome.to_last()))
        await self._persist(lambda: self._store.prove(order.version))
        before, self._before = self._before, None
        if before is not None:
            before.retire()
        self._conclude(outcome)

    async def _roll_back(self, order: Order, verdict: Verdict, evidence: Evidence) -> None:
        state = self._store.state
        reason, detail = verdict.broken or Reason.TAKEN_BACK, verdict.detail
        log.warning("rolling back", model=self._model, version=order.version, reason=reason, detail=detail)
        going = {"step": Step.ROLL_BACK, "seen": evidence.now, "reason": reason, "detail": detail}
        if state.progress is not None:
            failing = state.progress.model_copy(update=going)
            try:  # the swap below must not wait for a disk that takes no writes
                await asyncio.to_thread(self._store.enter, failing)
            except OSError as error:
                log.warning("cannot note the roll back", model=self._model, error=str(error))
        before, self._before = self._before, None
        while before is None:
            try:
                slot, variant = self._store.slot(state.previous), state.previous_variant or state.variant
                before = await asyncio.to_thread(self._open_slot, slot, variant)
            except UnavailableError as error:
                log.warning("cannot open the version before", model=self._model, error=error.message)
                await self._pause(TICK_S)
            except IsthmusError as error:  # what serves is better than nothing
                await self._commit(order, evidence, "no-way-back", f"{detail}; the version before: {error.message}")
                return
        failed = self.serve(before)
        outcome = self._outcome(state.previous, Became.ROLLED_BACK, reason, detail, evidence, order=order)
        await self._persist(lambda: self._store.roll_back(outcome.to_last()))
        if failed is not None:
            failed.retire()
        self._conclude(outcome)

    async def _persist(self, write: Callable[[], None]) -> None:
        """Write to the disk, again and again until it takes it: memory has decided already."""
        while True:
            try:
                await asyncio.to_thread(write)
            except OSError as error:
                log.warning("the disk takes no writes", model=self._model, error=str(error))
                await self._pause(TICK_S)
            else:
                return


def _memory_allows(slot: Path) -> bool:
    """Return whether a second model may stay open: the machine has several times its files to spare."""
    files = sum(path.stat().st_size for path in slot.rglob("*") if path.is_file())
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return False
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
    return free > _ROOM * files
