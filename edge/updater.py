"""From "run version N" to version N serving, or to a refusal with its reason; the old version serves all the while.

The steps and their order are those of `edge.state`; each is on the disk before it begins. Killed at any instant, the
agent goes on from there at its next start: a fetch at the byte where it stopped, a trial with what is left of its time
and what was seen until then, a roll back until it is done. Or it goes back: a version whose process died several times
in a row is given up, and nobody has to come and press a button.

A refusal is final for this version and attempt. An unreachable registry, a full disk or a closed maintenance window is
no refusal: what was fetched stays, and a later attempt goes on from there.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import structlog

from edge.assembly import Fetcher, FileResult, bring_file
from edge.audit import Audit
from edge.audition import Audition, drop_others
from edge.conditions import Conditions, Meter, PostponedError, needed_bytes
from edge.model import LiveModel, ServedModels
from edge.outcome import MAY_PASS, NO_VERDICT, Outcome, remembered
from edge.planner import Manifests, Plan, Planner
from edge.probation import Probation
from edge.shadow import Shadow
from edge.state import Became, Course, Order, Progress, Step
from edge.store import SlotStore, check_slot, write_atomically
from edge.trial import Evidence, Reason
from isthmus.bundle import MANIFEST, Manifest, Variant
from isthmus.errors import (
    ConfigError,
    IsthmusError,
    UnavailableError,
    VerificationError,
)

_SHADOW_S: Final = 600.0  # longest wait for requests to try a version with

log = structlog.get_logger(__name__)


class Updater:
    """Updates one model.

    Args:
        model: Its name.
        store: Its slots.
        models: Where it serves.
        manifests: Signed metadata.
        fetcher: The registry.
        choose: Chooses the variant of a manifest.
        open_slot: Opens and self-tests a slot's variant; blocks.
        report: Hears what becomes of updates.
        conditions: When an update may go on.
        audit: Compares answers with the cloud's, where it does.
        shadow: Where candidates get copies of live requests.
        audition: Measures variants where nothing was measured yet; None where that is not wanted.
        clock: Monotonic seconds.
        pause: Waits for so many seconds.
    """

    def __init__(
        self,
        model: str,
        store: SlotStore,
        models: ServedModels,
        *,
        manifests: Manifests,
        fetcher: Fetcher,
        choose: Callable[[Manifest], Variant],
        open_slot: Callable[[Path, str], LiveModel],
        report: Callable[[Outcome], None],
        conditions: Conditions,
        audit: Audit | None = None,
        shadow: Shadow | None = None,
        audition: Audition | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep,
    ) -> None:
        self.last: Outcome | None = None
        self.outcomes: Counter[tuple[Became, str]] = Counter()  # final ones, with their reasons
        self._model = model
        self._store = store
        self._models = models
        self._fetcher = fetcher
        self._planner = Planner(model, store, manifests, choose)
        self._open_slot = open_slot
        self._report = report
        self._conditions = conditions
        self._shadow = shadow or Shadow()
        self._audition = audition
        self._files: list[FileResult] = []
        self._variant = ""
        self._meter = Meter(fetcher, conditions.settings)
        self._course = Course(model)
        self.probation = Probation(
            model,
            store,
            models,
            course=self._course,
            open_slot=self._open,
            outcome=self._outcome,
            conclude=self._conclude,
            audit=audit,
            clock=clock,
            pause=pause,
        )

    @property
    def step(self) -> Step:
        """Return where the update is."""
        return self._course.step

    @property
    def order(self) -> Order | None:
        """Return what an earlier run of the agent was bringing."""
        progress = self._store.state.progress
        return None if progress is None or progress.step is Step.ROLL_BACK else progress.order

    async def start(self) -> None:
        """Serve the installed version, or the one before it when that one is broken; none is no error.

        Raises:
            ConfigError: This machine cannot open what it has, for example because the runtime is not installed.
            UnavailableError: The disk cannot be read now.
        """
        await self._begin_run()
        while version := self._store.state.current:
            slot, variant = self._store.slot(version), self._store.state.variant
            try:
                await asyncio.to_thread(check_slot, slot, variant)
                live = await asyncio.to_thread(self._open, slot, variant)
            except (ConfigError, UnavailableError):  # no verdict on the version: it must not cost the installed one
                raise
            except IsthmusError as error:
                log.warning("installed version is broken", model=self._model, version=version, error=error.message)
                with _disk("fall back"):
                    await asyncio.to_thread(self._store.fall_back, error.reason)
                continue
            self.probation.serve(live)
            log.info("serving", model=self._model, version=version, variant=variant)
            break
        self._tell_start()

    async def _begin_run(self) -> None:
        try:
            crashes = await asyncio.to_thread(self._store.begin_run)
        except OSError as error:  # a disk that takes no writes must not keep a device from serving
            log.warning("cannot note the start", model=self._model, error=str(error))
            return
        state, most = self._store.state, self._conditions.settings.crashes
        progress = state.progress
        reason = detail = ""
        if progress is not None and progress.step is Step.ROLL_BACK:
            reason, detail = progress.reason, progress.detail
        elif crashes >= most and state.previous:  # power cuts look like crashes: the only version is not given up
            reason, detail = Reason.CRASHES, f"the agent died {crashes} times in a row with it"
        if reason:
            evidence = None if progress is None else Evidence(progress.seen, progress.before)
            outcome = self._outcome(state.previous, Became.ROLLED_BACK, reason, detail, evidence)
            log.warning("rolled back", model=self._model, version=state.current, reason=reason)
            with _disk("roll back"):
                await asyncio.to_thread(self._store.roll_back, outcome.to_last())

    def _tell_start(self) -> None:
        state = self._store.state
        if state.on_trial and state.progress is not None:
            self._variant = state.variant
            self._tell(state.previous, Became.SOAKING, evidence=Evidence(state.progress.seen, state.progress.before))
        elif state.last is not None and state.last.became in (Became.REFUSED, Became.ROLLED_BACK):
            self.last = remembered(self._model, state.current, state.variant, state.last)
            self._report(self.last)
        elif state.current:
            self._report(Outcome(self._model, state.current, state.current, state.variant, order=self._kept_order()))

    def warn(self, version: int, reason: str, detail: str) -> None:
        """Report what is wrong with the version that serves, on trial or for good; of another one nothing is said."""
        state, trial = self._store.state, self.probation.trial
        if version != state.current:
            return
        if trial is None:
            order, became, evidence = self._kept_order(), Became.ACTIVE, None
        else:
            order, became, evidence = trial.order, Became.SOAKING, Evidence(trial.seen, trial.before)
        before = state.current if trial is None else state.previous
        self._report(
            Outcome(self._model, before, version, state.variant, became, reason, detail, order=order, evidence=evidence)
        )

    def _kept_order(self) -> Order:
        """Return the order that brought the version that serves, as far as it is remembered."""
        state = self._store.state
        if state.last is not None and state.last.version == state.current:
            return Order(version=state.current, rollout=state.last.rollout, attempt=state.last.attempt)
        return Order(version=state.current)

    def already(self, order: Order) -> Outcome:
        """Return what there is to say to an order for the version that serves, for good."""
        state = self._store.state
        return Outcome(self._model, state.current, state.current, state.variant, order=order)

    def gave_up(self, order: Order) -> Outcome | None:
        """Return what became of this version here when it failed, and the order is for no further attempt."""
        state = self._store.state
        reason = state.failed.get(order.version, "")
        if not reason or reason in NO_VERDICT or order.attempt > state.attempts.get(order.version, 0):
            return None
        if state.last is not None and state.last.version == order.version:
            return remembered(self._model, state.current, state.variant, state.last)
        return Outcome(self._model, state.current, order.version, "", Became.REFUSED, reason, order=order)

    async def update(self, order: Order) -> Outcome:
        """Bring a version to serve, or refuse it.

        Raises:
            UnavailableError: It cannot be brought now; the caller tries again later. A `PostponedError` says when.
        """
        from_version = self._models.version(self._model)
        self._files, self._variant = [], ""
        try:
            with _disk(f"update to {order.version}"):
                return await self._updated(order, from_version)
        except PostponedError as error:
            self._tell(from_version, Became.UPDATING, error.reason, error.message, order=order)
            raise
        except UnavailableError as error:
            if error.reason == "no-space":  # there was room when it began: somebody else needs it
                await asyncio.to_thread(self._store.drop_partial, order.version)
            raise
        finally:
            self._course.end()

    async def _updated(self, order: Order, from_version: int) -> Outcome:
        try:
            became = await self._install(order)
        except UnavailableError:
            raise
        except IsthmusError as error:
            reason, detail = error.reason, error.message
            log.warning("update refused", model=self._model, version=order.version, step=self.step.value, error=detail)
            outcome = self._outcome(from_version, Became.REFUSED, reason, detail, order=order)
            if reason in MAY_PASS:  # what was fetched may be wanted yet
                await asyncio.to_thread(self._store.leave)
            else:
                await asyncio.to_thread(self._store.refuse, order.version, reason, outcome.to_last())
        else:
            outcome = self._outcome(from_version, became, order=order)
        self._conclude(outcome)
        return outcome

    async def _install(self, order: Order) -> Became:
        progress = self._taken_up(order)
        self._meter = Meter(self._fetcher, self._conditions.settings, progress.bytes_fetched)
        progress = await self._enter(Step.PLAN, progress)
        if progress.crashes >= self._conditions.settings.crashes:
            raise VerificationError(
                f"self-test: the agent died {progress.crashes} times in a row in it", reason="self-test-crashed"
            )
        plan = await asyncio.to_thread(self._planner.plan, order.version)
        self._variant = plan.variant.id
        if await asyncio.to_thread(self._planner.is_whole, plan):
            progress = await self._enter(Step.VERIFY, progress)
            slot = self._store.slot(plan.version)
            await asyncio.to_thread(check_slot, slot, plan.variant.id)
        else:
            progress, plan, slot = await self._bring(plan, progress)
        self._conditions.check_window()
        progress = await self._enter(Step.SELF_TEST, progress.model_copy(update={"crashes": progress.crashes + 1}))
        live = await asyncio.to_thread(self._open, slot, plan.variant.id)
        try:
            return await self._put_into_service(live, order, progress.model_copy(update={"crashes": 0}))
        except BaseException:
            if self._models.live(self._model) is not live:
                live.retire()
            raise

    def _taken_up(self, order: Order) -> Progress:
        found = self._store.state.progress
        if found is not None and (found.order.version, found.order.attempt) == (order.version, order.attempt):
            return found.model_copy(update={"order": order})
        return Progress(order=order, step=Step.PLAN)

    async def _bring(self, plan: Plan, progress: Progress) -> tuple[Progress, Plan, Path]:
        self._conditions.check_turn(plan.version)
        here = self._store.partial_bytes(plan.version)
        self._conditions.check_fetch(needed_bytes(plan.files, here=here), self._store.free_bytes())
        progress = await self._enter(Step.FETCH, progress)
        self._tell(self._models.version(self._model), Became.UPDATING, order=progress.order)
        partial = await asyncio.to_thread(self._store.partial, plan.version)
        try:
            await self._fetch(plan, partial)
            plan = await self._auditioned(plan, partial)
        except BaseException:
            if self._meter.moved != progress.bytes_fetched:
                moved = progress.model_copy(update={"bytes_fetched": self._meter.moved})
                await asyncio.to_thread(self._store.enter, moved)
            raise
        progress = await self._enter(Step.VERIFY, progress.model_copy(update={"bytes_fetched": self._meter.moved}))
        await asyncio.to_thread(drop_others, partial, plan.variant.id)
        await asyncio.to_thread(check_slot, partial, plan.variant.id)
        progress = await self._enter(Step.APPLY, progress)
        return progress, plan, await asyncio.to_thread(self._store.seal, plan.version)

    async def _put_into_service(self, live: LiveModel, order: Order, progress: Progress) -> Became:
        terms = order.terms or self._conditions.settings.trial
        serving, from_version = self._models.live(self._model), self._models.version(self._model)
        if terms.shadow_requests and serving is not None:
            progress = await self._enter(Step.SHADOW, progress)
            self._tell(from_version, Became.UPDATING, order=order)
            await self._shadow.test(live, terms, limit_s=max(terms.soak_s, _SHADOW_S))
        progress = await self._enter(Step.ACTIVATE, progress)
        trial = None
        if terms.soak_s > 0 and serving is not None and from_version != order.version:
            before = self.probation.evidence_before(serving)
            trial = progress.model_copy(update={"step": Step.SOAK, "terms": terms, "before": before})
        became = Became.ACTIVE if trial is None else Became.SOAKING
        last = self._outcome(from_version, became, order=order).to_last()
        live.begin_service()
        await asyncio.to_thread(self._store.activate, order.version, live.variant.id, trial, last)
        self.probation.begin(live, on_trial=trial is not None, before=from_version)
        self._course.enter(Step.COMMIT if trial is None else Step.SOAK, order.version)
        return became

    def _open(self, slot: Path, variant: str) -> LiveModel:
        try:
            return self._open_slot(slot, variant)
        except IsthmusError:
            raise
        except OSError as error:
            raise UnavailableError(f"slot {slot.name}: {error}", reason="disk") from error
        except Exception as error:  # whatever a bundle provokes in a runtime is a verdict on the bundle
            raise VerificationError(f"self-test: {error!r}"[:500], reason="self-test-crashed") from error

    async def _enter(self, step: Step, progress: Progress) -> Progress:
        """Begin a step, once the disk has it; return the progress with it."""
        self._course.enter(step, progress.order.version)
        entered = progress.model_copy(update={"step": step})
        await asyncio.to_thread(self._store.enter, entered)
        return entered

    async def _fetch(self, plan: Plan, partial: Path) -> None:
        for file in plan.files:
            self._files.append(await bring_file(self._meter, file, base=self._base(), partial=partial))
        await asyncio.to_thread(write_atomically, partial / MANIFEST, plan.manifest_bytes)

    async def _auditioned(self, plan: Plan, partial: Path) -> Plan:
        """Return the plan with the variant that is fastest here, where that is to be found out now."""
        if self._audition is None or self._conditions.settings.metered:
            return plan
        others = await asyncio.to_thread(self._audition.others, plan.manifest, plan.variant)
        have = {file.path for file in plan.files}
        files = [file for file in self._planner.files(plan.manifest, *others) if file.path not in have]
        if not files or needed_bytes(files, here=0) > self._store.free_bytes():
            return plan
        lost = set[str]()
        for file in files:
            try:
                self._files.append(await bring_file(self._meter, file, base=self._base(), partial=partial))
            except UnavailableError:
                raise
            except IsthmusError as error:
                lost.add(file.path)
                log.warning("a variant is not measured", model=self._model, path=file.path, error=error.message)
        if all(lost & {file.path for file in self._planner.files(plan.manifest, other)} for other in others):
            return plan  # there is nothing to compare it with, and a later version may bring what there is
        self._conditions.check_window()  # what it computes is a test
        best = await asyncio.to_thread(self._audition.hold, partial, plan.version, plan.variant)
        self._variant = best
        return replace(plan, variant=plan.manifest.variant(best))

    def _base(self) -> Path:
        return self._store.slot(self._store.state.current)

    def _conclude(self, outcome: Outcome) -> None:
        self.last = outcome
        self.outcomes[outcome.became, outcome.reason] += 1
        self._report(outcome)

    def _tell(
        self,
        from_version: int,
        became: Became,
        reason: str = "",
        detail: str = "",
        *,
        order: Order | None = None,
        evidence: Evidence | None = None,
    ) -> None:
        self._report(self._outcome(from_version, became, reason, detail, evidence, order=order))

    def _outcome(
        self,
        from_version: int,
        became: Became,
        reason: str = "",
        detail: str = "",
        evidence: Evidence | None = None,
        *,
        order: Order | None = None,
    ) -> Outcome:
        if order is None:
            progress = self._store.state.progress
            order = Order(version=self._store.state.current) if progress is None else progress.order
        return Outcome(
            self._model,
            from_version,
            order.version,
            self._variant,
            became,
            reason,
            detail,
            tuple(self._files),
            self._meter.moved,
            self.step,
            order,
            evidence,
        )


@contextmanager
def _disk(what: str) -> Iterator[None]:
    """Take what the disk refuses as what it is: no verdict on a version, and it may pass."""
    try:
        yield
    except OSError as error:
        reason = "no-space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "disk"
        raise UnavailableError(f"{what}: {error}", reason=reason) from error
