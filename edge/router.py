"""One inference request, from its bytes to its answer.

The steps, in order:

1. find the model and check the request against its manifest; anything wrong is the caller's error
2. compute the light answer: from here on there is an answer to return, whatever happens
3. score it and decide; a confident answer is returned
4. escalate the request's own bytes within what is left of the deadline
5. return the cloud's answer when it is one to this request, else the light answer, marked as a fallback; a caller
   who asked for the cloud gets the cloud's answer or none
6. a fallback whose request asked for it is kept first, and answered by the cloud later (edge.deferred)

With hedging on, a request that will probably escalate (edge.hedge) is sent to the cloud before step 2, and called back
when it need not.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import structlog

from edge.deferred.wish import DEFERRED, NOT_DEFERRED, PROVISIONAL, STORED_ALREADY, Keeper, NoDeferral, NotKept, Wish
from edge.hedge import HEDGE_PARAMETER, Hedge, check_hint
from edge.model import LiveModel, ServedModels
from edge.policy import ROUTE_PARAMETER, Route, check_wanted, decide
from edge.uplink import Answer, Check, Failure
from isthmus.errors import InputError, UnavailableError
from isthmus.oip import override_fields, read_parameters, service_pb2, set_parameter
from isthmus.policies import Case
from isthmus.tensors import Array, decode_inputs, decode_outputs, encode_outputs

log = structlog.get_logger(__name__)

Capture = Callable[[str, Mapping[str, Array], Mapping[str, Array]], None]


class Escalator(Protocol):
    """Where hard requests go."""

    async def escalate(self, request: bytes, *, remaining_s: float, check: Check) -> Answer | Failure:
        """Return the cloud's checked answer or why there is none, within `remaining_s`; never raise."""
        ...

    async def hedge(self, request: bytes, *, remaining_s: float, needed: asyncio.Future[Check]) -> Answer | Failure:
        """Do the same, but begin before it is known whether it is needed; cancelled when it is not."""
        ...


@dataclass(frozen=True, slots=True)
class _Question:
    raw: bytes
    inputs: dict[str, Array]
    wanted: frozenset[str]  # names of the outputs to return
    route: str | None
    hedge: bool | None  # what the caller expects
    deadline: float  # on the monotonic clock
    wish: Wish | None  # to be answered later when the cloud cannot be had
    id: str  # the caller's, or made here: the same in the agent's, the gateway's and Triton's logs, and in the answer


@dataclass(frozen=True, slots=True)
class _Early:
    """An escalation that has begun already."""

    call: asyncio.Future[Answer | Failure]
    needed: asyncio.Future[Check]


