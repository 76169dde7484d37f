"""The names in an inference request: none may be so long that Triton's refusal of it cannot travel back.

Triton quotes what it refuses. A status that is longer than HTTP/2 headers may be is lost as a whole, and the caller's
mistake would look like a failure of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from isthmus.errors import InputError

MAX_NAME: Final = 1024  # characters


def check_names(request: Any) -> None:
    """Check every name of a ModelInferRequest.

    Raises:
        InputError: One is too long.
    """
    for what, name in _names(request):
        if len(name) > MAX_NAME:
            raise InputError(f"{what}: expected at most {MAX_NAME} characters, got {len(name)}")


def _names(request: Any) -> Iterator[tuple[str, str]]:
    yield "id", request.id
    yield from (("parameter", name) for name in request.parameters)
    for kind, tensors in (("input", request.inputs), ("output", request.outputs)):
        for tensor in tensors:
            yield kind, tensor.name
            yield from ((f"parameter of an {kind}", name) for name in tensor.parameters)
    yield from (("datatype", tensor.datatype) for tensor in request.inputs)
