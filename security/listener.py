"""The server behind every gRPC listener of this project: one that nobody can end, or fill, from outside.

Its limits are `security.limits`; what gRPC's core cannot do for one call does `security.guard`.
"""

# ruff: noqa: SLF001 - the accept loop puts grpc.aio's own parts together in another way

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # compiled, without types

from isthmus.errors import OverloadedError
from isthmus.memory import give_back
from isthmus.status import MethodInterceptor, end_call, refuse
from security.limits import ListenerLimits
from security.scopes import METHOD_SCOPES


class _Core(cygrpc.AioServer):  # type: ignore[misc]  # compiled, without types
    """grpc.aio's server with an accept loop of our own, because of two of its habits (seen with grpcio 1.80 to 1.85).

    It decodes the name of the method of each call, outside of anything that would catch the error: one call to a method
    whose name is not UTF-8, from anybody who can connect, shuts the whole server down. Here the core matches the names,
    as bytes, against those of the methods that exist; whatever else is called is answered with UNIMPLEMENTED without a
    look at it.

    And it leaves the metadata of every call in a reference cycle, until the garbage collector comes by. A header that
    is named again and again (HPACK) makes 16 MB of 16 KB.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, interceptors: Sequence[MethodInterceptor], options: Any, calls: int
    ) -> None:
        super().__init__(loop, None, (), (), options, None)
        self.event_loop, self.calls_limit, self.calls = loop, calls, 0
        self.interceptors = tuple(interceptors)
        # The places of those that may refuse, the last one first: what a call costs before its token is looked at.
        self.checks = [
            number
            for number, interceptor in enumerate(self.interceptors)
            if type(interceptor).refusal is not MethodInterceptor.refusal
        ][::-1]
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
            handler = None if full or self.interceptors else self.handlers.get(name)
            if handler is None:
                serving = self._serve(name, state, full=full)
            else:  # nothing has to see the call before it is served
                serve = _SERVE[handler.request_streaming, handler.response_streaming]
                serving = serve(handler, state, self.event_loop)
            call = cygrpc._schedule_rpc_coro(serving, state, self.event_loop, name)
            if full:
                self._keep(call)
                continue
            self.calls += 1
            task = self.event_loop.create_task(call)
            self.running.add(task)
            task.add_done_callback(self._ended)

    async def _serve(self, name: str, state: Any, *, full: bool) -> None:
        context = cygrpc._ServicerContext(state, None, None, self.event_loop)
        if name not in self.handlers:
            await end_call(context, grpc.StatusCode.UNIMPLEMENTED, "there is no such method")
        if full:
            await refuse(context, OverloadedError("too many calls are in progress", reason="too-many-calls"))
        handler = self._refusal(_Details(name, context.invocation_metadata())) or self.handlers[name]
        del context  # streams live for hours, and grpc makes one of its own
        serve = _SERVE[handler.request_streaming, handler.response_streaming]
        await serve(handler, state, self.event_loop)

    def _refusal(self, details: _Details) -> Any:
        """Return what refuses a call: the interceptor that does, as those in front of it see it; None serves it."""
        for number in self.checks:
            handler = self.interceptors[number].refusal(details)
            if handler is not None:
                for interceptor in reversed(self.interceptors[:number]):
                    handler = interceptor.wrap_refusal(details.method, handler)
                return handler
        return None

    def wrapped(self, method: str, handler: Any, number: int) -> Any:
        """Return what the first interceptors make of a handler."""
        for interceptor in reversed(self.interceptors[:number]):
            handler = interceptor.wrap(method, handler)
        return handler

    def _keep(self, work: Any) -> asyncio.Task[Any]:
        task = self.event_loop.create_task(work)
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.running.discard(task)
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
        interceptors: What they make of a method's handler serves its calls; the first one sees them first.
        methods: The full paths of the methods that may exist.
    """

    def __init__(
        self,
        limits: ListenerLimits,
        *,
        message_bytes: int,
        calls: int,
        interceptors: Sequence[MethodInterceptor] = (),
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
                self._server.handlers[method] = self._server.wrapped(method, handler, len(self._server.interceptors))
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
