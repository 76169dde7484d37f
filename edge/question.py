"""A request that has passed every check at the door: what is asked, of which version, until when."""

from __future__ import annotations

import itertools
import secrets
from dataclasses import dataclass
from typing import Any, Final

from edge.deferred.wish import Keeper, Wish
from edge.model import LiveModel
from edge.request import check_form, check_values, read_options
from edge.sealing import InputSealer
from isthmus.oip import override_fields
from isthmus.tensors import Array, decode_inputs

_PROCESS_ID: Final = secrets.token_hex(4)  # drawn once: a system call for every request is dear
_numbers: Final = itertools.count()


@dataclass(frozen=True, slots=True)
class Question:
    """A checked request."""

    raw: bytes
    inputs: dict[str, Array]
    wanted: frozenset[str]  # names of the outputs to return
    route: str | None
    hedge: bool | None  # what the caller expects
    deadline: float  # on the monotonic clock
    wish: Wish | None  # to be answered later when the cloud cannot be had
    sealer: InputSealer | None  # of inputs that only the gateway may read
    id: str  # the caller's, or made here: the same in the agent's, the gateway's and Triton's logs, and in the answer

    @property
    def rows(self) -> int:
        """Return the size of the batch."""
        return len(next(iter(self.inputs.values())))

    def to_cloud(self, live: LiveModel) -> bytes:
        """Return the request as the cloud must get it: its own bytes, with model, version and id made certain.

        Raises:
            UnavailableError: Inputs of it are to be sealed and cannot be, so it must not leave.
        """
        manifest = live.manifest
        request = override_fields(
            self.raw, model_name=manifest.name, model_version=str(manifest.version), request_id=self.id
        )
        return request if self.sealer is None else self.sealer.seal(manifest.name, request)


@dataclass(frozen=True, slots=True)
class Limits:
    """What holds where a request says nothing."""

    default_deadline_s: float = 1.0
    allow_non_finite: bool = False


def read_question(
    raw: bytes,
    request: Any,
    live: LiveModel,
    deferral: Keeper,
    limits: Limits,
    sealer: InputSealer | None = None,
    *,
    started: float,
    remaining_s: float | None,
) -> Question:
    """Check a request against the version that will answer it.

    Args:
        raw: The request as it came over the wire.
        request: The same, parsed.
        live: The version.
        deferral: Reads what a request asks of it.
        limits: What holds where the request says nothing.
        sealer: Seals inputs for the gateway; None where none are sealed.
        started: When it came, on the monotonic clock.
        remaining_s: What was left of the caller's deadline then; None when there is none.

    Raises:
        InputError: The request does not fit the model.
    """
    manifest = live.manifest
    options = read_options(request)
    check_form(request, manifest.inputs, manifest.outputs)
    inputs = decode_inputs(request, manifest.inputs, max_batch=manifest.max_batch, max_length=manifest.max_length)
    check_values(inputs, allow_non_finite=limits.allow_non_finite)
    if remaining_s is None:
        remaining_s = limits.default_deadline_s if options.timeout_s is None else options.timeout_s
    elif options.timeout_s is not None:
        remaining_s = min(remaining_s, options.timeout_s)
    return Question(
        raw=raw,
        inputs=inputs,
        wanted=frozenset([output.name for output in request.outputs]) or live.outputs,
        route=options.route,
        hedge=options.hedge,
        deadline=started + remaining_s,
        wish=deferral.read(options.values, request.id),
        sealer=sealer,
        id=request.id or f"{_PROCESS_ID}{next(_numbers):08x}",
    )
