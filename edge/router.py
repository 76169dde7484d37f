"""One inference request, from its bytes to its answer.

The steps, in order:

1. find the model and check the request against its manifest; anything wrong is the caller's error
2. compute the light answer: from here on there is an answer to return, whatever happens
3. score it and decide; a confident answer is returned
4. escalate the request's own bytes within what is left of the deadline
5. return the cloud's answer when it is one to this request, else the light answer, marked as a fallback
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import structlog

from edge.model import LiveModel, ServedModels
from edge.policy import ROUTE_PARAMETER, Route, check_wanted, decide, score_request
from edge.uplink import Answer, Failure
from isthmus.errors import InputError
from isthmus.oip import override_fields, read_parameters, service_pb2, set_parameter
from isthmus.tensors import Array, decode_inputs, decode_outputs, encode_outputs

_PROCESS_ID: Final = secrets.token_hex(4)  # drawn once: a system call for every request is dear
_numbers: Final = itertools.count()

log = structlog.get_logger(__name__)

Capture = Callable[[str, Mapping[str, Array], Mapping[str, Array]], None]


class Escalator(Protocol):
    """Where hard requests go."""

    async def escalate(self, request: bytes, *, remaining_s: float, check: Callable[[Any], None]) -> Answer | Failure:
        """Return the cloud's checked answer or why there is none, within `remaining_s`; never raise."""
        ...


@dataclass(frozen=True, slots=True)
class _Question:
    raw: bytes
    inputs: dict[str, Array]
    wanted: frozenset[str]  # names of the outputs to return
    route: str | None
    deadline: float  # on the monotonic clock
    id: str  # the caller's, or made here: the same in the agent's, the gateway's and Triton's logs, and in the answer


class Router:
    """Answers requests for the served models.

    Args:
        models: What is served.
        uplink: Where hard requests go.
        default_deadline_s: Deadline of requests that come without one.
        capture: Takes model, inputs and outputs of every cloud answer.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        models: ServedModels,
        uplink: Escalator,
        *,
        default_deadline_s: float = 1.0,
        capture: Capture | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = models
        self._uplink = uplink
        self._default_deadline_s = default_deadline_s
        self._capture = capture
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
            UnavailableError: The model is not installed yet, or too many requests are waiting.
        """
        started = self._clock()
        deadline = started + (self._default_deadline_s if remaining_s is None else remaining_s)
        live = self._models.find(request.model_name, request.model_version)
        counters = self._models.counters[live.manifest.name]
        answered = False
        try:
            with live.in_use():
                question = _read(raw, request, live, deadline)
                response, route = await self._route(question, live)
            answered = True
            self._log.debug("answered", request_id=question.id[:128], model=live.manifest.name, route=route)
        finally:
            elapsed_ns = int((self._clock() - started) * 1e9)
            if not answered:
                counters.errors += 1
                counters.error_ns += elapsed_ns
        counters.answered(route, _rows(question.inputs), elapsed_ns, time.time_ns() // 1_000_000)
        return response

    async def _route(self, question: _Question, live: LiveModel) -> tuple[Any, Route]:
        light = await self._light(question, live)
        point = live.operating_point
        score = score_request(light[live.calibration.output], point.temperature)
        decision = decide(score, point.threshold, question.route)
        if not decision.escalate:
            response = _light_response(question, light)
            return _explained(response, question, live, "edge", decision.reason, score), "edge"
        outcome = await self._escalate(question, light, live)
        if isinstance(outcome, Failure):
            response = _light_response(question, light)
            return _explained(response, question, live, "fallback", outcome.reason, score), "fallback"
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
        return {spec.name: outputs[spec.name] for spec in live.manifest.outputs}

    async def _escalate(self, question: _Question, light: Mapping[str, Array], live: LiveModel) -> Answer | Failure:
        expected = {name: array for name, array in light.items() if name in question.wanted}
        checked: dict[str, Array] = {}

        def check(response: Any) -> None:
            checked.update(check_cloud_answer(response, expected))

        manifest = live.manifest
        version = str(manifest.version)
        request = override_fields(question.raw, model_name=manifest.name, model_version=version, request_id=question.id)
        outcome = await self._uplink.escalate(request, remaining_s=question.deadline - self._clock(), check=check)
        if self._capture is not None and isinstance(outcome, Answer) and len(checked) == len(light):
            self._capture(manifest.name, question.inputs, checked)
        return outcome


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


def _read(raw: bytes, request: Any, live: LiveModel, deadline: float) -> _Question:
    manifest = live.manifest
    route = read_parameters(request.parameters).get(ROUTE_PARAMETER)
    return _Question(
        raw=raw,
        inputs=decode_inputs(request, manifest.inputs, max_batch=manifest.max_batch, max_length=manifest.max_length),
        wanted=_wanted(request.outputs, live) if request.outputs else live.outputs,
        route=None if route is None else check_wanted(route),
        deadline=deadline,
        id=request.id or f"{_PROCESS_ID}{next(_numbers):08x}",
    )


def _wanted(outputs: Any, live: LiveModel) -> frozenset[str]:
    for output in outputs:
        if output.name not in live.outputs:
            names = ", ".join(spec.name for spec in live.manifest.outputs)
            raise InputError(f"unknown output {output.name[:80]!r}; the model's outputs are {names}")
        if output.parameters:
            raise InputError(
                f"output {output.name!r}: expected no parameters, got {', '.join(sorted(output.parameters))[:80]}"
            )
    return frozenset(output.name for output in outputs)


def _light_response(question: _Question, light: Mapping[str, Array]) -> Any:
    response = service_pb2.ModelInferResponse()
    if len(question.wanted) < len(light):
        light = {name: array for name, array in light.items() if name in question.wanted}
    encode_outputs(response, light)
    return response


def _explained(response: Any, question: _Question, live: LiveModel, route: Route, reason: str, score: float) -> Any:
    cloud_version = read_parameters(response.parameters).get("isthmus.cloud_version") if route == "cloud" else None
    response.ClearField("parameters")
    response.MergeFrom(live.signature)
    response.id = question.id
    explanation: dict[str, str | float | int | bool | None] = {
        ROUTE_PARAMETER: route,
        "isthmus.reason": reason,
        "isthmus.score": score,
        "isthmus.cloud_version": cloud_version,
    }
    for name, value in explanation.items():
        if value is not None:
            set_parameter(response, name, value)
    return response


def _rows(inputs: Mapping[str, Array]) -> int:
    return len(next(iter(inputs.values())))
