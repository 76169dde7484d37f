"""Takes the bytes of an HTTP/2 connection apart into frames, and puts blocks of headers together."""

from __future__ import annotations

from typing import Final, NamedTuple

from cloud import http2
from cloud.http2 import ProtocolError

LARGEST_FRAME: Final = 1 << 20  # what the peer is told
_MOST_LEFT_OUT: Final = 1 << 24  # bytes of headers that are too large to be read


class Frame(NamedTuple):
    """A frame without padding; headers are whole, with the flags of their first frame.

    The payload of headers that are too large to be read is empty: what a server says of one call may repeat what the
    caller has sent, and must not end the calls of others.

    DATA comes in pieces, as the socket has them, each as a frame of its own.
    """

    kind: int
    flags: int
    stream: int
    payload: bytes
    size: int  # of the payload with its padding, which is what windows count


class FrameReader:
    """See the module."""

    def __init__(self) -> None:
        self._left: list[bytes] = []  # the beginning of a frame, as it came
        self._missing = 0  # bytes of it, as far as that is known
        self._data: tuple[int, int, int] | None = None  # flags, stream and missing bytes of a DATA frame
        self._headers: tuple[int, int, list[bytes]] | None = None  # stream, flags and parts of an unfinished block
        self._headers_size = 0
        self._begun = False

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that are whole now.

        Raises:
            ProtocolError: The peer sent what it may not.
        """
        data = self._with_left(data)
        frames: list[Frame] = []
        place, size = 0, len(data)
        if not data:
            return frames
        if self._data is not None:
            place = self._piece(frames, *self._data, data, 0)
        while size - place >= http2.FRAME_HEAD:
            length, kind, flags, stream = http2.read_frame_head(data, place)
            if length > LARGEST_FRAME:
                raise ProtocolError("a frame is too large")
            start = place + http2.FRAME_HEAD
            if kind == http2.DATA and not flags & http2.PADDED and self._begun and self._headers is None:
                place = self._piece(frames, flags, stream, length, data, start)
                continue
            if start + length > size:
                self._missing = start + length - size
                break
            place = start + length
            if not self._begun and kind != http2.SETTINGS:
                raise ProtocolError("expected SETTINGS first")
            self._begun = True
            whole = self._whole(kind, flags, stream, data[start:place])
            if whole is not None:
                frames.append(whole)
        else:
            self._missing = http2.FRAME_HEAD - (size - place)
        if place < size:
            self._left.append(data[place:])
        return frames

    def _with_left(self, data: bytes) -> bytes:
        """Return the bytes that can be read now: none where a frame goes on being incomplete."""
        if not self._left:
            return data
        self._left.append(data)
        self._missing -= len(data)
        if self._missing > 0:
            return b""
        whole = b"".join(self._left)
        self._left.clear()
        return whole

    def _piece(self, frames: list[Frame], flags: int, stream: int, length: int, data: bytes, start: int) -> int:
        """Add what has come of a DATA frame that `length` bytes are missing of; return where it ends for now."""
        end = min(start + length, len(data))
        missing = start + length - end
        self._data = (flags, stream, missing) if missing else None
        piece = data if start == 0 and end == len(data) else data[start:end]
        frames.append(Frame(http2.DATA, 0 if missing else flags, stream, piece, end - start))
        return end

    def _whole(self, kind: int, flags: int, stream: int, payload: bytes) -> Frame | None:
        """Return a frame; nothing where it begins or continues a block of headers."""
        length = len(payload)
        if kind in (http2.DATA, http2.HEADERS) and flags & (http2.PADDED | http2.HAS_PRIORITY):
            payload = http2.unpadded(kind, flags, payload)
        if self._headers is not None or kind == http2.CONTINUATION or (
            kind == http2.HEADERS and not flags & http2.END_HEADERS
        ):  # fmt: skip
            return self._part(kind, flags, stream, payload)
        if kind == http2.HEADERS and length > http2.MOST_HEADERS:
            payload = b""
        return Frame(kind, flags, stream, payload, length)

    def _part(self, kind: int, flags: int, stream: int, payload: bytes) -> Frame | None:
        """Take a part of a block of headers that comes in several frames; return the block with its last one."""
        if self._headers is None:
            if kind != http2.HEADERS:
                raise ProtocolError("CONTINUATION of nothing")
            self._headers, self._headers_size = (stream, flags, [payload]), len(payload)
            return None
        of, first_flags, parts = self._headers
        if kind != http2.CONTINUATION or stream != of:
            raise ProtocolError("expected CONTINUATION")
        self._headers_size += max(len(payload), 1)  # empty parts are endless, too
        if self._headers_size > _MOST_LEFT_OUT:
            raise ProtocolError("headers are too large")
        if self._headers_size > http2.MOST_HEADERS:
            parts.clear()
        else:
            parts.append(payload)
        if not flags & http2.END_HEADERS:
            return None
        self._headers = None
        return Frame(http2.HEADERS, first_flags, stream, b"".join(parts), self._headers_size)
