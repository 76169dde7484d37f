"""Results to clients: the methods of AgentService that are about deferred requests.

A subscriber gets the results of one queue in order, each read from the disk when the one before has been sent, so a
slow one holds one result in memory. Several subscribers of a queue each get all results that nobody has acknowledged
yet; one that acknowledges removes them for all. Streams end, without an error, when the agent stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

import grpc
import structlog
from google.protobuf.message import Message

from edge.deferred.deferral import Deferral
from edge.deferred.store import ReadResult
from edge.deferred.wish import check_queue
from edge.messages import parse_message, serialize_message
from isthmus.errors import ConfigError, UnavailableError
from isthmus.v1 import agent_pb2

_WATCH: Final = "WatchDeferred"
_METHODS: Final = (_WATCH, "AcknowledgeDeferred", "ListDeferred", "PurgeDeferred")
_MOST_STREAMS: Final = 16  # each takes one of the calls that may be in progress

Q = TypeVar("Q", bound=Message)
T = TypeVar("T")
log = structlog.get_logger(__name__)


class DeferredService:
    """Implements the methods.

    Args:
        deferral: Where the results are.
    """

    def __init__(self, deferral: Deferral) -> None:
        self._deferral = deferral
        self._stopping = asyncio.Event()
        self._streams = 0

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[bytes, Any]]:
        """Return the table of methods."""
        return {
            _WATCH: grpc.unary_stream_rpc_method_handler(self._watch_raw, response_serializer=serialize_message),
            "AcknowledgeDeferred": _unary(agent_pb2.AcknowledgeDeferredRequest, self.acknowledge),
            "ListDeferred": _unary(agent_pb2.ListDeferredRequest, self.list_queues),
            "PurgeDeferred": _unary(agent_pb2.PurgeDeferredRequest, self.purge),
        }

    def stop(self) -> None:
        """End all streams, and new ones at once."""
        self._stopping.set()

    async def watch(self, request: agent_pb2.WatchDeferredRequest) -> AsyncIterator[agent_pb2.WatchDeferredResponse]:
        """Send a queue's results after the given sequence, those that are there and those that come."""
        queue = self._deferral.queue(check_queue(request.queue, "queue"))
        after = request.after if request.store == self._deferral.id else 0
        if self._streams >= _MOST_STREAMS:
            raise UnavailableError(f"expected at most {_MOST_STREAMS} subscribers at a time", reason="overloaded")
        self._streams += 1
        try:
            while not self._stopping.is_set():
                changed = self._deferral.changed
                result = await self._deferral.next_result(queue, after)
                if result is None:
                    await self._first_of(changed, self._stopping)
                    continue
                yield _message(self._deferral.id, result)
                after = result.sequence
                self._deferral.counters.delivered += 1
        finally:
            self._streams -= 1

    async def acknowledge(self, request: agent_pb2.AcknowledgeDeferredRequest) -> agent_pb2.AcknowledgeDeferredResponse:
        """Remove a queue's results up to a sequence; sequences of another store mean nothing here."""
        queue = self._deferral.queue(check_queue(request.queue, "queue"))
        removed = 0
        if request.store == self._deferral.id:
            removed = await _written(self._deferral.acknowledge(queue, request.sequence))
        return agent_pb2.AcknowledgeDeferredResponse(removed=removed)

    async def list_queues(self, request: agent_pb2.ListDeferredRequest) -> agent_pb2.ListDeferredResponse:
        """Count what the caller's queues hold."""
        del request
        response = agent_pb2.ListDeferredResponse(store=self._deferral.id)
        for count in self._deferral.counts():
            response.queues.add(
                queue=count.queue,
                pending=count.pending,
                results=count.results,
                first_sequence=count.first_sequence,
                last_sequence=count.last_sequence,
            )
        return response

    async def purge(self, request: agent_pb2.PurgeDeferredRequest) -> agent_pb2.PurgeDeferredResponse:
        """Forget all that a queue of the caller holds."""
        queue = self._deferral.queue(check_queue(request.queue, "queue"))
        pending, results = await _written(self._deferral.purge(queue))
        return agent_pb2.PurgeDeferredResponse(pending=pending, results=results)

    async def _watch_raw(self, raw: bytes, context: Any) -> AsyncIterator[agent_pb2.WatchDeferredResponse]:
        request = parse_message(agent_pb2.WatchDeferredRequest, raw)
        await context.send_initial_metadata(())  # tells the client that it is subscribed, before there is a result
        async for response in self.watch(request):
            yield response

    @staticmethod
    async def _first_of(*events: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


def absent_handlers() -> dict[str, grpc.RpcMethodHandler[bytes, Any]]:
    """Return the table of methods of an agent that does not defer: each says so."""

    async def refuse(raw: bytes, context: Any) -> Any:
        del raw, context
        raise ConfigError("this agent does not defer requests", hint="run it with the setting `defer = true`")

    unary: grpc.RpcMethodHandler[bytes, Any] = grpc.unary_unary_rpc_method_handler(refuse)
    stream: grpc.RpcMethodHandler[bytes, Any] = grpc.unary_stream_rpc_method_handler(refuse)
    return {name: stream if name == _WATCH else unary for name in _METHODS}


async def _written(action: Awaitable[T]) -> T:
    try:
        return await action
    except OSError as error:
        log.warning("disk refuses a change of deferred requests", error=str(error))
        raise UnavailableError("the disk cannot take this now", reason="disk") from error


def _unary(kind: type[Q], method: Callable[[Q], Awaitable[Any]]) -> grpc.RpcMethodHandler[bytes, Any]:
    async def call(raw: bytes, context: Any) -> Any:
        del context
        return await method(parse_message(kind, raw))

    handler: grpc.RpcMethodHandler[bytes, Any] = grpc.unary_unary_rpc_method_handler(
        call, response_serializer=serialize_message
    )
    return handler


def _message(store: str, result: ReadResult) -> agent_pb2.WatchDeferredResponse:
    response = agent_pb2.WatchDeferredResponse(store=store, sequence=result.sequence, request_id=result.id)
    if result.reason:
        response.failure.reason, response.failure.message = result.reason, result.message
    else:
        response.answer = result.answer
    return response