class Router:
    """Answers requests for the served models.

    Args:
        models: What is served.
        uplink: Where hard requests go.
        default_deadline_s: Deadline of requests that come without one.
        capture: Takes model, inputs and outputs of every cloud answer.
        hedge: Predicts escalations; None when none begins early.
        deferral: Keeps requests that asked for it and could not be escalated.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        models: ServedModels,
        uplink: Escalator,
        *,
        default_deadline_s: float = 1.0,
        capture: Capture | None = None,
        hedge: Hedge | None = None,
        deferral: Keeper | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = models
        self._uplink = uplink
        self._default_deadline_s = default_deadline_s
        self._capture = capture
        self._hedge = hedge
        self._deferral = deferral or NoDeferral()
        self._clock = clock

    async def answer(self, raw: bytes, request: Any, remaining_s: float | None) -> Any:
        """Return the ModelInferResponse to a request.

        Args:
            raw: The request as it came over the wire.
            request: The same, parsed.
            remaining_s: What is left of the caller's deadline; None when there is none.

        Raises:
            InputError: The request does not fit the model, or no such model is served.
            UnavailableError: The model is not installed yet, too many requests are waiting, or the caller asked for
                the cloud and it gave no answer; the reason then is why.
        """
        started = self._clock()
        deadline = started + (self._default_deadline_s if remaining_s is None else remaining_s)
        live = self._models.find(request.model_name, request.model_version)
        counters = self._models.counters[live.manifest.name]
        answered = False
        try:
            with live.in_use():
                question = _read(raw, request, live, deadline, self._deferral)
                with self._early(question, live) as early:
                    response, route = await self._route(question, live, early)
            answered = True
            log.debug("answered", request_id=question.id[:128], model=live.manifest.name, route=route)
        finally:
            elapsed_ns = int((self._clock() - started) * 1e9)
            if not answered:
                counters.errors += 1
                counters.error_ns += elapsed_ns
        counters.answered(route, _rows(question.inputs), elapsed_ns, time.time_ns() // 1_000_000)
        return response

    @contextmanager
    def _early(self, question: _Question, live: LiveModel) -> Iterator[_Early | None]:
        name = live.manifest.name
        if self._hedge is None or not self._hedge.expects(name, route=question.route, hint=question.hedge):
            yield None
            return
        needed: asyncio.Future[Check] = asyncio.get_running_loop().create_future()
        remaining_s = question.deadline - self._clock()
        call = self._uplink.hedge(_cloud_request(question, live), remaining_s=remaining_s, needed=needed)
        early = _Early(asyncio.ensure_future(call), needed)
        try:
            yield early
        finally:
            early.call.cancel()  # changes nothing when it has ended

    async def _route(self, question: _Question, live: LiveModel, early: _Early | None) -> tuple[Any, Route]:
        light = await self._light(question, live)
        score = live.score(light)
        if question.wish is not None and self._deferral.knows(question.wish):  # a retry: one better answer, not two
            response = _light_response(_wanted(question, light, live))
            explained = _explained(response, question, live, "fallback", STORED_ALREADY, score)
            return _promised(explained, None), "fallback"
        decision = decide(Case(score, len(question.raw)), live.policy, question.route)
        if self._hedge is not None and question.route is None:
            self._hedge.note(live.manifest.name, escalates=decision.escalate)
        if not decision.escalate:
            response = _light_response(_wanted(question, light, live))
            return _explained(response, question, live, "edge", decision.reason, score), "edge"
        outcome = await self._escalate(question, light, live, early)
        if isinstance(outcome, Failure) and question.route == "cloud":
            raise _no_cloud_answer(outcome)
        if isinstance(outcome, Failure):
            response = _light_response(_wanted(question, light, live))
            explained = _explained(response, question, live, "fallback", outcome.reason, score, outcome.detail)
            if question.wish is not None:
                template = _explained(_without_contents(response), question, live, "cloud", decision.reason, score)
                await self._defer(question, question.wish, live, explained, template, outcome.reason)
            return explained, "fallback"
        return _explained(outcome.response, question, live, "cloud", decision.reason, score), "cloud"

    async def _light(self, question: _Question, live: LiveModel) -> dict[str, Array]:
        started = self._clock()
        try:
            outputs = await live.infer(question.inputs)
        except InputError as error:  # the runtime's words are for the operator
            log.warning("light model cannot compute", model=live.manifest.name, error=error.message)
            raise InputError("the light model cannot compute these values", reason=error.reason) from error
        counters = self._models.counters[live.manifest.name]
        counters.light_inferences += 1
        counters.light_ns += int((self._clock() - started) * 1e9)
        return outputs

    async def _escalate(
        self, question: _Question, light: Mapping[str, Array], live: LiveModel, early: _Early | None
    ) -> Answer | Failure:
        expected = _wanted(question, light, live)
        checked: dict[str, Array] = {}

        def check(response: Any) -> None:
            checked.update(check_cloud_answer(response, expected))

        if early is None:
            request, remaining_s = _cloud_request(question, live), question.deadline - self._clock()
            outcome = await self._uplink.escalate(request, remaining_s=remaining_s, check=check)
        else:
            early.needed.set_result(check)
            outcome = await early.call
        if self._capture is not None and isinstance(outcome, Answer) and len(checked) == len(live.manifest.outputs):
            self._capture(live.manifest.name, question.inputs, checked)
        return outcome

    async def _defer(
        self, question: _Question, wish: Wish, live: LiveModel, response: Any, template: Any, failure: str
    ) -> None:
        refusal = await self._deferral.keep(
            wish,
            request=_cloud_request(question, live),
            template=template,
            answer_bytes=response.ByteSize(),
            failure=failure,
            remaining_s=question.deadline - self._clock(),
        )
        _promised(response, refusal)


def check_cloud_answer(response: Any, expected: Mapping[str, Array]) -> dict[str, Array]:
    """Return the outputs of a cloud answer that can stand in for the light one.

    Args:
        response: A ModelInferResponse.
        expected: The light answer's outputs that the caller wants: same names, datatypes and shapes.

    Raises:
        InputError: It answers something else, or not with finite numbers.
    """
    outputs = decode_outputs(response)
    if outputs.keys() != expected.keys() or len(response.outputs) != len(expected):
        raise InputError(f"cloud answer: expected outputs {sorted(expected)}, got {sorted(outputs)[:8]}")
    for name, want in expected.items():
        got = outputs[name]
        if got.dtype != want.dtype or got.shape != want.shape:
            raise InputError(
                f"cloud answer: output {name}: expected {want.dtype} {list(want.shape)}, "
                f"got {got.dtype} {list(got.shape)}"
            )
        if not np.isfinite(got).all():
            raise InputError(f"cloud answer: output {name}: expected finite numbers")
    return outputs


def _read(raw: bytes, request: Any, live: LiveModel, deadline: float, deferral: Keeper) -> _Question:
    manifest = live.manifest
    names = [spec.name for spec in manifest.outputs]
    for output in request.outputs:
        if output.name not in names:
            raise InputError(f"unknown output {output.name[:80]!r}; the model's outputs are {', '.join(names)}")
        if output.parameters:
            raise InputError(
                f"output {output.name!r}: expected no parameters, got {', '.join(sorted(output.parameters))[:80]}"
            )
    parameters = read_parameters(request.parameters)
    route, hint = parameters.get(ROUTE_PARAMETER), parameters.get(HEDGE_PARAMETER)
    return _Question(
        raw=raw,
        inputs=decode_inputs(request, manifest.inputs, max_batch=manifest.max_batch, max_length=manifest.max_length),
        wanted=frozenset(output.name for output in request.outputs) or frozenset(names),
        route=None if route is None else check_wanted(route),
        hedge=None if hint is None else check_hint(hint),
        deadline=deadline,
        wish=deferral.read(parameters, request.id),
        id=request.id or secrets.token_hex(8),
    )


def _wanted(question: _Question, light: Mapping[str, Array], live: LiveModel) -> dict[str, Array]:
    """Return the outputs that the caller gets; features are no outputs of the model that is served."""
    return {spec.name: light[spec.name] for spec in live.manifest.outputs if spec.name in question.wanted}


def _light_response(outputs: Mapping[str, Array]) -> Any:
    response = service_pb2.ModelInferResponse()
    encode_outputs(response, outputs)
    return response


def _without_contents(response: Any) -> Any:
    template = service_pb2.ModelInferResponse()
    for output in response.outputs:
        template.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    return template


def _cloud_request(question: _Question, live: LiveModel) -> bytes:
    manifest = live.manifest
    return override_fields(
        question.raw, model_name=manifest.name, model_version=str(manifest.version), request_id=question.id
    )


def _no_cloud_answer(failure: Failure) -> UnavailableError:
    why = f"{failure.reason} ({failure.detail})" if failure.detail else failure.reason
    return UnavailableError(
        f"{ROUTE_PARAMETER}='cloud' was asked for, and there is no cloud answer: {why}", reason=failure.reason
    )


def _promised(response: Any, refusal: NotKept | None) -> Any:
    set_parameter(response, PROVISIONAL, value=True)
    set_parameter(response, DEFERRED, value=refusal is None)
    if refusal is not None:
        set_parameter(response, NOT_DEFERRED, refusal)
    return response


def _explained(
    response: Any, question: _Question, live: LiveModel, route: Route, reason: str, score: float, detail: str = ""
) -> Any:
    cloud_version = read_parameters(response.parameters).get("isthmus.cloud_version")
    response.ClearField("parameters")
    response.model_name = live.manifest.name
    response.model_version = str(live.manifest.version)
    response.id = question.id
    explanation: dict[str, str | float | int | bool | None] = {
        ROUTE_PARAMETER: route,
        "isthmus.reason": reason,
        "isthmus.detail": detail or None,
        "isthmus.score": score,
        "isthmus.threshold": live.policy.threshold,
        "isthmus.calibration": live.calibration_id,
        "isthmus.edge_version": live.manifest.version,
        "isthmus.cloud_version": cloud_version if route == "cloud" else None,
    }
    for name, value in explanation.items():
        if value is not None:
            set_parameter(response, name, value)
    return response


def _rows(inputs: Mapping[str, Array]) -> int:
    return len(next(iter(inputs.values())))
