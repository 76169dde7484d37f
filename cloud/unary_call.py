"""One unary gRPC call as HTTP/2 carries it: its time limit, its answer put together, and what its end means."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote

import grpc

from cloud import http2

_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
_OF_RESET: Final = {
    http2.REFUSED_STREAM: grpc.StatusCode.UNAVAILABLE,
    http2.CANCEL: grpc.StatusCode.CANCELLED,
    http2.ENHANCE_YOUR_CALM: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_OF_HTTP: Final = dict.fromkeys(("429", "502", "503", "504"), grpc.StatusCode.UNAVAILABLE)
_SLACK_S: Final = 0.01
_PREFIX: Final = 5  # bytes before a message: whether it is compressed, and its length


class CallError(Exception):
    """A call ended with another status than OK.

    Args:
        code: The status.
        details: What the server says, or what happened to the connection.
        unsent: Whether the server has certainly not run it.
    """

    def __init__(self, code: grpc.StatusCode, details: str, *, unsent: bool = False) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code, self.details, self.unsent = code, details, unsent


class UnaryCall:
    """A call in progress.

    Args:
        answer: Gets the serialized answer, or a CallError.
        until: Loop time at which it is too late for one.
        window: Bytes of the request that the server takes now.
    """

    __slots__ = ("_begun", "_parts", "answer", "rest", "size", "until", "window")

    def __init__(self, answer: asyncio.Future[bytes], until: float, window: int) -> None:
        self.answer, self.until, self.window = answer, until, window
        self.rest: memoryview | None = None  # of the request, that waits for the server's window
        self.size = 0  # of the answer so far
        self._begun = False
        self._parts: list[bytes] = []

    def add(self, part: bytes) -> None:
        """Take a part of the answer."""
        self._parts.append(part)
        self.size += len(part)

    def begins(self, fields: Mapping[str, str]) -> bool:
        """Return whether the answer may go on after these headers; it fails where they are not gRPC's."""
        if self._begun or fields.get(":status", "").startswith("1"):
            return True
        self._begun = True
        status = fields.get(":status", "")
        if status == "200" and fields.get("content-type", "").startswith("application/grpc"):
            return True
        code = _OF_HTTP.get(status, grpc.StatusCode.UNKNOWN)
        self.fail(code, f"an answer that is not gRPC, with the HTTP status {status[:3]}")
        return False

    def finish(self, trailers: Mapping[str, str]) -> None:
        """End it as its trailers say."""
        status = trailers.get("grpc-status", "")
        if status != "0":
            number = int(status) if status.isdecimal() and len(status) < _PREFIX else None
            code = grpc.StatusCode.INTERNAL if number is None else _CODES.get(number, grpc.StatusCode.UNKNOWN)
            self.fail(code, unquote(trailers.get("grpc-message", "")))
            return
        parts: list[bytes | memoryview] = list(self._parts)
        if not parts or len(parts[0]) < _PREFIX:
            parts = [b"".join(parts)]
        first = parts[0]
        if len(first) < _PREFIX or first[0] or int.from_bytes(first[1:_PREFIX]) != self.size - _PREFIX:
            self.fail(grpc.StatusCode.INTERNAL, "expected one plain message")
        elif not self.answer.done():
            parts[0] = memoryview(first)[_PREFIX:]
            self.answer.set_result(b"".join(parts))

    def reset(self, error: int, now: float) -> None:
        """End it because the server did, with a code of HTTP/2; a server's clock may strike before ours."""
        code = _OF_RESET.get(error, grpc.StatusCode.INTERNAL)
        if error == http2.CANCEL and now > self.until - _SLACK_S:
            code = grpc.StatusCode.DEADLINE_EXCEEDED
        self.fail(code, f"the server ended the call ({error})", unsent=error == http2.REFUSED_STREAM)

    def fail(self, code: grpc.StatusCode, details: str, *, unsent: bool = False) -> None:
        """End it with another status than OK, if it runs."""
        if not self.answer.done():
            self.answer.set_exception(CallError(code, details, unsent=unsent))


def prefix(message: bytes) -> bytes:
    """Return what stands before a message."""
    return b"\0" + len(message).to_bytes(_PREFIX - 1)


def time_limit(seconds: float) -> bytes:
    """Return the header field that tells the server how long a call may take: at most eight digits and a unit."""
    micros = max(1, math.ceil(seconds * 1e6))
    value = b"%du" % micros if micros < 10**8 else b"%dm" % min(micros // 1000, 10**8 - 1)
    return b"\0\x0cgrpc-timeout%c%b" % (len(value), value)
