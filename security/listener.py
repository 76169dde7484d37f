"""What every gRPC listener of this project is made of: its limits, and a server that nobody can end from outside.

Limits that gRPC's C core enforces are options of the server; `ListenerLimits.options` is the one place that names them.
What the core cannot do is done by `security.guard` for each call, or is left to the firewall (docs/deployment.md).
"""

# ruff: noqa: SLF001 - the accept loop puts grpc.aio's own parts together in another way

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import grpc
import structlog
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # compiled, without types
from pydantic import BaseModel, ConfigDict, Field

from isthmus.errors import OverloadedError
from isthmus.memory import give_back
from isthmus.status import end_call, refuse
from security.scopes import METHOD_SCOPES

log = structlog.get_logger(__name__)

_RESERVED_FILES: Final = 128  # descriptors that connections never get: databases, models, logs, children
_FEWEST_CONNECTIONS: Final = 16
_MOST_WAITING: Final = 512


class ListenerLimits(BaseModel):
    """What one listener takes from whoever connects: the table `[listener]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    connections: int = Field(default=1024, ge=1, le=1 << 20, description="Open connections; more are closed at once.")
    streams: int = Field(default=256, ge=1, le=1 << 16, description="Calls in progress on one connection.")
    metadata_bytes: int = Field(
        default=16 << 10, ge=8 << 10, le=1 << 20, description="Largest metadata of one call, bytes."
    )
    handshake_s: float = Field(default=10.0, gt=0, le=600, description="Time for TLS and HTTP/2 to begin, seconds.")
    idle_s: float = Field(default=900.0, ge=1, le=604_800, description="Life of a connection without calls, seconds.")
    age_s: float = Field(
        default=3600.0, ge=0, le=604_800, description="Life of a connection, seconds; 0 for no end. Clients reconnect."
    )
    age_grace_s: float = Field(
        default=60.0, ge=1, le=3600, description="Time for the calls of a connection that is too old, seconds."
    )
    keepalive_s: float = Field(
        default=60.0, ge=1, le=7200, description="A connection that was silent for so long is asked for a sign of life."
    )
    keepalive_timeout_s: float = Field(default=20.0, ge=1, le=600, description="Time for that sign, seconds.")
    ping_interval_s: float = Field(
        default=10.0, ge=0, le=600, description="Shortest time between a client's pings; more are strikes, two end it."
    )
    request_s: float = Field(default=60.0, gt=0, le=3600, description="Time for one request to come, seconds.")
    stream_idle_s: float = Field(
        default=60.0, gt=0, le=86_400, description="Time for the next message of an upload to come, seconds."
    )
    caller_calls: int = Field(default=512, ge=1, le=1 << 16, description="Calls in progress of one token's subject.")
    peer_calls: int = Field(default=16, ge=1, le=1 << 16, description="Calls in progress of one address, no token.")
    stranger_calls: int = Field(default=64, ge=1, le=1 << 16, description="Calls in progress without a token, in all.")

    def options(self, message_bytes: int, calls: int) -> list[tuple[str, int]]:
        """Return the server's options for gRPC.

        Args:
            message_bytes: Largest message, either way.
            calls: Calls in progress.
        """
        waiting = min(calls, _MOST_WAITING)
        options = [
            ("grpc.so_reuseport", 0),  # a second server on the port must fail, not take half of the calls
            ("grpc.max_receive_message_length", message_bytes),
            ("grpc.max_send_message_length", message_bytes),
            # Without the second one, sizes between the two are refused at random.
            ("grpc.max_metadata_size", self.metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.metadata_bytes),
            ("grpc.max_allowed_incoming_connections", allowed_connections(self.connections)),
            ("grpc.max_concurrent_streams", self.streams),
            # Buffers that every connection has; they grow with what comes.
            ("grpc.tsi.max_frame_size", 4096),
            ("grpc.experimental.tcp_min_read_chunk_size", 1024),
            ("grpc.experimental.tcp_read_chunk_size", 1024),
            # Calls that nobody has looked at yet, each with its metadata in memory; from the first number on some are
            # refused, from the second on all.
            ("grpc.server.max_pending_requests", waiting),
            ("grpc.server.max_pending_requests_hard_limit", 2 * waiting),
            ("grpc.server_handshake_timeout_ms", _ms(self.handshake_s)),
            ("grpc.max_connection_idle_ms", _ms(self.idle_s)),
            ("grpc.keepalive_time_ms", _ms(self.keepalive_s)),
            ("grpc.keepalive_timeout_ms", _ms(self.keepalive_timeout_s)),
            ("grpc.http2.min_ping_interval_without_data_ms", _ms(self.ping_interval_s)),
            ("grpc.http2.max_ping_strikes", 2),
        ]
        if self.age_s:
            options.append(("grpc.max_connection_age_ms", _ms(self.age_s)))
            options.append(("grpc.max_connection_age_grace_ms", _ms(self.age_grace_s)))
        return options


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def allowed_connections(wanted: int) -> int:
    """Return how many connections this process can hold, at most `wanted`, and never so many that files run out.

    The limit of open files is raised as far as the system lets this process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _RESERVED_FILES
    if soft < needed and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))
        soft = min(needed, hard)
    if soft >= needed:
        return wanted
    allowed = max(_FEWEST_CONNECTIONS, soft - _RESERVED_FILES)
    if allowed < wanted:
        log.warning("fewer connections than configured: too few open files", allowed=allowed, wanted=wanted, files=soft)
    return min(wanted, allowed)


