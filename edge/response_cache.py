"""Answers that were given before, for requests that are the same to the byte.

The rules:

1. A key says everything that an answer depends on: the bundle version, its variant and calibration record, the outputs
   and the route that the caller asked for, and the names, types, shapes and bytes of the inputs. A new version, or a
   new record, so begins with nothing.
2. Kept are what the cloud has answered, and light answers that were given because of what they are (confident, or asked
   for by route). A fallback or an error says something about that moment; the next caller may fare better.
3. The least recently used answers go first when all together would take more than the limit.
4. An answer from here says so (`isthmus.cached`) and carries its own request's id.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import numpy as np

from edge.model import LiveModel
from edge.policy import Route
from isthmus.oip import service_pb2, set_parameter
from isthmus.tensors import Array

CACHED_PARAMETER: Final = "isthmus.cached"
_LASTING: Final = frozenset({"confident", "requested"})  # reasons of light answers that are the same the next time
_ENTRY_BYTES: Final = 512  # what an entry takes beside its answer


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """An answer, and what it was counted under."""

    response: bytes  # a serialized ModelInferResponse
    route: Route
    reason: str

    def to_response(self, request_id: str) -> Any:
        """Return it as the ModelInferResponse to another request."""
        response = service_pb2.ModelInferResponse.FromString(self.response)
        response.id = request_id
        set_parameter(response, CACHED_PARAMETER, True)
        return response


class ResponseCache:
    """The answers, bounded in bytes.

    Args:
        limit_bytes: Of all answers together, with what it takes to keep them.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.bytes = 0
        self._limit_bytes = limit_bytes
        self._answers: OrderedDict[bytes, CachedAnswer] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: bytes) -> CachedAnswer | None:
        """Return the answer of this key, None when there is none."""
        answer = self._answers.get(key)
        if answer is not None:
            self._answers.move_to_end(key)
        return answer

    def offer(self, key: bytes, response: Any, route: Route, reason: str) -> None:
        """Keep an answer if it is one that will do again, and fits."""
        if route == "fallback" or (route == "edge" and reason not in _LASTING):
            return
        answer = CachedAnswer(response.SerializeToString(), route, reason)
        if _size(answer) > self._limit_bytes:
            return
        before = self._answers.pop(key, None)  # another request with the same bytes was quicker
        self.bytes += _size(answer) - (_size(before) if before is not None else 0)
        self._answers[key] = answer
        while self.bytes > self._limit_bytes:
            _, oldest = self._answers.popitem(last=False)
            self.bytes -= _size(oldest)


def cache_key(live: LiveModel, wanted: Collection[str], route: str | None, inputs: Mapping[str, Array]) -> bytes:
    """Return the digest of everything that an answer depends on.

    Args:
        live: The version that answers.
        wanted: Names of the outputs to return.
        route: What the caller asked for.
        inputs: The request's tensors.
    """
    manifest = live.manifest
    tensors = sorted(inputs.items())
    forms = [(name, array.dtype.str, array.shape) for name, array in tensors]
    version = (manifest.name, manifest.version, live.variant.id, live.calibration_id)
    digest = sha256(repr((version, sorted(wanted), route, forms)).encode())
    for _, array in tensors:  # their lengths are in `forms`: no two sets of tensors look alike
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _size(answer: CachedAnswer) -> int:
    return len(answer.response) + _ENTRY_BYTES
