"""What a request may say beside its tensors' values: parameters, and how its contents are given.

Rules:

1. Parameters that would change the answer and are not understood are refused, never ignored: names under `isthmus.`
   that nobody declared, sequences, parameters of tensors (shared memory, classification).
2. `timeout` (microseconds, as Triton's) is a deadline. `priority` is accepted and changes nothing: a model's requests
   are computed in the order in which they came. Other names are the caller's own and travel to the cloud.
3. Contents come in one way: raw for all tensors, or in the one typed field of the datatype.
4. Numbers are finite unless the agent's operator says otherwise: a NaN on the way in is a defect that the light and the
   heavy model would both answer with nonsense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from edge.deferred.wish import DEFER, PRIORITY, QUEUE, TTL_S
from edge.hedge import HEDGE_PARAMETER, check_hint
from edge.policy import ROUTE_PARAMETER, check_wanted
from isthmus.bundle import TensorSpec
from isthmus.errors import InputError
from isthmus.tensors import CONTENTS_OF, Array

_OURS: Final = "isthmus."
_LONGEST_TIMEOUT_US: Final = 3_600_000_000


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller asks for beside an answer."""

    route: str | None = None
    hedge: bool | None = None
    timeout_s: float | None = None
    values: Mapping[str, Any] = field(default_factory=dict)  # all parameters; those of deferral are read from them


_NONE: Final = Options()


def read_options(request: Any) -> Options:
    """Return what the parameters of a ModelInferRequest ask for.

    Raises:
        InputError: A parameter has no value, or one of the wrong type or size, or is not offered here.
    """
    if not request.parameters:
        return _NONE
    values: dict[str, Any] = {}
    for name, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InputError(f"parameter {name[:80]!r}: expected a value, got none")
        values[name] = getattr(parameter, kind)
        check = _CHECKS.get(name)
        if check is not None:
            check(name, values[name])
        elif name.startswith(_OURS):
            known = ", ".join(other for other in _CHECKS if other.startswith(_OURS))
            raise InputError(f"unknown parameter {name[:80]!r}; expected one of {known}")
    timeout_us = values.get("timeout")
    return Options(
        route=values.get(ROUTE_PARAMETER),
        hedge=values.get(HEDGE_PARAMETER),
        timeout_s=None if timeout_us is None else timeout_us / 1e6,
        values=values,
    )


def check_form(request: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Check how tensors are given and asked for.

    Args:
        request: A ModelInferRequest.
        inputs: The model's.
        outputs: The model's.

    Raises:
        InputError: Contents come in two ways or in the wrong field, an output is unknown or asked for twice, or a
            tensor has parameters.
    """
    for tensor in request.inputs:
        if tensor.parameters:
            raise _has_parameters(tensor, "input")
        if tensor.HasField("contents"):
            _check_typed(request, tensor, inputs)
    if request.outputs:
        _check_outputs(request, [spec.name for spec in outputs])


def check_values(inputs: Mapping[str, Array], *, allow_non_finite: bool = False) -> None:
    """Check that the values are such as the datatypes are meant for.

    Raises:
        InputError: A number is NaN or infinite and may not be, or a BOOL is neither 0 nor 1.
    """
    for name, array in inputs.items():
        if array.dtype.kind == "f" and not allow_non_finite and not np.isfinite(array).all():
            count = array.size - int(np.count_nonzero(np.isfinite(array)))
            raise InputError(f"input {name!r}: expected finite numbers, got {count} of NaN or infinity")
        if array.dtype.kind == "b" and array.view(np.uint8).max() > 1:
            raise InputError(f"input {name!r}: expected BOOL bytes of 0 and 1, got {array.view(np.uint8).max()}")


def _check_typed(request: Any, tensor: Any, inputs: Sequence[TensorSpec]) -> None:
    name = tensor.name[:80]
    if request.raw_input_contents:
        raise InputError(f"input {name!r}: expected raw_input_contents or contents, got both")
    datatype = next((spec.datatype for spec in inputs if spec.name == tensor.name), None)
    expected = None if datatype is None else CONTENTS_OF.get(datatype)
    given = [field.name for field, _ in tensor.contents.ListFields()]
    if expected is not None and given and given != [expected]:
        raise InputError(f"input {name!r}: {datatype} is expected in {expected}, got {' and '.join(given)}")


def _check_outputs(request: Any, names: Sequence[str]) -> None:
    asked: set[str] = set()
    for output in request.outputs:
        if output.name not in names:
            raise InputError(f"unknown output {output.name[:80]!r}; the model's outputs are {', '.join(names)}")
        if output.name in asked:
            raise InputError(f"output {output.name!r} is asked for twice")
        asked.add(output.name)
        if output.parameters:
            raise _has_parameters(output, "output")


def _has_parameters(tensor: Any, what: str) -> InputError:
    names = ", ".join(sorted(tensor.parameters))
    return InputError(f"{what} {tensor.name[:80]!r}: expected no parameters, got {names[:80]}")


def _check_timeout(name: str, value: Any) -> None:
    if type(value) is not int or not 0 < value <= _LONGEST_TIMEOUT_US:
        raise InputError(f"parameter {name}: expected 1 to {_LONGEST_TIMEOUT_US} microseconds, got {_shown(value)}")


def _check_priority(name: str, value: Any) -> None:
    if type(value) is not int or value < 0:
        raise InputError(f"parameter {name}: expected a whole number from 0, got {_shown(value)}")


def _check_no_sequence(name: str, value: Any) -> None:
    if value:
        raise InputError(f"parameter {name}: expected none, models keep nothing between requests, got {_shown(value)}")


def _check_flag(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise InputError(f"parameter {name}: expected true or false, got {_shown(value)}")


def _shown(value: Any) -> str:
    return repr(value)[:40]


FINAL_RESPONSE_PARAMETER: Final = "triton_enable_empty_final_response"
_CHECKS: Final[Mapping[str, Callable[[str, Any], object]]] = {
    ROUTE_PARAMETER: lambda _, value: check_wanted(value),
    HEDGE_PARAMETER: lambda _, value: check_hint(value),
    **dict.fromkeys((DEFER, QUEUE, PRIORITY, TTL_S), lambda *_: None),  # edge.deferred.wish reads them together
    "timeout": _check_timeout,
    "priority": _check_priority,
    "sequence_id": _check_no_sequence,
    "sequence_start": _check_no_sequence,
    "sequence_end": _check_no_sequence,
    FINAL_RESPONSE_PARAMETER: _check_flag,
}
