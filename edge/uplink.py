"""Escalation: one request to the cloud, within what is left of the caller's deadline, or a reason why not.

`Uplink.escalate` never raises and never outlasts its budget; everything that can go wrong has one reason, and a finer
detail where there is more to say:

    deadline         no answer within the budget
                       no-time-left     the deadline leaves nothing after the guard                   not tried
                       hurried          calls with as little time as this one have failed lately      not tried
    refused          the cloud understood and said no; the detail is its status (`not-found`, ...) or `too-large`
    unavailable      the cloud said that it cannot, or has a defect; the detail is its status when that says more
                       no-connection    there is none, and the last try to make one failed            not tried
                       breaker-open     the cloud failed lately and is left alone                     not tried
                       connection-lost  it broke during the call
                       no-sealing-key   inputs are to be sealed and cannot be                          not tried
                       agent-error      a defect on this side; the log has it
    unauthenticated  the cloud does not accept the access token
                       no-token         there is none that is valid                                   not tried
    quota            the cloud has had enough of this caller
                       backing-off      it said so lately                                             not tried
    bad-response     not an answer to this request
                       unparsable       not even a message

`refused`, `unauthenticated` and `quota` are a healthy cloud's answers, so they do not open the breaker; the others do,
and so does a missing connection, which costs its callers nothing. A call that gives the cloud less time than it takes
says nothing about the cloud, so hurried calls have a breaker of their own: they open it for each other, and callers
with more time go on being answered.

A call is sent once more when its connection broke under it and a retry is left (edge.retry): whether the cloud has
seen it cannot be told, and need not be, as an inference changes nothing. Nothing else is retried.

A hedged call starts before anybody knows whether it is needed. It ends, and is counted, when that is known: as any
other when it is, and as cancelled when it is not.

An attempt that ended with its budget has failed, for its caller and for the breaker. Its answer may still be waited
for, to learn from it (edge.stragglers).

The breaker's probes are callers' own requests, because only they show what callers need: a cheaper call can succeed
while the heavy model hangs, and would open the way to it again and again. A probe takes no longer than the deadline of
its caller allows, there is one at a time, and they become rare; a connection that is down answers them for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import grpc
import structlog
from google.protobuf.message import DecodeError

from edge.breaker import Breaker
from edge.link import LinkMeter
from edge.retry import QuotaPause, RetryBudget
from edge.stragglers import Stragglers
from isthmus.errors import IsthmusError
from isthmus.oip import MODEL_INFER, service_pb2
from isthmus.policies import Link
from security.tls import channel_credentials

FailureReason = Literal["deadline", "refused", "unavailable", "unauthenticated", "quota", "bad-response"]
Check = Callable[[Any], None]
_SHORTEST_BUDGET_S: Final = 0.005  # not even a local round trip with inference is quicker
_SETTLING_S: Final = 0.01  # longest time that a broken connection may look whole
_HURRIED_S: Final = 0.1  # a call with a smaller budget is hurried, whatever the cloud's pace
_HURRIED_RATIO: Final = 2.0  # so is one with a budget below this many usual answers
_PACE_WEIGHT: Final = 0.2  # of the newest answer in the usual time of one
_HEALTHY: Final[frozenset[FailureReason]] = frozenset({"refused", "unauthenticated", "quota"})
_REASON_OF: Final[dict[grpc.StatusCode, FailureReason]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline",
    grpc.StatusCode.INVALID_ARGUMENT: "refused",
    grpc.StatusCode.NOT_FOUND: "refused",
    grpc.StatusCode.PERMISSION_DENIED: "refused",
    grpc.StatusCode.FAILED_PRECONDITION: "refused",
    grpc.StatusCode.OUT_OF_RANGE: "refused",
    grpc.StatusCode.UNIMPLEMENTED: "refused",
    grpc.StatusCode.UNAUTHENTICATED: "unauthenticated",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "quota",
}
_TOO_LARGE: Final = "message larger than max"  # how gRPC itself words it, under the status of a used-up quota
_BROKEN: Final = "Stream removed"  # how it words that the connection broke
_RETRY_HINTS: Final = {"grpc-retry-pushback-ms": 1e-3, "retry-after": 1.0}  # trailing metadata: seconds in its unit

log = structlog.get_logger(__name__)


def open_channel(
    address: str, ca: Path, identity: tuple[Path, Path] | None = None, *, message_bytes: int = 64 << 20
) -> grpc.aio.Channel:
    """Return the TLS 1.3 channel to the cloud that escalations, updates and reports share.

    Args:
        address: HOST:PORT.
        ca: The authority that the cloud's certificate must come from.
        identity: Key and certificate chain to show, where the cloud asks for them.
        message_bytes: Largest message.

    Raises:
        ConfigError: A file does not hold what it should.
    """
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
    return grpc.aio.secure_channel(address, channel_credentials(ca, *(identity or ())), options=options)


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
    detail: str = ""  # the finer cause, when there is more to say


@dataclass(frozen=True, slots=True)
class Need:
    """What an escalation is needed for."""

    check: Check
    late: Callable[[], None] | None = None  # called when the answer passes the check, but too late to be given


@dataclass(frozen=True, slots=True)
class _Admission:
    breaker: Breaker
    ticket: int
    token: str
    budget_s: float


@dataclass(slots=True)
class UplinkCounters:
    """Escalations since the agent started: attempts = successes + failures + cancelled + those in progress.

    Each attempt and each retry is one call. Of the calls that are lost, the cloud has received some; of the others, all
    but those that ended with their deadline before they arrived.
    """

    attempts: int = 0
    successes: int = 0
    failures: int = 0
    cancelled: int = 0  # nobody waits for the answer any more: the caller went away, or a hedge was not needed
    hedged: int = 0  # attempts that began before they were known to be needed
    skipped: int = 0  # not tried
    retries: int = 0  # calls beyond the first of an attempt
    lost: int = 0  # calls that ended with their connection
    bytes_up: int = 0
    late: int = 0  # failures whose answer came after all, too late to be given


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
        retries: How many calls may be sent again.
        quota: How long the cloud is left alone when a quota is used up.
        stragglers: Follows calls whose answers are late; none are when it is None.
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
        retries: RetryBudget | None = None,
        quota: QuotaPause | None = None,
        stragglers: Stragglers | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.breaker = breaker
        self.hurried_breaker = hurried_breaker
        self.counters = UplinkCounters()
        self._channel = channel
        self._token = token
        self._guard_s = guard_s
        self._longest_s = longest_s
        self._unauthenticated = unauthenticated
        self._retries = retries or RetryBudget()
        self._quota = quota or QuotaPause()
        self.stragglers = stragglers or Stragglers()
        self._clock = clock
        self._pace_s = 0.0  # usual time of an answer
        self._meter = LinkMeter()
        self._waiting = 0  # escalations in progress
        self._model_infer: Any = channel.unary_unary(MODEL_INFER)  # bytes in, bytes out

    @property
    def link(self) -> Link:
        """Return what an escalation costs now, as measured on those before it."""
        return self._meter.link(waiting=self._waiting)

    async def escalate(
        self, request: bytes, *, remaining_s: float, check: Check, late: Callable[[], None] | None = None
    ) -> Answer | Failure:
        """Ask the cloud.

        Args:
            request: A serialized ModelInferRequest.
            remaining_s: What is left of the caller's deadline.
            check: Raises an IsthmusError when a parsed ModelInferResponse does not answer this request.
            late: Called when an answer passes the check after the failure was returned; None when that is no use.
        """
        needed: asyncio.Future[Need] = asyncio.get_running_loop().create_future()
        needed.set_result(Need(check, late))
        return await self.hedge(request, remaining_s=remaining_s, needed=needed)

    async def hedge(self, request: bytes, *, remaining_s: float, needed: asyncio.Future[Need]) -> Answer | Failure:
        """Ask the cloud before it is known whether its answer is needed; cancel this when it is not.

        Args:
            request: A serialized ModelInferRequest.
            remaining_s: What is left of the caller's deadline.
            needed: Gets what `escalate` is told when the answer is needed.
        """
        admission = self._admit(min(remaining_s - self._guard_s, self._longest_s))
        if isinstance(admission, Failure):
            await needed
            self.counters.skipped += 1
            return admission
        self.counters.attempts += 1
        self.counters.hedged += not needed.done()
        useless = needed.done() and needed.result().late is None
        grace_s = 0.0 if useless else self.stragglers.grace_s(len(request))
        sending = self._send(request, admission, grace_s)
        call = asyncio.ensure_future(sending) if grace_s else None  # a task, to outlive this one
        if call is not None:
            call.add_done_callback(_heard)
        settled = False
        self._waiting += 1
        try:
            outcome = await self._ask(asyncio.shield(call) if call else sending, len(request), admission, needed)
            need = await needed
            settled = True
        finally:
            self._waiting -= 1
            if not settled:
                self.counters.cancelled += 1
                admission.breaker.abandon(admission.ticket)
                if call is not None:
                    call.cancel()
        self._count(outcome, admission)
        if call is not None and not call.done():  # its budget has ended, and it has not
            self._follow(call, len(request), need)
        return outcome

    def nudge(self) -> None:
        """Try the cloud again now: there is fresh evidence, such as a new connection, that it is back."""
        self.breaker.nudge()
        self.hurried_breaker.nudge()

    def _admit(self, budget_s: float) -> _Admission | Failure:
        """Return the leave to ask the cloud now, or why it is not asked."""
        hurried = budget_s < max(_HURRIED_S, _HURRIED_RATIO * self._pace_s)
        breaker = self.hurried_breaker if hurried else self.breaker
        if budget_s < _SHORTEST_BUDGET_S:
            return Failure("deadline", "no-time-left")
        if self._is_down():
            _fail_for_nothing(breaker)
            return Failure("unavailable", "no-connection")
        token = self._token()
        if token is None:
            return Failure("unauthenticated", "no-token")
        if self._quota.active:
            return Failure("quota", "backing-off")
        ticket = breaker.admit()
        if ticket is None:
            return Failure("deadline", "hurried") if hurried else Failure("unavailable", "breaker-open")
        return _Admission(breaker, ticket, token, budget_s)

    async def _ask(
        self, sending: Awaitable[bytes], size: int, admission: _Admission, needed: asyncio.Future[Need]
    ) -> Answer | Failure:
        started = self._clock()
        try:
            # Twice on purpose: the peer is told the deadline, and this side keeps it whatever happens there.
            async with asyncio.timeout(admission.budget_s):
                raw = await sending
            took_s = self._clock() - started
            response = service_pb2.ModelInferResponse.FromString(raw)
            (await needed).check(response)
        except TimeoutError:
            return Failure("deadline")
        except grpc.aio.AioRpcError as error:
            return self._explain(error)
        except (DecodeError, IsthmusError) as error:
            log.warning("bad cloud answer", error=str(error)[:200])
            return Failure("bad-response", "unparsable" if isinstance(error, DecodeError) else "")
        except Exception:  # the light answer is there: nothing that happens on this side of it may take it away
            log.exception("escalation failed")
            return Failure("unavailable", "agent-error")
        self._meter.note(size, took_s)
        self._pace_s = took_s if not self._pace_s else self._pace_s + _PACE_WEIGHT * (took_s - self._pace_s)
        return Answer(response)

    async def _send(self, request: bytes, admission: _Admission, grace_s: float) -> bytes:
        deadline = time.monotonic() + admission.budget_s
        self._retries.earn()
        try:
            return await self._call(request, admission.token, deadline + grace_s)
        except grpc.aio.AioRpcError as error:
            time_left = deadline - time.monotonic() >= _SHORTEST_BUDGET_S
            if not self._broke(error) or self._is_down() or not time_left or not self._retries.spend():
                raise
        self.counters.retries += 1
        with contextlib.suppress(TimeoutError):  # until gRPC has noticed, it would send on the broken connection
            async with asyncio.timeout(_SETTLING_S):
                await self._channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        return await self._call(request, admission.token, deadline + grace_s)

    def _follow(self, call: asyncio.Task[bytes], size: int, need: Need) -> None:
        late = need.late
        if late is None:
            call.cancel()
            return

        def use(raw: bytes) -> None:
            try:
                need.check(service_pb2.ModelInferResponse.FromString(raw))
            except (DecodeError, IsthmusError) as error:
                log.warning("bad cloud answer", error=str(error)[:200])
                return
            self.counters.late += 1
            late()

        self.stragglers.follow(call, size, use)

    async def _call(self, request: bytes, token: str, deadline: float) -> bytes:
        self.counters.bytes_up += len(request)
        metadata = (("authorization", f"Bearer {token}"),)
        try:
            raw: bytes = await self._model_infer(request, timeout=deadline - time.monotonic(), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            self.counters.lost += self._broke(error)
            raise
        return raw

    def _is_down(self) -> bool:
        # gRPC keeps this state, while it tries again in the background, until there is a connection.
        return self._channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.TRANSIENT_FAILURE

    def _broke(self, error: grpc.aio.AioRpcError) -> bool:
        """Return whether a call failed with its connection; a cloud that answers "unavailable" leaves it standing."""
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            return False
        # The state may lag behind the call by an instant, in which gRPC's words say it.
        ready = self._channel.get_state() is grpc.ChannelConnectivity.READY
        return not ready or (error.details() or "").startswith(_BROKEN)

    def _explain(self, error: grpc.aio.AioRpcError) -> Failure:
        code, words = error.code(), error.details() or ""
        reason = _REASON_OF.get(code, "unavailable")
        if reason == "unauthenticated":
            self._unauthenticated()
        if reason == "quota" and _TOO_LARGE in words:
            return Failure("refused", "too-large")
        if reason == "quota":
            self._quota.begin(_retry_hint_s(error))
        if self._broke(error):
            return Failure(reason, "no-connection" if self._is_down() else "connection-lost")
        if reason == "refused":
            log.warning("cloud refused", code=code.name, detail=words[:200])
        says_more = reason == "refused" or (reason == "unavailable" and code is not grpc.StatusCode.UNAVAILABLE)
        return Failure(reason, code.name.lower().replace("_", "-") if says_more else "")

    def _count(self, outcome: Answer | Failure, admission: _Admission) -> None:
        breaker, ticket = admission.breaker, admission.ticket
        if isinstance(outcome, Answer):
            self.counters.successes += 1
            self._quota.reset()
            breaker.succeed(ticket)
            return
        self.counters.failures += 1
        if outcome.reason in _HEALTHY:
            breaker.succeed(ticket)
        else:
            breaker.fail(ticket)


def _heard(call: asyncio.Task[Any]) -> None:
    """Take note of how a call ended, for one that nobody waits for any more."""
    if not call.cancelled():
        call.exception()


def _fail_for_nothing(breaker: Breaker) -> None:
    ticket = breaker.admit()
    if ticket is not None:
        breaker.fail(ticket)


def _retry_hint_s(error: grpc.aio.AioRpcError) -> float | None:
    """Return how long the cloud asks to be left alone, None when it does not say."""
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        try:
            seconds = float(value) * _RETRY_HINTS[key]
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    return None
