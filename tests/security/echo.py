"""A real TLS server with one method of each kind; each answers who called it and over what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc

from isthmus.status import StatusInterceptor
from security.interceptors import current_claims
from security.tls import channel_credentials, negotiated, server_credentials

SERVICE = "test.Echo"
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
METHOD_SCOPES = {f"/{SERVICE}/{kind}": "infer" for kind in KINDS} | {
    f"/{SERVICE}/public": "public",
    f"/{SERVICE}/authenticated": "authenticated",
    f"/{SERVICE}/writes": "infer",
}
T = TypeVar("T")


async def _answer(context: Any) -> bytes:
    await asyncio.sleep(0)  # give other calls a chance to mix up whose claims are current
    return f"{current_claims().subject} {' '.join(negotiated(context))}".encode()


async def _unary(request: Any, context: Any) -> bytes:
    if not isinstance(request, bytes):
        async for _ in request:
            pass
    return await _answer(context)


async def _stream(request: Any, context: Any) -> AsyncIterator[bytes]:
    yield await _unary(request, context)
    yield await _answer(context)


async def _writes(request: Any, context: Any) -> None:
    await context.write(await _unary(request, context))


async def _public(request: bytes, context: Any) -> bytes:
    return request


def _handlers() -> grpc.GenericRpcHandler:
    methods: dict[str, Any] = {
        "unary_unary": grpc.unary_unary_rpc_method_handler(_unary),
        "unary_stream": grpc.unary_stream_rpc_method_handler(_stream),
        "stream_unary": grpc.stream_unary_rpc_method_handler(_unary),
        "stream_stream": grpc.stream_stream_rpc_method_handler(_stream),
        "writes": grpc.unary_stream_rpc_method_handler(_writes),
        "public": grpc.unary_unary_rpc_method_handler(_public),
        "public_claims": grpc.unary_unary_rpc_method_handler(_unary),
        "authenticated": grpc.unary_unary_rpc_method_handler(_unary),
        "unlisted": grpc.unary_unary_rpc_method_handler(_unary),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


@asynccontextmanager
async def serving(cloud: Path, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> AsyncIterator[int]:
    """Serve on a free port with the TLS identity in `cloud`; yield the port."""
    server = grpc.aio.server(interceptors=[StatusInterceptor(), *interceptors])
    server.add_generic_rpc_handlers((_handlers(),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(cloud / "server.key", cloud / "server.pem"))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def call(
    channel: grpc.aio.Channel, kind: str, token: str | None, *, method: str = "", request: bytes = b"hello"
) -> list[bytes]:
    """Call the method of this kind; return its answers."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    stub: Any = getattr(channel, kind)(f"/{SERVICE}/{method or kind}")
    argument = iter([request, request]) if kind.startswith("stream") else request
    started = stub(argument, metadata=metadata, timeout=20)
    if kind.endswith("unary"):
        return [await started]
    return [answer async for answer in started]


def refused_status(ca: Path, port: int, kind: str, token: str | None, method: str = "") -> grpc.Call:
    """Call a method that refuses and return the call, which knows the status; blocking.

    grpc's synchronous client, because its asyncio client may show INTERNAL in place of the status of a call that ends
    while requests are still being written (grpc issue 36066).
    """
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.secure_channel(f"127.0.0.1:{port}", channel_credentials(ca)) as channel:
        stub: Any = getattr(channel, kind)(f"/{SERVICE}/{method or kind}")
        argument = iter([b"one", b"two"]) if kind.startswith("stream") else b"one"
        try:
            answer = stub(argument, metadata=metadata, timeout=20)
            answers = [answer] if kind.endswith("unary") else list(answer)
        except grpc.RpcError as error:
            return cast("grpc.Call", error)
    raise AssertionError(f"{method or kind} answered {answers}")


def with_server(
    workspace: Path,
    interceptors: Sequence[grpc.aio.ServerInterceptor],
    story: Callable[[grpc.aio.Channel, int], Awaitable[T]],
) -> T:
    """Run `story` with a channel to a server of its own."""

    async def run() -> T:
        async with serving(workspace / "cloud", interceptors) as port:
            credentials = channel_credentials(workspace / "trust" / "ca.pem")
            async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
                return await story(channel, port)

    return asyncio.run(run())
