"""A real listener with TLS and a few methods, for tests that set its limits one by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import grpc

from isthmus.status import StatusInterceptor
from isthmus.v1 import fleet_pb2
from security.guard import CallGuard
from security.interceptors import AuthInterceptor
from security.limits import ListenerLimits
from security.listener import Listener
from security.scopes import AUTHENTICATED, PUBLIC
from security.tls import channel_credentials, server_credentials
from security.tokens import TokenIssuer

SERVICE = "test.Limited"
ECHO, BIG, UPLOAD, HOLD, PARSED, KNOWN = (
    f"/{SERVICE}/{name}" for name in ("echo", "big", "upload", "hold", "parsed", "known")
)
SCOPES = {ECHO: PUBLIC, BIG: PUBLIC, UPLOAD: PUBLIC, HOLD: PUBLIC, PARSED: PUBLIC, KNOWN: AUTHENTICATED}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a listener is."""

    address: str
    ca: Path
    token: str
    device_address: str

    def channel(self) -> grpc.aio.Channel:
        """Return a channel of its own connection."""
        options = (("grpc.use_local_subchannel_pool", 1),)
        return grpc.aio.secure_channel(self.address, channel_credentials(self.ca), options=options)

    def device_channel(self, key: Path, certificate: Path) -> grpc.aio.Channel:
        """Return a channel of its own connection, on which a device shows its certificate."""
        credentials = channel_credentials(self.ca, key, certificate)
        return grpc.aio.secure_channel(
            self.device_address, credentials, options=(("grpc.use_local_subchannel_pool", 1),)
        )

    @asynccontextmanager
    async def method(self, kind: str, path: str) -> AsyncIterator[Any]:
        """Yield what calls a method of this kind with bytes, on a connection of its own."""
        async with self.channel() as channel:
            yield getattr(channel, kind)(path)

    async def echo(self, method: str = ECHO, *, token: bool = False) -> bytes:
        """Make one call as well-behaved clients do, on a connection of its own."""
        metadata = (("authorization", f"Bearer {self.token}"),) if token else ()
        async with self.method("unary_unary", method) as call:
            answer: bytes = await call(b"hello", metadata=metadata, timeout=30)
            return answer


async def _echo(request: bytes, _context: Any) -> bytes:
    return request


async def _big(_request: bytes, _context: Any) -> bytes:
    return bytes(4 << 20)


async def _upload(requests: Any, _context: Any) -> bytes:
    return b"%d" % sum([len(request) async for request in requests])


async def _hold(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
    yield b"held"
    await asyncio.Event().wait()


async def _parsed(request: fleet_pb2.EnrolRequest, _context: Any) -> bytes:
    return request.code.encode()


def _service() -> Any:
    unary, parse = grpc.unary_unary_rpc_method_handler, fleet_pb2.EnrolRequest.FromString
    handlers: dict[str, Any] = {
        "echo": unary(_echo),
        "known": unary(_echo),
        "big": unary(_big),
        "upload": grpc.stream_unary_rpc_method_handler(_upload),
        "hold": grpc.unary_stream_rpc_method_handler(_hold),
        "parsed": unary(_parsed, request_deserializer=parse),
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


@asynccontextmanager
async def listening(workspace: Path, limits: ListenerLimits, *, calls: int = 1000) -> AsyncIterator[Place]:
    """Listen on a free port with these limits."""
    cloud = workspace / "cloud"
    issuer = TokenIssuer.load(cloud)
    interceptors = (StatusInterceptor(), AuthInterceptor(issuer.verifier(), SCOPES), CallGuard(limits, SCOPES))
    listener = Listener(limits, message_bytes=8 << 20, calls=calls, interceptors=interceptors, methods=SCOPES)
    listener.add_generic_rpc_handlers((_service(),))
    pair = (cloud / "server.key", cloud / "server.pem")
    port = listener.add_secure_port("127.0.0.1:0", server_credentials(*pair))
    device_port = listener.add_secure_port("127.0.0.1:0", server_credentials(*pair, cloud / "issuing-ca.pem"))
    token, _ = issuer.mint("somebody", "client", models=("*",), ttl=timedelta(minutes=5))
    await listener.start()
    try:
        yield Place(f"127.0.0.1:{port}", workspace / "trust" / "ca.pem", token, f"127.0.0.1:{device_port}")
    finally:
        await listener.stop(None)


def with_listener(workspace: Path, story: Callable[[Place], Awaitable[T]], *, calls: int = 1000, **limits: Any) -> T:
    """Run `story` against a listener with these limits."""

    async def run() -> T:
        async with listening(workspace, ListenerLimits(**limits), calls=calls) as place:
            return await story(place)

    return asyncio.run(run())
