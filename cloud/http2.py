"""HTTP/2 as bytes (RFC 9113): frames, settings and blocks of headers, for a client of gRPC services.

Header blocks are read and written without the dynamic table of HPACK: the peer is told that there is none, so equal
blocks always mean the same, and what a block meant is remembered.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Final

from hpack import Decoder, HPACKError, OversizedHeaderListError
from hpack.hpack import encode_integer

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM = 0x0, 0x1, 0x7, 0x8, 0xB
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS = 1, 2, 3
INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = 4, 5, 6
FIRST_WINDOW: Final = 65_535  # of the connection, and of streams until settings say otherwise
FIRST_FRAME_SIZE: Final = 16_384
MOST_WINDOW: Final = 2**31 - 1
MOST_STREAM: Final = 2**31 - 1
FRAME_HEAD: Final = 9  # bytes
MOST_HEADERS: Final = 64 << 10  # bytes of one block that are read
_LARGEST_FRAME: Final = 2**24 - 1
_HEAD: Final = struct.Struct(">BHBBI")
_PAIR: Final = struct.Struct(">HI")
_NUMBER: Final = struct.Struct(">I")


class ProtocolError(Exception):
    """The peer sent what HTTP/2 does not allow; the connection cannot be used any more."""


def frame_head(size: int, kind: int, flags: int, stream: int) -> bytes:
    """Return the bytes before a frame's payload."""
    return b"%b%c%c%b" % (size.to_bytes(3), kind, flags, stream.to_bytes(4))


def read_frame_head(data: bytes, at: int) -> tuple[int, int, int, int]:
    """Return the size of a frame's payload, its kind, its flags and its stream."""
    high, low, kind, flags, stream = _HEAD.unpack_from(data, at)
    return high << 16 | low, kind, flags, stream & MOST_STREAM


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """Return a whole frame."""
    return frame_head(len(payload), kind, flags, stream) + payload


def settings(values: Mapping[int, int]) -> bytes:
    """Return a SETTINGS frame."""
    return frame(SETTINGS, payload=b"".join(_PAIR.pack(name, value) for name, value in values.items()))


def read_settings(payload: bytes) -> Iterator[tuple[int, int]]:
    """Yield the names and values of a SETTINGS frame that is no acknowledgement.

    Raises:
        ProtocolError: It is not whole, or a value is out of its range.
    """
    if len(payload) % _PAIR.size:
        raise ProtocolError("SETTINGS")
    for name, value in _PAIR.iter_unpack(payload):
        if name == INITIAL_WINDOW_SIZE and value > MOST_WINDOW:
            raise ProtocolError("SETTINGS_INITIAL_WINDOW_SIZE")
        if name == MAX_FRAME_SIZE and not FIRST_FRAME_SIZE <= value <= _LARGEST_FRAME:
            raise ProtocolError("SETTINGS_MAX_FRAME_SIZE")
        yield name, value


def number(value: int) -> bytes:
    """Return the payload of WINDOW_UPDATE and RST_STREAM, and each half of GOAWAY's."""
    return _NUMBER.pack(value)


def read_number(payload: bytes, at: int = 0) -> int:
    """Return a number of 31 bits.

    Raises:
        ProtocolError: The payload is too short.
    """
    if len(payload) < at + _NUMBER.size:
        raise ProtocolError("a frame is too short")
    return int(_NUMBER.unpack_from(payload, at)[0]) & MOST_WINDOW


def unpadded(kind: int, flags: int, payload: bytes) -> bytes:
    """Return what a DATA or HEADERS frame holds beside padding and priority.

    Raises:
        ProtocolError: There is more padding than payload.
    """
    start, end = 0, len(payload)
    if flags & PADDED:
        start, end = 1, end - (payload[0] if payload else 0)
    if flags & HAS_PRIORITY and kind == HEADERS:
        start += 5
    if start > end:
        raise ProtocolError("padding")
    return payload[start:end]


def literal(name: bytes, value: bytes) -> bytes:
    """Return a header field without indexing (RFC 7541, 6.2.2)."""
    return b"".join((b"\0", bytes(encode_integer(len(name), 7)), name, bytes(encode_integer(len(value), 7)), value))


@lru_cache(maxsize=256)
def read_headers(block: bytes) -> Mapping[str, str] | None:
    """Return the fields of a block of at most `MOST_HEADERS`; None where they are too many.

    Raises:
        ProtocolError: It is none, or uses a dynamic table.
    """
    decoder = Decoder(max_header_list_size=2 * MOST_HEADERS)  # Huffman's code makes at most 8 of 5
    decoder.max_allowed_table_size = decoder.header_table_size = 0
    try:
        fields = decoder.decode(block, raw=True)
    except OversizedHeaderListError:
        return None
    except HPACKError as error:
        raise ProtocolError("headers") from error
    return {str(name, "latin-1"): str(value, "latin-1") for name, value in fields}
