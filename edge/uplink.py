"""Escalation: one request to the cloud, within what is left of the caller's deadline, or a reason why not.

`Uplink.escalate` never raises and never outlasts its budget; everything that can go wrong has one reason:

    breaker-open        the cloud failed lately and is left alone                   not tried
    no-time-left        the deadline leaves nothing after the guard                 not tried
    cloud-unavailable   no connection, no token, or the cloud says it cannot now
    cloud-timeout       no answer within the budget
    cloud-refused       the cloud understood and said no
    bad-cloud-answer    bytes that are not an answer, or not one to this request

A refusal is a healthy cloud's answer, so it does not open the breaker; the other failures do. A call that gives the
cloud less time than it takes says nothing about the cloud, so hurried calls have a breaker of their own: they open it
for each other, and callers with more time go on being answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import grpc
import structlog
from google.protobuf.message import DecodeError

from edge.breaker import Breaker
from isthmus.errors import IsthmusError
from isthmus.oip import MODEL_INFER, service_pb2
from security.tls import channel_credentials

FailureReason = Literal[
    "breaker-open", "no-time-left", "cloud-unavailable", "cloud-timeout", "cloud-refused", "bad-cloud-answer"
]
_SHORTEST_BUDGET_S: Final = 0.005  # not even a local round trip with inference is quicker
_HURRIED_S: Final = 0.1  # a call with a smaller budget is hurried, whatever the cloud's pace
_HURRIED_RATIO: Final = 2.0  # so is one with a budget below this many usual answers
_PACE_WEIGHT: Final = 0.2  # of the newest answer in the usual time of one
_REASON_OF: Final[dict[grpc.StatusCode, FailureReason]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "cloud-timeout",
    grpc.StatusCode.INVALID_ARGUMENT: "cloud-refused",
    grpc.StatusCode.NOT_FOUND: "cloud-refused",
    grpc.StatusCode.PERMISSION_DENIED: "cloud-refused",
    grpc.StatusCode.UNAUTHENTICATED: "cloud-refused",
    grpc.StatusCode.FAILED_PRECONDITION: "cloud-refused",
    grpc.StatusCode.OUT_OF_RANGE: "cloud-refused",
    grpc.StatusCode.UNIMPLEMENTED: "cloud-refused",
}

log = structlog.get_logger(__name__)


def open_channel(address: str, ca: Path, *, message_bytes: int = 64 << 20) -> grpc.aio.Channel:
    """Return the TLS 1.3 channel to the cloud that escalations, updates and reports share."""
    options = (
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        # A connection that died silently is noticed within 20 s when idle, and 5 s after a request was sent.
        ("grpc.keepalive_time_ms", 15_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A gateway that comes back is used again within two seconds; a handshake may take five.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.enable_retries", 0),  # the caller's deadline is too short to hide failures in
    )
    return grpc.aio.secure_channel(address, channel_credentials(ca), options=options)


async def watch_connection(channel: grpc.aio.Channel, connected: Callable[[], None]) -> None:
    """Keep the channel connected, and call `connected` each time that it is (again); runs until cancelled."""
    while True:
        state = channel.get_state(try_to_connect=True)
        if state is grpc.ChannelConnectivity.READY:
            connected()
        await channel.wait_for_state_change(state)


@dataclass(frozen=True, slots=True)
class Answer:
    """A cloud answer that has passed the check."""

    response: Any  # ModelInferResponse


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no cloud answer."""

    reason: FailureReason


@dataclass(slots=True)
class UplinkCounters:
    """Escalations since the agent started: attempts = successes + failures + those in progress."""

    attempts: int = 0
    successes: int = 0
    failures: int = 0
    skipped: int = 0
    bytes_up: int = 0


