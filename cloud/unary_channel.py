"""Unary gRPC calls to one server over a connection that is made when it is needed, and made again when it was lost.

As gRPC's channels do it: while the server cannot be reached, calls fail at once, and after each attempt the next one is
put off, up to half a second; a call that the server certainly has not run is sent again by itself.
"""

from __future__ import annotations

import asyncio
import contextvars
import socket
from pathlib import Path
from typing import Final

import grpc
import structlog

from cloud import http2
from cloud.http2_link import Link
from cloud.unary_call import CallError
from isthmus.address import UNIX, split_address
from security.tls import client_context

_CONNECT_S: Final = 5.0
_FIRST_PAUSE_S: Final = 0.05
_MOST_PAUSE_S: Final = 0.5
_POLL_S: Final = 0.05
_TRIES: Final = 3
_SILENT_MS: Final = 20_000  # after which a connection that acknowledges nothing is given up

log = structlog.get_logger(__name__)


class UnaryChannel:
    """See the module; lives in one event loop.

    Args:
        address: HOST:PORT or unix:PATH.
        ca: Certificate of the authority that the server has its own from; None for plain text.
        most_bytes: Largest answer.
    """

    def __init__(self, address: str, *, ca: Path | None, most_bytes: int) -> None:
        self._address, self._most_bytes = address, most_bytes
        self._tls = None if ca is None else client_context(ca)
        authority = "localhost" if address.startswith(UNIX) else address
        self._common = (b"\x86" if self._tls is None else b"\x87") + http2.literal(b":authority", authority.encode())
        self._heads: dict[str, bytes] = {}
        self._link: Link | None = None
        self._closing: list[Link] = []  # with calls that the server still answers
        self._connecting: asyncio.Task[Link | None] | None = None
        self._pause_s, self._again_at = 0.0, 0.0
        self._closed = False

    async def call(self, method: str, message: bytes, *, timeout_s: float) -> bytes:
        """Return the serialized answer to a serialized request.

        Args:
            method: Full path of the method.
            message: The request.
            timeout_s: Time for it, with connecting.

        Raises:
            CallError: It ended otherwise.
        """
        head = self._heads.get(method) or self._head(method)
        until = asyncio.get_running_loop().time() + timeout_s
        left_s, tries = timeout_s, 1
        while True:
            link = self._link
            if link is None or not link.usable:
                link = await self._connected(left_s)
                left_s = until - asyncio.get_running_loop().time()
            try:
                return await link.call(head, message, left_s)
            except CallError as error:
                left_s = until - asyncio.get_running_loop().time()
                if not error.unsent or tries == _TRIES or left_s <= 0:
                    raise
            tries += 1

    async def wait_until_connected(self, timeout_s: float) -> None:
        """Wait until there is a connection, however often that takes an attempt.

        Raises:
            TimeoutError: There is none in time.
        """
        async with asyncio.timeout(timeout_s):
            while self._link is None or not self._link.usable:
                if self._closed:
                    raise TimeoutError
                self._again_at = 0.0
                try:
                    await self._connected(timeout_s)
                except CallError:
                    await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        """Close the connection; calls that run fail."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait((self._connecting,))
        for link in (*self._closing, *filter(None, (self._link,))):
            await link.close()

    def _head(self, method: str) -> bytes:
        """Return the header block of calls of a method, which ends where the time limit comes."""
        fields = ((b":path", method.encode()), (b"te", b"trailers"), (b"content-type", b"application/grpc"))
        path, *rest = (http2.literal(*field) for field in fields)
        head = self._heads[method] = b"".join((b"\x83", self._common, path, *rest))  # 0x83 is POST
        return head

    async def _connected(self, timeout_s: float) -> Link:
        loop = asyncio.get_running_loop()
        if self._closed or (self._connecting is None and loop.time() < self._again_at):
            raise CallError(grpc.StatusCode.UNAVAILABLE, "not connected", unsent=True)
        if self._connecting is None:
            # In a context of its own: the connection outlives the call that it is made for, and its credential.
            self._connecting = loop.create_task(
                self._connect(), name=f"connect-{self._address}", context=contextvars.Context()
            )
        try:
            async with asyncio.timeout(timeout_s):
                link = await asyncio.shield(self._connecting)
        except TimeoutError as error:
            raise CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "no connection in time") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if self._closed and (task is None or not task.cancelling()):  # not the caller was cancelled
                raise CallError(grpc.StatusCode.UNAVAILABLE, "closed", unsent=True) from error
            raise
        if link is None:
            raise CallError(grpc.StatusCode.UNAVAILABLE, "not connected", unsent=True)
        return link

    async def _connect(self) -> Link | None:
        """Return a new connection; None puts the next attempt off."""
        loop = asyncio.get_running_loop()
        link: Link | None = None
        try:
            async with asyncio.timeout(_CONNECT_S):
                transport, link = await self._open()
                tls = transport.get_extra_info("ssl_object")
                if tls is not None and tls.selected_alpn_protocol() != "h2":
                    raise ConnectionError("the server does not speak HTTP/2")
                await link.ready()
                if not link.usable:
                    raise ConnectionError("the server is closing")
        except (OSError, TimeoutError, UnicodeError) as error:  # errors of TLS are such, too; names may be no IDNA
            log.debug("no connection", address=self._address, error=type(error).__name__, detail=str(error)[:200])
            if link is not None:
                await link.close()
            self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _MOST_PAUSE_S)
            self._again_at = loop.time() + self._pause_s
            return None
        except BaseException:
            if link is not None:
                link.abort()
            raise
        finally:
            self._connecting = None
        self._pause_s = 0.0
        self._closing = [old for old in (*self._closing, *filter(None, (self._link,))) if not old.closed.is_set()]
        self._link = link
        return link

    async def _open(self) -> tuple[asyncio.Transport, Link]:
        loop = asyncio.get_running_loop()
        if self._address.startswith(UNIX):
            path, name = self._address.removeprefix(UNIX), None if self._tls is None else "localhost"
            return await loop.create_unix_connection(self._new_link, path, ssl=self._tls, server_hostname=name)
        host, port = split_address(self._address, "triton")
        transport, link = await loop.create_connection(self._new_link, host, port, ssl=self._tls)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_MS)
        return transport, link

    def _new_link(self) -> Link:
        return Link(self._most_bytes)
