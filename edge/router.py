"""One inference request, from its bytes to its answer.

The steps, in order:

1. find the model and check the request against its manifest; anything wrong is the caller's error
2. compute the light answer: from here on there is an answer to return, whatever happens
3. score it and decide; a confident answer is returned, and a few of these are audited behind it (edge.audit)
4. escalate the request's own bytes within what is left of the deadline
5. return the cloud's answer when it is one to this request, fused with the light one where the calibration record says
   so, else the light answer, marked as a fallback; a caller who asked for the cloud gets the cloud's answer or none;
   what both models said is learnt from (edge.lessons), also when the cloud's answer came too late to be returned
6. a fallback whose request asked for it is kept first, and answered by the cloud later (edge.deferred)

A request that is the same to the byte as an earlier one may be answered from the cache before step 2. With hedging on,
a request that will probably escalate (edge.hedge) is sent to the cloud before step 2, and called back when it need not.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from edge.answers import (
    Given,
    check_cloud_answer,
    explained,
    fuse_with_light,
    kept_answer,
    light_response,
    no_cloud_answer,
    promised,
    wanted_outputs,
)
from edge.audit import Audit
from edge.deferred.wish import STORED_ALREADY, Keeper, NoDeferral, Wish
from edge.hedge import Hedge
from edge.lessons import Lessons
from edge.model import LiveModel, ServedModels
from edge.policy import Decision, decide
from edge.question import Limits, Question, read_question
from edge.response_cache import ResponseCache, cache_key
from edge.sealing import InputSealer
from edge.shadow import Shadow
from edge.uplink import Answer, Check, Failure, Need
from isthmus.errors import InputError, OverloadedError, UnavailableError
from isthmus.policies import Case, Link
from isthmus.tensors import Array

log = structlog.get_logger(__name__)


class Escalator(Protocol):
    """Where hard requests go."""

    @property
    def link(self) -> Link:
        """Return what the way to the cloud costs now."""
        ...

    async def escalate(
        self, request: bytes, *, remaining_s: float, check: Check, late: Callable[[], None] | None = None
    ) -> Answer | Failure:
        """Return the cloud's checked answer or why there is none, within `remaining_s`; never raise.

        `late` may be called afterwards, when an answer passes the check that came too late.
        """
        ...

    async def hedge(self, request: bytes, *, remaining_s: float, needed: asyncio.Future[Need]) -> Answer | Failure:
        """Do the same before it is known whether the answer is needed: `needed` then gets the rest."""
        ...


@dataclass(frozen=True, slots=True)
class _Early:
    """An escalation that began before its request was found to need one."""

    call: asyncio.Future[Answer | Failure]
    needed: asyncio.Future[Need]


class Router:
    """Answers requests for the served models.

    Args:
        models: What is served.
        uplink: Where hard requests go.
        limits: What holds where a request says nothing.
        model_calls: Requests of one model that may be in progress.
        lessons: Learns from what both models answered; None counts their agreement, and no more.
        cache: Answers of before; None for no cache.
        hedge: Predicts escalations; None when none begins early.
        deferral: Keeps requests that asked for it and could not be escalated.
        audit: Sends up a share of the confident answers, too; None for none.
        shadow: Gets copies of what the light model computes; None for none.
        sealer: Seals inputs that only the gateway may read; None for none.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        models: ServedModels,
        uplink: Escalator,
        *,
        limits: Limits | None = None,
        model_calls: int = 128,
        lessons: Lessons | None = None,
        cache: ResponseCache | None = None,
        hedge: Hedge | None = None,
        deferral: Keeper | None = None,
        audit: Audit | None = None,
        shadow: Shadow | None = None,
        sealer: InputSealer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = models
        self._uplink = uplink
        self._limits = limits or Limits()
        self._model_calls = model_calls
        self._lessons = lessons or Lessons(models)
        self._cache = cache
        self._hedge = hedge
        self._deferral = deferral or NoDeferral()
        self._audit = audit
        self._shadow = shadow
        self._sealer = sealer
        self._clock = clock
        self._log = log.bind()  # the lazy logger sets itself up for every line, dropped ones included

    async def answer(self, raw: bytes, request: Any, remaining_s: float | None) -> Any:
        """Return the ModelInferResponse to a request.

        Args:
            raw: The request as it came over the wire.
            request: The same, parsed.
            remaining_s: What is left of the caller's deadline; None when there is none.

        Raises:
            InputError: The request does not fit the model, or no such model is served.
            UnavailableError: The model is not installed yet, or the caller asked for the cloud and it gave no answer;
                the reason then is why.
            OverloadedError: Too many of its requests are in progress or wait for the light model.
        """
        started = self._clock()
        counters = self._models.counters_of(request.model_name)
        counters.in_progress += 1
        try:
            live = self._models.find(request.model_name, request.model_version)
            if counters.in_progress > self._model_calls:
                raise OverloadedError(f"model {live.manifest.name!r}: {self._model_calls} requests are in progress")
            with live.in_use():
                question = read_question(
                    raw,
                    request,
                    live,
                    self._deferral,
                    self._limits,
                    self._sealer,
                    started=started,
                    remaining_s=remaining_s,
                )
                given = await self._route(question, live)
        except BaseException as error:
            counters.failed(error, int((self._clock() - started) * 1e9))
            raise
        finally:
            counters.in_progress -= 1
        elapsed_ns = int((self._clock() - started) * 1e9)
        counters.answered(given.route, given.reason, question.rows, elapsed_ns, time.time_ns() // 1_000_000)
        self._log.debug("answered", request_id=question.id[:128], model=live.manifest.name, route=given.route)
        return given.response

    async def _route(self, question: Question, live: LiveModel) -> Given:
        if self._cache is None:
            return await self._compute(question, live)
        counters = self._models.counters[live.manifest.name]
        key = cache_key(live, question.wanted, question.route, question.inputs)
        cached = self._cache.get(key)
        if cached is not None:
            counters.routes[cached.route].cached += 1
            return Given(cached.to_response(question.id), cached.route, cached.reason)
        counters.cache_misses += 1
        given = await self._compute(question, live)
        self._cache.offer(key, given.response, given.route, given.reason)
        return given

    async def _compute(self, question: Question, live: LiveModel) -> Given:
        if self._hedge is None:
            return await self._decide(question, live, await self._light(question, live), None)
        with self._early(question, live, self._hedge) as early:
            return await self._decide(question, live, await self._light(question, live), early)

    @contextmanager
    def _early(self, question: Question, live: LiveModel, hedge: Hedge) -> Iterator[_Early | None]:
        wanted = hedge.expects(live.manifest.name, route=question.route, hint=question.hedge)
        request = _to_cloud(question, live) if wanted else None
        if not isinstance(request, bytes):
            yield None
            return
        needed: asyncio.Future[Need] = asyncio.get_running_loop().create_future()
        remaining_s = question.deadline - self._clock()
        call = self._uplink.hedge(request, remaining_s=remaining_s, needed=needed)
        early = _Early(asyncio.ensure_future(call), needed)
        try:
            yield early
        finally:
            early.call.cancel()  # changes nothing when it has ended

    async def _decide(
        self, question: Question, live: LiveModel, light: Mapping[str, Array], early: _Early | None
    ) -> Given:
        score = live.score(light)
        if math.isnan(score):
            live.tally.errors += 1
        if question.wish is not None and self._deferral.knows(question.wish):  # a retry: one better answer, not two
            response = light_response(question, light, live)
            told = explained(response, question, live, "fallback", STORED_ALREADY, score)
            return Given(promised(told, None), "fallback", STORED_ALREADY)
        decision = decide(Case(score, len(question.raw), self._uplink.link), live.policy, question.route)
        if self._hedge is not None and question.route is None:
            self._hedge.note(live.manifest.name, escalates=decision.escalate)
        if decision.reason == "uncertain":
            live.tally.escalated += 1
        if not decision.escalate:
            if self._audit is not None and decision.reason == "confident":
                self._audit.offer(question, light, live, score)
            response = light_response(question, light, live)
            told = explained(response, question, live, "edge", decision.reason, score)
            return Given(told, "edge", decision.reason)
        outcome = await self._escalate(question, light, live, early)
        if isinstance(outcome, Failure):
            return await self._fall_back(question, light, live, decision, outcome, score)
        told = explained(outcome.response, question, live, "cloud", decision.reason, score)
        if question.route is None:  # who asks for the cloud gets the cloud's own answer
            fuse_with_light(told, light, live)
        return Given(told, "cloud", decision.reason)

    async def _fall_back(
        self,
        question: Question,
        light: Mapping[str, Array],
        live: LiveModel,
        decision: Decision,
        failure: Failure,
        score: float,
    ) -> Given:
        forced = question.route == "cloud"
        if forced and question.wish is None:
            raise no_cloud_answer(failure)
        response = light_response(question, light, live)
        told = explained(response, question, live, "fallback", failure.reason, score, failure.detail)
        if question.wish is not None:
            template = explained(kept_answer(response), question, live, "cloud", decision.reason, score)
            kept = await self._defer(question, question.wish, live, told, template, failure.reason)
            if forced and not kept:  # neither the cloud's answer now nor the promise of one
                raise no_cloud_answer(failure)
        return Given(told, "fallback", failure.reason)

    async def _light(self, question: Question, live: LiveModel) -> dict[str, Array]:
        started = self._clock()
        try:
            outputs = await live.infer(question.inputs)
        except InputError as error:  # the runtime's words are for the operator
            live.tally.failed()
            log.warning("light model cannot compute", model=live.manifest.name, error=error.message)
            raise InputError("the light model cannot compute these values", reason=error.reason) from error
        counters = self._models.counters[live.manifest.name]
        elapsed_s = self._clock() - started
        counters.light_inferences += 1
        counters.light_ns += int(elapsed_s * 1e9)
        live.tally.computed(elapsed_s)
        if self._shadow is not None:
            self._shadow.offer(live, question.inputs, outputs, elapsed_s)
        return outputs

    async def _escalate(
        self, question: Question, light: Mapping[str, Array], live: LiveModel, early: _Early | None
    ) -> Answer | Failure:
        expected = wanted_outputs(question, light, live)
        checked: dict[str, Array] = {}

        def check(response: Any) -> None:
            checked.update(check_cloud_answer(response, expected))

        def learn() -> None:
            self._lessons.learn(live, question.inputs, light, checked)

        late = None if question.wish is not None else learn  # a kept request will be answered, and learnt from, once
        if early is None:
            request = _to_cloud(question, live)
            if isinstance(request, Failure):
                return request
            remaining_s = question.deadline - self._clock()
            outcome = await self._uplink.escalate(request, remaining_s=remaining_s, check=check, late=late)
        else:
            early.needed.set_result(Need(check, late))
            outcome = await early.call
        if isinstance(outcome, Answer):
            learn()
        return outcome

    async def _defer(
        self, question: Question, wish: Wish, live: LiveModel, response: Any, template: Any, failure: str
    ) -> bool:
        """Keep a request on the disk; return whether a better answer is promised."""
        request = _to_cloud(question, live)
        if isinstance(request, Failure):
            promised(response, "unsealed")
            return False
        refusal = await self._deferral.keep(
            wish,
            request=request,
            template=template,
            answer_bytes=response.ByteSize(),
            failure=failure,
            remaining_s=question.deadline - self._clock(),
        )
        promised(response, refusal)
        return refusal is None


def _to_cloud(question: Question, live: LiveModel) -> bytes | Failure:
    """Return the request as the cloud must get it, or why it must not leave."""
    try:
        return question.to_cloud(live)
    except UnavailableError as error:
        return Failure("unavailable", error.reason)
