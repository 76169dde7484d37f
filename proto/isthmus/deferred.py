"""Late answers for an application: subscribe to an agent's deferred requests, and see each result once.

    async with DeferredAnswers("127.0.0.1:8001", cursor=Path("cursor.json")) as answers:
        async for answer in answers:
            ...  # answer.request_id, answer.response or answer.reason

An answer counts as handled when the next one is asked for, or when the block is left without an exception. Then the
cursor is written, if there is a file for it, and the agent is told, which removes the result there. So a client that
crashes while it handles an answer gets that one again, and no other. It connects again by itself while it runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc
import structlog

from isthmus.oip import service_pb2
from isthmus.status import from_rpc
from isthmus.v1 import agent_pb2, agent_pb2_grpc

_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
_ACKNOWLEDGE_S: Final = 5.0
# What another attempt would be told again.
_FINAL: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 310_000),  # the agent's server refuses pings that come more often than every 5 minutes
)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LateAnswer:
    """The result of one deferred request."""

    sequence: int
    request_id: str  # the caller's
    response: Any | None  # ModelInferResponse; tritonclient's InferResult reads it. None when there is no answer
    reason: str = ""  # why there is none: "refused", "expired", "evicted" or "damaged"
    message: str = ""


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last result that was handled."""

    store: str = ""
    sequence: int = 0


class DeferredAnswers:
    """An asynchronous iterator over the results of one queue; it never ends by itself.

    Args:
        address: HOST:PORT or unix:PATH of the agent.
        queue: What the requests named in `isthmus.queue`.
        cursor: File that remembers the last handled result across runs of the client.
        credentials: Of an agent that listens with TLS.
        token: Returns the access token that such an agent wants.
    """

    def __init__(
        self,
        address: str,
        *,
        queue: str = "default",
        cursor: Path | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        token: Callable[[], str] | None = None,
    ) -> None:
        self._address = address
        self._queue = queue
        self._file = cursor
        self._credentials = credentials
        self._token = token
        self._cursor = Cursor() if cursor is None else read_cursor(cursor)
        self._handing: Cursor | None = None  # the result that the caller has and has not handled yet
        self._channel: grpc.aio.Channel | None = None
        self._stream: Any = None
        self._pause_s = _FIRST_PAUSE_S

    @property
    def cursor(self) -> Cursor:
        """Return the last result that was handled."""
        return self._cursor

    async def __aenter__(self) -> Self:
        if self._credentials is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(self._address, self._credentials, options=_OPTIONS)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self._handled()
        finally:
            if self._stream is not None:
                self._stream.cancel()
            if self._channel is not None:
                await self._channel.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> LateAnswer:
        """Return the next result, however long it takes.

        Raises:
            IsthmusError: The agent refuses this client for good.
        """
        await self._handled()
        while True:
            response = await self._read()
            if response is None:
                await asyncio.sleep(self._pause_s * (1.0 - 0.5 * random.random()))  # noqa: S311  # no secret
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
                continue
            self._pause_s = _FIRST_PAUSE_S
            place = Cursor(response.store, response.sequence)
            if place.store != self._cursor.store or place.sequence > self._cursor.sequence:
                self._handing = place
                return _late_answer(response)

    async def _read(self) -> agent_pb2.WatchDeferredResponse | None:
        try:
            if self._stream is None:
                await self._acknowledge()  # what was handled and not told, when the agent or this client went away
                request = agent_pb2.WatchDeferredRequest(
                    queue=self._queue, after=self._cursor.sequence, store=self._cursor.store
                )
                self._stream = self._stub().WatchDeferred(request, metadata=self._metadata(), wait_for_ready=True)
            response = await self._stream.read()
        except grpc.aio.AioRpcError as error:
            self._stream = None
            if error.code() in _FINAL:
                raise from_rpc(error, f"deferred answers of the agent at {self._address}") from error
            log.debug("stream of deferred answers lost", code=error.code().name)
            return None
        if isinstance(response, agent_pb2.WatchDeferredResponse):
            return response
        self._stream = None  # the agent stops
        return None

    async def _handled(self) -> None:
        if self._handing is None:
            return
        if self._file is not None:
            await asyncio.to_thread(write_cursor, self._file, self._handing)
        self._cursor, self._handing = self._handing, None
        await self._acknowledge()

    async def _acknowledge(self) -> None:
        if not self._cursor.sequence:
            return
        request = agent_pb2.AcknowledgeDeferredRequest(
            queue=self._queue, sequence=self._cursor.sequence, store=self._cursor.store
        )
        try:
            await self._stub().AcknowledgeDeferred(request, metadata=self._metadata(), timeout=_ACKNOWLEDGE_S)
        except grpc.aio.AioRpcError as error:  # the next one says it again: acknowledgements are cumulative
            log.debug("deferred answer not acknowledged", code=error.code().name)

    def _stub(self) -> Any:
        if self._channel is None:
            raise RuntimeError("expected to be used as `async with DeferredAnswers(...) as answers`")
        return agent_pb2_grpc.AgentServiceStub(self._channel)

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self._token is None else (("authorization", f"Bearer {self._token()}"),)


def read_cursor(path: Path) -> Cursor:
    """Return the cursor in the file; the start when there is no file, or not a cursor in it."""
    try:
        told = json.loads(path.read_bytes())
        return Cursor(str(told["store"]), int(told["sequence"]))
    except FileNotFoundError:
        return Cursor()
    except (ValueError, KeyError, TypeError):
        log.warning("not a cursor; starting anew", file=str(path))
        return Cursor()


def write_cursor(path: Path, cursor: Cursor) -> None:
    """Replace the cursor in the file: after a power cut it holds the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(json.dumps({"store": cursor.store, "sequence": cursor.sequence}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _late_answer(response: agent_pb2.WatchDeferredResponse) -> LateAnswer:
    if response.WhichOneof("outcome") == "failure":
        failure = response.failure
        return LateAnswer(response.sequence, response.request_id, None, failure.reason, failure.message)
    answer = service_pb2.ModelInferResponse.FromString(response.answer)
    return LateAnswer(response.sequence, response.request_id, answer)
