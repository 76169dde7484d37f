"""Records at the door of a server: two interceptors, one on either side of the one that lets calls in.

    StatusInterceptor, RefusalAudit, AuthInterceptor, ActionAudit, the method

`RefusalAudit` sees every refusal, whoever refuses; `ActionAudit` knows who the caller is and runs before the method.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

import grpc

from isthmus.errors import IdentityError, IsthmusError, NotFoundError, PermissionDeniedError
from isthmus.status import REASON_KEY, MethodInterceptor, wrap_handler
from security.audit.budget import Budget
from security.audit.coverage import Coverage, coverage_of
from security.audit.records import Event, Value, Who
from security.audit.writer import Trail
from security.binding import peer_of
from security.interceptors import known_claims

_REFUSED: Final = (IdentityError, PermissionDeniedError)
_REFUSED_CODES: Final = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_REQUEST_ID: Final = "x-request-id"
_INFERENCE: Final = "/inference."
# What a request's field of this name is in a record. Nothing else of a request is ever recorded.
_NAMED: Final[Mapping[str, str]] = {"model": "model", "model_name": "model", "device_id": "device", "device": "device"}
_DETAILS: Final = (
    "id", "name", "subject", "role", "tenant", "key_id", "token_id", "ttl_s", "attempt", "release", "dry_run", "state",
    "sha256", "length", "models", "remove", "scopes", "share", "percent", "weight", "until", "thumbprint",
)  # fmt: skip
_MAX_ITEMS: Final = 20
_Handler = Any  # grpc.RpcMethodHandler, which cannot be given its types at run time
_Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]]


class RefusalAudit(MethodInterceptor):
    """Records who was refused what, and why: before the interceptor that refuses.

    Args:
        trail: Gets the records.
        budget: Bounds them.
    """

    def __init__(self, trail: Trail, budget: Budget) -> None:
        super().__init__()
        self._trail, self._budget = trail, budget

    def wrap(self, method: str, handler: _Handler) -> _Handler:
        """Watch how the method ends."""

        def unary(behaviour: Callable[..., Any]) -> Callable[..., Any]:
            async def call(request: Any, context: Any) -> Any:
                try:
                    result = behaviour(request, context)
                    answer = await result if inspect.isawaitable(result) else result
                except (IsthmusError, grpc.aio.AbortError) as error:
                    self._refused(method, error, context)
                    raise
                self._refused(method, None, context)
                return answer

            return call

        def stream(behaviour: Callable[..., Any]) -> Callable[..., Any]:
            async def call(request: Any, context: Any) -> AsyncIterator[Any]:
                try:
                    result = behaviour(request, context)
                    if inspect.isawaitable(result):
                        await result
                    else:
                        async for response in result:
                            yield response
                except (IsthmusError, grpc.aio.AbortError) as error:
                    self._refused(method, error, context)
                    raise
                self._refused(method, None, context)

            return call

        return wrap_handler(handler, unary, stream)

    def _refused(self, method: str, error: Exception | None, context: Any) -> None:
        reason = _reason_of_refusal(method, error, context)
        if not reason:
            return
        event = Event(method, "refused", who_calls(context), reason=reason, request_id=request_id(context))
        if self._budget.admits(source_of(event.who), event):
            self._trail.note(event)


class ActionAudit(MethodInterceptor):
    """Records administrative calls: before they run, and how they ended; after the interceptor that lets them in.

    Args:
        trail: Gets the records; a call that it cannot record does not run.
    """

    def __init__(self, trail: Trail) -> None:
        super().__init__()
        self._trail = trail

    def wrap(self, method: str, handler: _Handler) -> _Handler:
        """Record the calls, if they are some of those."""
        coverage = coverage_of(method)
        if coverage in (Coverage.SAMPLE, Coverage.REFUSALS):
            return handler

        def unary(behaviour: Callable[..., Any]) -> Callable[..., Any]:
            async def call(request: Any, context: Any) -> Any:
                recording = _Recording(self._trail, method, coverage, context)
                request = await recording.begin(request)
                try:
                    result = behaviour(request, context)
                    answer = await result if inspect.isawaitable(result) else result
                except BaseException as error:
                    recording.failed(error)
                    raise
                await recording.done(answer)
                return answer

            return call

        def stream(behaviour: Callable[..., Any]) -> Callable[..., Any]:
            async def call(request: Any, context: Any) -> AsyncIterator[Any]:
                recording = _Recording(self._trail, method, coverage, context)
                request = await recording.begin(request)
                try:
                    result = behaviour(request, context)
                    if inspect.isawaitable(result):
                        await result
                    else:
                        async for response in result:
                            yield response
                except BaseException as error:
                    recording.failed(error)
                    raise
                await recording.done(None)

            return call

        return wrap_handler(handler, unary, stream)


class _Recording:
    """One call."""

    def __init__(self, trail: Trail, method: str, coverage: Coverage, context: Any) -> None:
        self._trail, self._method, self._coverage = trail, method, coverage
        self._who, self._request_id = who_calls(context), request_id(context)
        self._fields: dict[str, Any] = {}

    async def begin(self, request: Any) -> Any:
        """Record what is about to run; return what takes the request's place.

        Raises:
            UnavailableError: It cannot be recorded, so it must not run.
        """
        if hasattr(request, "__aiter__"):
            request = self._observed(request)
        else:
            self._fields = fields_of(request)
        if self._coverage is Coverage.ACTION:
            await self._trail.write(self._event("allowed"))
        elif self._coverage is Coverage.STRANGER:
            await self._trail.ready()
        return request

    async def _observed(self, requests: Any) -> AsyncIterator[Any]:
        first = True
        async for request in requests:
            if first:
                self._fields, first = fields_of(request), False
            yield request

    async def done(self, answer: Any) -> None:
        if not self._fields.get("device") and isinstance(device := getattr(answer, "device_id", None), str):
            self._fields["device"] = device  # whom an enrolment code was for
        if self._coverage is Coverage.STRANGER:
            await self._trail.write(self._event("done"))
        else:
            self._trail.note(self._event("done"))

    def failed(self, error: BaseException) -> None:
        if self._coverage is Coverage.STRANGER or isinstance(error, _REFUSED):
            return  # recorded, or counted, as every refusal is
        reason = error.reason if isinstance(error, IsthmusError) else type(error).__name__
        self._trail.note(self._event("failed", reason))

    def _event(self, decision: str, reason: str = "") -> Event:
        return Event(self._method, decision, self._who, reason=reason, request_id=self._request_id, **self._fields)


def who_calls(context: Any) -> Who:
    """Return what is known of the caller of the running method."""
    claims = known_claims()
    peer = str(context.peer() or "")
    certificate = peer_of(context)
    thumbprint = "" if certificate is None else certificate.thumbprint
    if claims is None:
        return Who(thumbprint=thumbprint, peer=peer)
    return Who(claims.subject, claims.tenant, claims.token_id, claims.thumbprint or thumbprint, peer)


def source_of(who: Who) -> str:
    """Return whose budget a refusal is on: the caller's, or its address's, without the port."""
    return f"{who.tenant}/{who.subject}" if who.subject else who.peer.rpartition(":")[0]


def request_id(context: Any) -> str:
    """Return the id that the caller gave the call."""
    metadata = context.invocation_metadata() or ()
    return next((str(value) for key, value in metadata if key == _REQUEST_ID), "")


def fields_of(request: Any) -> dict[str, Any]:
    """Return what of a request is recorded: names and numbers, by a list of the fields that may be."""
    if not hasattr(request, "DESCRIPTOR"):
        return {}
    found: dict[str, Any] = {}
    detail: dict[str, Value] = {}
    names = {field.name for field in request.DESCRIPTOR.fields}
    for name in names & _NAMED.keys():
        if isinstance(value := getattr(request, name), str) and value:
            found[_NAMED[name]] = value
    if "version" in names and isinstance(request.version, int):
        found["version"] = request.version
    if "rollout" in names and isinstance(request.rollout, str):
        found["rollout"] = request.rollout
    for name in _DETAILS:
        if name in names and (value := _plain(getattr(request, name))):
            detail[name] = value
    if "Rollout" in request.DESCRIPTOR.name and "id" in detail:
        found["rollout"] = str(detail.pop("id"))
    if "files" in names:  # signed metadata, by name and digest
        for file in list(request.files)[:_MAX_ITEMS]:
            detail[str(file.name)] = hashlib.sha256(file.data).hexdigest()
    if "set" in names:
        detail["set"] = ", ".join(f"{key}={value}" for key, value in sorted(request.set.items())[:_MAX_ITEMS])
    return found | ({"detail": detail} if detail else {})


def _plain(value: Any) -> Value:
    if isinstance(value, bool | int | str):
        return value if isinstance(value, str) else int(value)
    if isinstance(value, float):
        return repr(value)
    if hasattr(value, "DESCRIPTOR") or isinstance(value, bytes):
        return ""
    return ", ".join(str(item) for item in list(value)[:_MAX_ITEMS] if isinstance(item, str | int))


def _reason_of_refusal(method: str, error: Exception | None, context: Any) -> str:
    """Return why a call was refused, "" when its end is no refusal."""
    if isinstance(error, _REFUSED):
        return error.reason
    if isinstance(error, NotFoundError):
        # A model of another tenant looks as one that does not exist, and so it does here.
        return error.reason if method.startswith(_INFERENCE) or error.reason == "unknown-model" else ""
    # Whoever refuses ends the call by an exception of grpc's, or sets the status and returns.
    if (error is None or isinstance(error, grpc.aio.AbortError)) and context.code() in _REFUSED_CODES:
        trailing = dict(context.trailing_metadata() or ())
        return str(trailing.get(REASON_KEY, "refused"))
    return ""