class _Core(cygrpc.AioServer):  # type: ignore[misc]  # compiled, without types
    """grpc.aio's server with an accept loop of our own, because of two of its habits (seen with grpcio 1.80 to 1.85).

    It decodes the name of the method of each call, outside of anything that would catch the error: one call to a method
    whose name is not UTF-8, from anybody who can connect, shuts the whole server down. Here the core matches the names,
    as bytes, against those of the methods that exist; whatever else is called is answered with UNIMPLEMENTED without a
    look at it.

    And it leaves the metadata of every call in a reference cycle, until the garbage collector comes by. A header that
    is named again and again (HPACK) makes 16 MB of 16 KB.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interceptors: Sequence[Any], options: Any, calls: int) -> None:
        super().__init__(loop, None, (), (), options, None)
        self.event_loop, self.calls_limit, self.calls = loop, calls, 0
        self.interceptors = tuple(interceptors)
        self.handlers: dict[str, Any] = {}
        self.running = set[asyncio.Task[Any]]()

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """Accept calls of one method, or of all unknown ones, until the server stops; then the future fails."""
        ended: asyncio.Future[Any] = self.event_loop.create_future()
        self._keep(self._accept(method, ended))
        return ended

    async def _accept(self, method: bytes | None, ended: asyncio.Future[Any]) -> None:
        name = "" if method is None else method.decode()
        while True:
            try:
                state = await (self._request_call() if method is None else self._request_registered_call(method))
            except cygrpc._RequestCallError as error:
                if self.is_running():
                    continue
                if not ended.done():
                    ended.set_exception(error)
                return
            full = self.calls >= self.calls_limit
            serving = self._serve(name, state, full=full)
            task = self._keep(cygrpc._schedule_rpc_coro(serving, state, self.event_loop, name))
            if not full:
                self.calls += 1
                task.add_done_callback(self._ended)

    async def _serve(self, name: str, state: Any, *, full: bool) -> None:
        context = cygrpc._ServicerContext(state, None, None, self.event_loop)
        if name not in self.handlers:
            await end_call(context, grpc.StatusCode.UNIMPLEMENTED, "there is no such method")
        if full:
            await refuse(context, OverloadedError("too many calls are in progress", reason="too-many-calls"))
        handler = await self._intercepted(0, _Details(name, context.invocation_metadata()))
        serve = _SERVE[handler.request_streaming, handler.response_streaming]
        await serve(handler, state, self.event_loop)

    async def _intercepted(self, number: int, details: _Details) -> Any:
        if number == len(self.interceptors):
            return self.handlers[details.method]
        return await self.interceptors[number].intercept_service(partial(self._intercepted, number + 1), details)

    def _keep(self, work: Any) -> asyncio.Task[Any]:
        task = self.event_loop.create_task(work)
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task

    def _ended(self, _task: asyncio.Task[Any]) -> None:
        self.calls -= 1


class _Details(grpc.HandlerCallDetails):
    """What interceptors and services see of a call before it is served."""

    def __init__(self, method: str, metadata: Any = ()) -> None:
        self.method, self.invocation_metadata = method, metadata


_SERVE: Final[Mapping[tuple[bool, bool], Any]] = {
    (False, False): cygrpc._handle_unary_unary_rpc,
    (False, True): cygrpc._handle_unary_stream_rpc,
    (True, False): cygrpc._handle_stream_unary_rpc,
    (True, True): cygrpc._handle_stream_stream_rpc,
}


class Listener(grpc.aio.Server):
    """A grpc.aio server for the methods of a table, and for no others.

    Args:
        limits: What it takes from whoever connects.
        message_bytes: Largest message.
        calls: Calls in progress; more are refused with RESOURCE_EXHAUSTED.
        interceptors: Run before every call.
        methods: The full paths of the methods that may exist.
    """

    def __init__(
        self,
        limits: ListenerLimits,
        *,
        message_bytes: int,
        calls: int,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        methods: Iterable[str] = METHOD_SCOPES,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._server: Any = _Core(self._loop, interceptors, tuple(limits.options(message_bytes, calls)), calls)
        self._methods = tuple(methods)
        self._generic: list[Any] = []
        self._memory: asyncio.Task[None] | None = None

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Add services; those of their methods that are not in the table do not exist."""
        self._generic.extend(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        """Ignore what generated code adds here: it adds the same as generic handlers."""

    def add_insecure_port(self, address: str) -> int:
        """Bind an address in plain text; return its port.

        Raises:
            RuntimeError: It cannot be bound (so below).
        """
        return _bound(address, self._server.add_insecure_port(address.encode()))

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """Bind an address with TLS; return its port."""
        return _bound(address, self._server.add_secure_port(address.encode(), server_credentials))

    async def start(self) -> None:
        """Listen."""
        for method in self._methods:
            details = _Details(method)
            handler = next((h for g in self._generic if (h := g.service(details)) is not None), None)
            if handler is not None:
                self._server.handlers[method] = handler
        self._server.add_registered_method_handlers(self._server.handlers)
        await self._server.start()
        self._memory = asyncio.create_task(give_back(), name="memory")

    async def stop(self, grace: float | None) -> None:
        """Take no new calls; give those in progress `grace` seconds."""
        if self._memory is not None:
            self._memory.cancel()
        await self._server.shutdown(grace)

    async def wait_for_termination(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - grpc's interface
        """Wait until the server has stopped; return whether the time ran out before that."""
        return bool(await self._server.wait_for_termination(timeout))

    def __del__(self) -> None:
        """Stop what nobody stopped, as grpc.aio's own server does: the core must not outlive its event loop."""
        if hasattr(self, "_server") and self._server.is_running() and not self._loop.is_closed():
            cygrpc.schedule_coro_threadsafe(self._server.shutdown(None), self._loop)


def _bound(address: str, port: int) -> int:
    if port == 0:
        raise RuntimeError(f"cannot bind {address}")
    return port
