"""What a request asks for: the parameters that opt in to deferral, checked at the door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from isthmus.bundle import check_name
from isthmus.errors import InputError

DEFER: Final = "isthmus.defer"
QUEUE: Final = "isthmus.queue"
PRIORITY: Final = "isthmus.priority"
TTL_S: Final = "isthmus.ttl_s"
DEFERRED: Final = "isthmus.deferred"
PROVISIONAL: Final = "isthmus.provisional"
NOT_DEFERRED: Final = "isthmus.not_deferred"
DEFAULT_QUEUE: Final = "default"
STORED_ALREADY: Final = "deferred"  # the reason of an answer to a request that is kept, or was answered late

_DEFAULT_PRIORITY: Final = 5
_HIGHEST_PRIORITY: Final = 9
_LONGEST_ID: Final = 256  # bytes

# Why a request was not kept.
NotKept = Literal["off", "final", "too-large", "quota", "disk", "disk-slow", "unsealed"]


@dataclass(frozen=True, slots=True)
class QueueName:
    """A queue of one caller: beyond loopback nobody reads or acknowledges the answers of others."""

    owner: str  # subject of the caller's token; empty on this machine's own addresses
    name: str


@dataclass(frozen=True, slots=True)
class Wish:
    """A request that is to be kept when the cloud cannot be had."""

    queue: QueueName
    id: str
    priority: int
    ttl_s: int


class Keeper(Protocol):
    """Where requests are kept."""

    def read(self, parameters: Mapping[str, Any], request_id: str) -> Wish | None:
        """Return what a request asks for, None when it does not ask to be deferred.

        Raises:
            InputError: It asks in a way that cannot be meant.
        """
        ...

    def knows(self, wish: Wish) -> bool:
        """Return whether this request is kept already, or was answered late."""
        ...

    async def keep(
        self, wish: Wish, *, request: bytes, template: Any, answer_bytes: int, failure: str, remaining_s: float
    ) -> NotKept | None:
        """Put a request on the disk; never raise and never take longer than `remaining_s`.

        Args:
            wish: What it asked for.
            request: The serialized request as the cloud must get it.
            template: A ModelInferResponse without contents: what the late answer is like.
            answer_bytes: About how long the late answer is.
            failure: Why the cloud could not be had.
            remaining_s: What is left of the caller's deadline.

        Returns:
            None when the request is on the disk, else why no late answer is promised.
        """
        ...


class NoDeferral:
    """Keeps nothing: what an agent has whose setting `defer` is off."""

    def read(self, parameters: Mapping[str, Any], request_id: str) -> Wish | None:
        """See `Keeper.read`."""
        return read_wish(parameters, request_id)

    def knows(self, wish: Wish) -> bool:
        """See `Keeper.knows`."""
        del wish
        return False

    async def keep(
        self, wish: Wish, *, request: bytes, template: Any, answer_bytes: int, failure: str, remaining_s: float
    ) -> NotKept | None:
        """See `Keeper.keep`."""
        del wish, request, template, answer_bytes, failure, remaining_s
        return "off"


def read_wish(
    parameters: Mapping[str, Any], request_id: str, *, owner: str = "", longest_ttl_s: int = 1 << 31
) -> Wish | None:
    """Return what the parameters ask for, None when they do not ask to be deferred.

    Args:
        parameters: Of the request, as plain values.
        request_id: The caller's, empty when there is none.
        owner: Subject of the caller's token.
        longest_ttl_s: Longest life that may be asked for, and that of requests which ask for none.

    Raises:
        InputError: A value has the wrong type or is out of range, or there is no request id.
    """
    if DEFER not in parameters:  # nearly all requests
        return None
    wanted = parameters[DEFER]
    if not isinstance(wanted, bool):
        raise InputError(f"parameter {DEFER}: expected true or false, got {_shown(wanted)}")
    queue = parameters.get(QUEUE, DEFAULT_QUEUE)
    priority = _whole_number(parameters, PRIORITY, _DEFAULT_PRIORITY, lowest=0, highest=_HIGHEST_PRIORITY)
    ttl_s = _whole_number(parameters, TTL_S, longest_ttl_s, lowest=1, highest=longest_ttl_s)
    checked = QueueName(owner, check_queue(queue, f"parameter {QUEUE}"))
    if not wanted:
        return None
    if not request_id:
        raise InputError(f"parameter {DEFER}: expected a request id, which the late answer will carry, got none")
    if len(request_id.encode()) > _LONGEST_ID:
        raise InputError(f"parameter {DEFER}: expected a request id of at most {_LONGEST_ID} bytes")
    return Wish(queue=checked, id=request_id, priority=priority, ttl_s=ttl_s)


def check_queue(name: object, what: str) -> str:
    """Return the name of a queue.

    Raises:
        InputError: It is none; `what` says where it came from.
    """
    if not isinstance(name, str):
        raise InputError(f"{what}: expected the name of a queue, got {_shown(name)}")
    try:
        return check_name(name)
    except ValueError as error:
        raise InputError(f"{what}: {error}") from error


def _whole_number(parameters: Mapping[str, Any], name: str, default: int, *, lowest: int, highest: int) -> int:
    value = parameters.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise InputError(f"parameter {name}: expected a whole number from {lowest} to {highest}, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    return f"{value!r:.40}"