class Uplink:
    """Sends serialized requests as they came.

    Args:
        channel: To the gateway.
        token: Returns the current access token, None when there is none.
        breaker: Decides whether the cloud is asked at all.
        hurried_breaker: Decides it for calls that leave the cloud little time.
        guard_s: Part of the deadline that is kept for returning the light answer.
        longest_s: No escalation waits longer.
        unauthenticated: Called when the cloud does not accept the token.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        token: Callable[[], str | None],
        breaker: Breaker,
        hurried_breaker: Breaker,
        *,
        guard_s: float,
        longest_s: float,
        unauthenticated: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.breaker = breaker
        self.hurried_breaker = hurried_breaker
        self.counters = UplinkCounters()
        self._token = token
        self._guard_s = guard_s
        self._longest_s = longest_s
        self._unauthenticated = unauthenticated
        self._clock = clock
        self._pace_s = 0.0  # usual time of an answer
        self._model_infer: Any = channel.unary_unary(MODEL_INFER)  # bytes in, bytes out

    async def escalate(self, request: bytes, *, remaining_s: float, check: Callable[[Any], None]) -> Answer | Failure:
        """Ask the cloud.

        Args:
            request: A serialized ModelInferRequest.
            remaining_s: What is left of the caller's deadline.
            check: Raises an IsthmusError when a parsed ModelInferResponse does not answer this request.
        """
        budget_s = min(remaining_s - self._guard_s, self._longest_s)
        if budget_s < _SHORTEST_BUDGET_S:
            return self._skip("no-time-left")
        token = self._token()
        if token is None:
            return self._skip("cloud-unavailable")
        hurried = budget_s < max(_HURRIED_S, _HURRIED_RATIO * self._pace_s)
        breaker = self.hurried_breaker if hurried else self.breaker
        ticket = breaker.admit()
        if ticket is None:
            return self._skip("breaker-open")
        self.counters.attempts += 1
        self.counters.bytes_up += len(request)
        settled, started = False, self._clock()
        try:
            outcome = await self._ask(request, token, budget_s, check)
            settled = True
        finally:
            if not settled:  # the caller went away
                self.counters.failures += 1
                breaker.abandon(ticket)
        if isinstance(outcome, Answer):
            took_s = self._clock() - started
            self._pace_s = took_s if not self._pace_s else self._pace_s + _PACE_WEIGHT * (took_s - self._pace_s)
        self._count(outcome, breaker, ticket)
        return outcome

    def nudge(self) -> None:
        """Try the cloud again now: there is fresh evidence, such as a new connection, that it is back."""
        self.breaker.nudge()
        self.hurried_breaker.nudge()

    async def _ask(self, request: bytes, token: str, budget_s: float, check: Callable[[Any], None]) -> Answer | Failure:
        metadata = (("authorization", f"Bearer {token}"),)
        try:
            # Twice on purpose: the peer is told the deadline, and this side keeps it whatever happens there.
            async with asyncio.timeout(budget_s):
                raw = await self._model_infer(request, timeout=budget_s, metadata=metadata)
            response = service_pb2.ModelInferResponse.FromString(raw)
            check(response)
        except TimeoutError:
            return Failure("cloud-timeout")
        except grpc.aio.AioRpcError as error:
            return self._explain(error)
        except (DecodeError, IsthmusError) as error:
            log.warning("bad cloud answer", error=str(error)[:200])
            return Failure("bad-cloud-answer")
        except Exception:  # the light answer is there: nothing that happens on this side of it may take it away
            log.exception("escalation failed")
            return Failure("cloud-unavailable")
        return Answer(response)

    def _explain(self, error: grpc.aio.AioRpcError) -> Failure:
        reason = _REASON_OF.get(error.code(), "cloud-unavailable")
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            self._unauthenticated()
        if reason == "cloud-refused":
            log.warning("cloud refused", code=error.code().name, detail=(error.details() or "")[:200])
        return Failure(reason)

    def _skip(self, reason: FailureReason) -> Failure:
        self.counters.skipped += 1
        return Failure(reason)

    def _count(self, outcome: Answer | Failure, breaker: Breaker, ticket: int) -> None:
        if isinstance(outcome, Answer):
            self.counters.successes += 1
            breaker.succeed(ticket)
            return
        self.counters.failures += 1
        if outcome.reason == "cloud-refused":
            breaker.succeed(ticket)
        else:
            breaker.fail(ticket)
