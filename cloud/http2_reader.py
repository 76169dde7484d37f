"""Takes the bytes of an HTTP/2 connection apart into frames, and puts blocks of headers together."""

from __future__ import annotations

from typing import Final, NamedTuple

from cloud import http2
from cloud.http2 import ProtocolError

LARGEST_FRAME: Final = 1 << 20  # what the peer is told
_MOST_HEADERS: Final = 1 << 20


class Frame(NamedTuple):
    """A frame without padding; headers are whole, with the flags of their first frame."""

    kind: int
    flags: int
    stream: int
    payload: bytes
    size: int  # of the payload with its padding, which is what windows count


class FrameReader:
    """See the module."""

    def __init__(self) -> None:
        self._left = b""  # the beginning of a frame
        self._headers: tuple[int, int, list[bytes]] | None = None  # stream, flags and parts of an unfinished block
        self._begun = False

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that are whole now.

        Raises:
            ProtocolError: The peer sent what it may not.
        """
        if self._left:
            data = self._left + data
        frames: list[Frame] = []
        place, size = 0, len(data)
        while size - place >= http2.FRAME_HEAD:
            length, kind, flags, stream = http2.read_frame_head(data, place)
            if length > LARGEST_FRAME:
                raise ProtocolError("a frame is too large")
            start = place + http2.FRAME_HEAD
            if start + length > size:
                break
            place = start + length
            if not self._begun and kind != http2.SETTINGS:
                raise ProtocolError("expected SETTINGS first")
            self._begun = True
            payload = data[start:place]
            if kind in (http2.DATA, http2.HEADERS) and flags & (http2.PADDED | http2.HAS_PRIORITY):
                payload = http2.unpadded(kind, flags, payload)
            if self._headers is not None or kind == http2.CONTINUATION or (
                kind == http2.HEADERS and not flags & http2.END_HEADERS
            ):  # fmt: skip
                whole = self._part(kind, flags, stream, payload)
                if whole is not None:
                    frames.append(whole)
            else:
                frames.append(Frame(kind, flags, stream, payload, length))
        self._left = data[place:]
        return frames

    def _part(self, kind: int, flags: int, stream: int, payload: bytes) -> Frame | None:
        """Take a part of a block of headers that comes in several frames; return the block with its last one."""
        if self._headers is None:
            if kind != http2.HEADERS:
                raise ProtocolError("CONTINUATION of nothing")
            self._headers = stream, flags, [payload]
            return None
        of, first_flags, parts = self._headers
        if kind != http2.CONTINUATION or stream != of:
            raise ProtocolError("expected CONTINUATION")
        parts.append(payload)
        if sum(map(len, parts)) > _MOST_HEADERS or len(parts) > _MOST_HEADERS >> 10:
            raise ProtocolError("headers are too large")
        if not flags & http2.END_HEADERS:
            return None
        self._headers = None
        return Frame(http2.HEADERS, first_flags, stream, b"".join(parts), 0)
