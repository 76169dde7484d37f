"""HTTP/2 by hand, over TLS or plain TCP: frames that no well-behaved client would send.

Only what attacks need: frames are made byte by byte, header blocks are literals without indexing (RFC 7541, 6.2.2),
and what comes back is told apart by frame type.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
CANCEL: Final = 0x8
ENHANCE_YOUR_CALM: Final = 0xB
INITIAL_WINDOW_SIZE, MAX_CONCURRENT_STREAMS = 0x4, 0x3

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that the server sent."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def error_code(self) -> int:
        """Return the code of a GOAWAY or RST_STREAM."""
        at = 4 if self.kind == GOAWAY else 0
        return int.from_bytes(self.payload[at : at + 4])


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """Return a frame's bytes."""
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def settings(**values: int) -> bytes:
    """Return a SETTINGS frame; names as in this module, in small letters."""
    numbers = {"initial_window_size": INITIAL_WINDOW_SIZE, "max_concurrent_streams": MAX_CONCURRENT_STREAMS}
    return frame(SETTINGS, payload=b"".join(struct.pack(">HI", numbers[name], value) for name, value in values.items()))


def integer(value: int, bits: int, first: int = 0) -> bytes:
    """Return a number with a prefix of `bits` bits (RFC 7541, 5.1)."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes((first | value,))
    out = bytearray((first | limit,))
    value -= limit
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    out.append(value)
    return bytes(out)


def literal(name: bytes, value: bytes, first: int = 0) -> bytes:
    """Return a header as a literal; `first` 0x40 puts it into the peer's table."""
    return bytes((first,)) + integer(len(name), 7) + name + integer(len(value), 7) + value


def block(headers: Iterable[Header]) -> bytes:
    """Return a header block."""
    return b"".join(literal(name, value) for name, value in headers)


def request_headers(path: bytes, *more: Header, authority: bytes = b"localhost") -> list[Header]:
    """Return the headers that begin a gRPC call."""
    return [
        (b":method", b"POST"), (b":scheme", b"https"), (b":path", path), (b":authority", authority),
        (b"te", b"trailers"), (b"content-type", b"application/grpc"), *more,
    ]  # fmt: skip


def message(data: bytes) -> bytes:
    """Return a gRPC message with its prefix."""
    return b"\0" + len(data).to_bytes(4) + data


class Wire:
    """A connection that the test drives frame by frame.

    Args:
        sock: What it goes over.
        polite: Answer the server's SETTINGS and PINGs, as HTTP/2 demands.
    """

    def __init__(self, sock: socket.socket, *, polite: bool = True) -> None:
        self.sock, self.polite = sock, polite
        self._buffer = bytearray()
        self._stream = -1

    @classmethod
    def open(
        cls, address: str, ca: Path | None, *, timeout_s: float = 30.0, preface: bool = True, **given: int
    ) -> Self:
        """Connect, over TLS where an authority is given; send the preface and SETTINGS."""
        sock = connect(address, timeout_s=timeout_s)
        if ca is not None:
            context = ssl.create_default_context(cafile=str(ca))
            context.set_alpn_protocols(["h2"])
            context.check_hostname = False
            sock = context.wrap_socket(sock, server_hostname="localhost")
        wire = cls(sock)
        if preface:
            wire.send(PREFACE + settings(**given))
        return wire

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(data)

    @property
    def last_stream(self) -> int:
        """Return the number of the newest stream."""
        return self._stream

    def new_stream(self) -> int:
        """Return the next number for a stream of ours."""
        self._stream += 2
        return self._stream

    def call(self, path: bytes, *more: Header, end: bool = False, data: bytes | None = None) -> int:
        """Begin a call; send `data` as its whole request where given. Return the stream's number."""
        stream = self.new_stream()
        flags = END_HEADERS | (END_STREAM if end else 0)
        self.send(frame(HEADERS, flags, stream, block(request_headers(path, *more))))
        if data is not None:
            self.send(frame(DATA, END_STREAM, stream, message(data)))
        return stream

    def frames(self) -> Iterator[Frame]:
        """Yield frames until the server closes the connection; TimeoutError when it is silent for too long."""
        while True:
            while len(self._buffer) < 9 or len(self._buffer) < 9 + int.from_bytes(self._buffer[:3]):
                try:
                    data = self.sock.recv(1 << 16)
                except (ConnectionError, ssl.SSLError):
                    return
                if not data:
                    return
                self._buffer += data
            length = int.from_bytes(self._buffer[:3])
            kind, flags, stream = self._buffer[3], self._buffer[4], int.from_bytes(self._buffer[5:9]) & 0x7FFFFFFF
            payload = bytes(self._buffer[9 : 9 + length])
            del self._buffer[: 9 + length]
            if self.polite and kind == SETTINGS and not flags & ACK:
                with contextlib.suppress(OSError):
                    self.send(frame(SETTINGS, ACK))
            if self.polite and kind == PING and not flags & ACK:
                with contextlib.suppress(OSError):
                    self.send(frame(PING, ACK, payload=payload))
            yield Frame(kind, flags, stream, payload)

    def until(self, *kinds: int, stream: int | None = None) -> Frame | None:
        """Return the next frame of these kinds (and stream), or None when the server closed the connection."""
        return next((f for f in self.frames() if f.kind in kinds and stream in (None, f.stream)), None)

    def until_closed(self) -> list[Frame]:
        """Return everything until the server closes the connection."""
        return list(self.frames())

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(address: str, *, timeout_s: float = 30.0) -> socket.socket:
    """Return a plain TCP connection."""
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)), timeout=timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
