"""Answers: what the light model said, what the cloud said, both together, each with its explanation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from edge.deferred.wish import DEFERRED, NOT_DEFERRED, PROVISIONAL, NotKept
from edge.model import LiveModel
from edge.policy import ROUTE_PARAMETER, Route
from edge.question import Question
from edge.uplink import Failure
from isthmus.errors import InputError, UnavailableError
from isthmus.fusion import fuse
from isthmus.oip import read_parameters, service_pb2, set_parameter
from isthmus.tensors import Array, decode_outputs, encode_outputs

FUSED_PARAMETER: Final = "isthmus.fused"
_KEPT_BYTES: Final = 16_384  # an answer's worth keeping for what is compared and fused: the outputs of classifiers
_CLOUD_VERSION: Final = "isthmus.cloud_version"


@dataclass(frozen=True, slots=True)
class Given:
    """An answer, and what it is counted under."""

    response: Any  # ModelInferResponse
    route: Route
    reason: str


def wanted_outputs(question: Question, light: Mapping[str, Array], live: LiveModel) -> dict[str, Array]:
    """Return the outputs that the caller gets; features are no outputs of the model that is served."""
    return {spec.name: light[spec.name] for spec in live.manifest.outputs if spec.name in question.wanted}


def light_response(question: Question, light: Mapping[str, Array], live: LiveModel) -> Any:
    """Return the light answer as a ModelInferResponse without an explanation."""
    response = service_pb2.ModelInferResponse()
    encode_outputs(response, wanted_outputs(question, light, live))
    return response


def explained(
    response: Any, question: Question, live: LiveModel, route: Route, reason: str, score: float, detail: str = ""
) -> Any:
    """Return the response with the caller's id and with why it is what it is."""
    cloud_version = read_parameters(response.parameters).get(_CLOUD_VERSION) if route == "cloud" else None
    response.ClearField("parameters")
    response.MergeFrom(live.signature)
    response.id = question.id
    explanation: dict[str, str | float | int | bool | None] = {
        ROUTE_PARAMETER: route,
        "isthmus.reason": reason,
        "isthmus.detail": detail or None,
        "isthmus.score": score,
        "isthmus.threshold": live.policy.threshold,
        _CLOUD_VERSION: cloud_version,
    }
    for name, value in explanation.items():
        if value is not None:
            set_parameter(response, name, value)
    return response


def promised(response: Any, refusal: NotKept | None) -> Any:
    """Return a provisional answer that says whether a better one will come."""
    set_parameter(response, PROVISIONAL, value=True)
    set_parameter(response, DEFERRED, value=refusal is None)
    if refusal is not None:
        set_parameter(response, NOT_DEFERRED, refusal)
    return response


def kept_answer(response: Any) -> Any:
    """Return what is kept of a light answer beside its request: what it is like, and itself unless it is large."""
    template = service_pb2.ModelInferResponse()
    for output in response.outputs:
        template.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    if sum(map(len, response.raw_output_contents)) <= _KEPT_BYTES:
        template.raw_output_contents.extend(response.raw_output_contents)
    return template


def fuse_with_light(response: Any, light: Mapping[str, Array], live: LiveModel) -> None:
    """Make a checked cloud answer one of both models, as the calibration record says; nothing when it does not say so.

    Only models whose one output is the scored one have such a record: no other output could contradict it.
    """
    point, name = live.operating_point, live.calibration.output
    if point.fusion is None or live.outputs != {name} or not np.isfinite(light[name]).all():
        return
    heavy = decode_outputs(response)[name]
    both = fuse(light[name], heavy, temperature=point.temperature, light_weight=point.fusion.light_weight)
    response.raw_output_contents[0] = both.tobytes()
    set_parameter(response, FUSED_PARAMETER, value=True)


def no_cloud_answer(failure: Failure) -> UnavailableError:
    """Return what a caller gets who asked for the cloud and for nothing else."""
    why = f"{failure.reason} ({failure.detail})" if failure.detail else failure.reason
    return UnavailableError(
        f"{ROUTE_PARAMETER}='cloud' was asked for, and there is no cloud answer: {why}", reason=failure.reason
    )


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
