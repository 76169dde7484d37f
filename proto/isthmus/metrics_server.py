"""The listener for metrics: HTTP/1.1, GET /metrics, one request for each connection, on the program's own event loop.

A scrape is answered on the loop that counts, so it sees no number half changed. What a scraper may cost is bounded:
the size of a request, the time for it, and the connections at once. There is neither TLS nor a token, so the listener
binds loopback addresses unless the operator says otherwise.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from isthmus.address import check_free, is_local, split_address
from isthmus.errors import ConfigError

PATH: Final = "/metrics"
_LARGEST_REQUEST: Final = 16 << 10  # bytes
_PATIENCE_S: Final = 5.0  # for a request to come, and for an answer to go
_CONNECTIONS: Final = 16
_TEXT: Final = "text/plain; charset=utf-8"

log = structlog.get_logger(__name__)


class MetricsServer:
    """Answers scrapes.

    Args:
        listen: HOST:PORT.
        registry: What is told.
        public: Allow an address that other machines can reach.

    Raises:
        ConfigError: The address is none, or other machines can reach it and `public` is not set.
    """

    def __init__(self, listen: str, registry: CollectorRegistry, *, public: bool = False) -> None:
        self._host, self._port = split_address(listen, "metrics_listen")
        if not public and not is_local(listen, "metrics_listen"):
            raise ConfigError(
                f"metrics_listen: {listen} can be reached from other machines, and metrics have neither TLS nor tokens",
                hint="set metrics_public = true where the network may read them",
            )
        self._listen = listen
        self._registry = registry
        self._connections = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        """Listen; return the address with the port that was bound.

        Raises:
            ConfigError: The address cannot be bound.
        """
        check_free(self._listen, "metrics_listen")
        try:
            self._server = await asyncio.start_server(self._serve, self._host, self._port, limit=_LARGEST_REQUEST)
        except OSError as error:
            raise ConfigError(f"metrics_listen: cannot listen on {self._listen}: {error.strerror}") from error
        port = self._server.sockets[0].getsockname()[1]
        return f"{self._listen.rpartition(':')[0]}:{port}"

    async def stop(self) -> None:
        """Take no more scrapes; a no-op when it was never started."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= _CONNECTIONS:
                async with asyncio.timeout(_PATIENCE_S):
                    writer.write(await self._answer(reader))
                    await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError) as error:
            log.debug("scrape ended early", error=repr(error))
        finally:
            self._connections -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _response("431 Request Header Fields Too Large")
        request, *lines = head.decode("latin-1").split("\r\n")
        method, _, rest = request.partition(" ")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", headers="Allow: GET, HEAD\r\n")
        if rest.partition(" ")[0].partition("?")[0] != PATH:
            return _response("404 Not Found", b"metrics are at /metrics\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body, kind = self._render(headers.get("accept", ""))
        return _response("200 OK", body, kind, head=method == "HEAD")

    def _render(self, accept: str) -> tuple[bytes, str]:
        try:
            encode, kind = choose_encoder(accept)
            return encode(self._registry), kind
        except (TypeError, ValueError):  # what the library makes of a version that is none
            encode, kind = choose_encoder("")
            return encode(self._registry), kind


def _response(status: str, body: bytes = b"", kind: str = _TEXT, *, headers: str = "", head: bool = False) -> bytes:
    start = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        f"{headers}Connection: close\r\n\r\n"
    )
    return start.encode("latin-1") + (b"" if head else body)
