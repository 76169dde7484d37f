"""Whoever sits between: a proxy that records the bytes of connections, and one that ends TLS and sees the messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from security.tls import server_credentials


class TcpTap:
    """Forwards connections to `target`, which may change, and keeps every byte that passes, in either direction."""

    def __init__(self) -> None:
        self.target = ""
        self.seen = bytearray()
        self.address = ""
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def cut(self) -> None:
        """Be gone, as a network that is down."""
        if self._server is not None:
            self._server.close()
            for writer in tuple(self._writers):
                writer.close()
            self._server = None

    async def mend(self) -> None:
        """Be there again, at the same address."""
        await self.start(int(self.address.rpartition(":")[2]))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            host, _, port = self.target.rpartition(":")
            up_reader, up_writer = await asyncio.open_connection(host, int(port))
        except (OSError, ValueError):
            writer.close()
            return
        self._writers |= {writer, up_writer}
        await asyncio.gather(self._pump(reader, up_writer), self._pump(up_reader, writer))
        self._writers -= {writer, up_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.seen += data
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


class Middlebox(grpc.GenericRpcHandler):
    """Ends TLS with a certificate for the cloud's name, and forwards every message, which it can read and keeps."""

    def __init__(self, upstream: grpc.aio.Channel) -> None:
        self._upstream = upstream
        self.seen: list[tuple[str, bytes]] = []

    def service(self, details: Any) -> Any:
        async def forward(requests: Any, context: Any) -> AsyncIterator[bytes]:
            kept = {"authorization", "x-request-id", "isthmus-tenant"}
            metadata = [(key, value) for key, value in context.invocation_metadata() if key in kept]

            async def noted() -> AsyncIterator[bytes]:
                async for request in requests:
                    self.seen.append((details.method, request))
                    yield request

            left = context.time_remaining()
            upstream: Any = self._upstream.stream_stream(details.method)  # bytes in, bytes out
            call = upstream(noted(), metadata=metadata, timeout=left)
            try:
                async for answer in call:
                    self.seen.append((details.method, answer))
                    yield answer
            except grpc.aio.AioRpcError as error:
                context.set_trailing_metadata(tuple((k, v) for k, v in error.trailing_metadata() if k != "grpc-status"))
                context.set_code(error.code())
                context.set_details(error.details())
            finally:
                call.cancel()

        return grpc.stream_stream_rpc_method_handler(forward)

    def messages(self, method: str) -> list[bytes]:
        """Return what passed of one method."""
        return [data for name, data in self.seen if name == method]


@asynccontextmanager
async def middlebox(
    target: str, ca: Path, server: tuple[Path, Path], device: tuple[Path, Path]
) -> AsyncIterator[tuple[Middlebox, str]]:
    """Run one in front of a cloud.

    Args:
        target: The cloud's address.
        ca: What it trusts.
        server: Key and certificate that it shows, good for the cloud's name.
        device: Key and certificate of the device whose calls it forwards, for a cloud that asks for it.
    """
    key, chain = (file.read_bytes() for file in device)
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key, chain)
    async with grpc.aio.secure_channel(target, credentials) as upstream:
        box = Middlebox(upstream)
        listener = grpc.aio.server()
        listener.add_generic_rpc_handlers((box,))
        port = listener.add_secure_port("127.0.0.1:0", server_credentials(*server))
        await listener.start()
        try:
            yield box, f"127.0.0.1:{port}"
        finally:
            await listener.stop(0)
