"""One HTTP/2 connection that carries unary gRPC calls, read and written in the event loop itself.

grpc.aio hands each step of a call from the thread that reads the socket to one that waits for completions, and from
there to the event loop. For a server a few hundred microseconds away these hand-overs take longer than the call
(docs/adr/0026). Here a call is one write, and its answer one read. Rules:

1. A call fails with `unsent` only where the server has certainly not run it: it was refused (REFUSED_STREAM), or came
   after the last one that a closing server takes (GOAWAY).
2. A call whose caller leaves, or whose time is up, is reset, so that the server can stop working on it.
3. Whatever is not HTTP/2, or is larger than agreed, ends the connection.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

import grpc

from cloud import http2
from cloud.http2 import ProtocolError
from cloud.http2_reader import LARGEST_FRAME, Frame, FrameReader
from cloud.unary_call import CallError, UnaryCall, prefix, time_limit

_WINDOW: Final = http2.MOST_WINDOW  # messages have a limit of their own
_REFILL: Final = 1 << 24  # bytes that were received, after which the peer may send as many again
_NO_FIELDS: Final[Mapping[str, str]] = {}


class Link(asyncio.Protocol):
    """See the module.

    Args:
        most_bytes: Largest answer.
    """

    def __init__(self, most_bytes: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._most_bytes = most_bytes
        self._transport: Any = None
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._reader = FrameReader()
        self._calls: dict[int, UnaryCall] = {}
        self._next = 1
        self._window, self._call_window, self._frame_size = (
            http2.FIRST_WINDOW,
            http2.FIRST_WINDOW,
            http2.FIRST_FRAME_SIZE,
        )
        self._most_calls = math.inf
        self._waiting: deque[asyncio.Future[None]] = deque()  # callers, for a place among the most calls
        self._queue: deque[int] = deque()  # streams with a rest to send
        self._paused = False
        self._received = 0
        self.closed = asyncio.Event()
        self.usable = True  # whether new calls may begin

    async def ready(self) -> None:
        """Wait until the server has shown that it speaks HTTP/2.

        Raises:
            ConnectionError: It does not.
        """
        await self._ready

    def abort(self) -> None:
        """End the connection and what runs on it."""
        self._end(ConnectionAbortedError("closed"))
        self._transport.abort()

    async def close(self) -> None:
        """End the connection and what runs on it, and wait until it is closed."""
        self.abort()
        await self.closed.wait()

    async def call(self, head: bytes, message: bytes, timeout_s: float) -> bytes:
        """Return the answer to one call.

        Args:
            head: The call's header block, but for its time limit.
            message: The request.
            timeout_s: Time for it.

        Raises:
            CallError: It ended otherwise.
        """
        until = self._loop.time() + timeout_s
        if len(self._calls) >= self._most_calls:
            await self._place(until)
        if not self.usable:
            raise CallError(grpc.StatusCode.UNAVAILABLE, "the connection is closing", unsent=True)
        stream, self._next = self._next, self._next + 2
        self.usable = stream < http2.MOST_STREAM - 2
        call = self._calls[stream] = UnaryCall(self._loop.create_future(), until, self._call_window)
        timer = self._loop.call_at(until, self._too_late, stream, call)
        try:
            self._send(stream, call, head + time_limit(until - self._loop.time()), message)
            return await call.answer
        finally:
            timer.cancel()
            if stream in self._calls:  # the caller leaves
                self._reset(stream)

    async def _place(self, until: float) -> None:
        """Wait until one more call may run."""
        while len(self._calls) >= self._most_calls and self.usable:
            free = self._loop.create_future()
            self._waiting.append(free)
            try:
                async with asyncio.timeout_at(until):
                    await free
            except (TimeoutError, asyncio.CancelledError) as error:
                if free in self._waiting:
                    self._waiting.remove(free)
                if not free.cancelled():  # it has a place, and does not want it any more
                    self._wake()
                if isinstance(error, asyncio.CancelledError):
                    raise
                raise CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "no call more may run now") from error

    def _wake(self) -> None:
        """Let whoever waits longest for a place look again."""
        while self._waiting:
            free = self._waiting.popleft()
            if not free.done():
                free.set_result(None)
                return

    def _wake_all(self) -> None:
        while self._waiting:
            self._wake()

    # -- sending --------------------------------------------------------------------------------------------------

    def _send(self, stream: int, call: UnaryCall, block: bytes, message: bytes) -> None:
        before = prefix(message)
        size = len(before) + len(message)
        head = http2.frame(http2.HEADERS, http2.END_HEADERS, stream, block)
        if size <= min(self._window, call.window, self._frame_size) and not (self._queue or self._paused):
            self._window -= size
            call.window -= size
            data = http2.frame_head(size, http2.DATA, http2.END_STREAM, stream)
            self._transport.write(b"".join((head, data, before, message)))
            return
        if min(self._window, call.window) < len(before):
            before, message = b"", before + message
        self._window -= len(before)
        call.window -= len(before)
        self._transport.write(head + (http2.frame(http2.DATA, 0, stream, before) if before else b""))
        call.rest = memoryview(message)
        self._queue.append(stream)
        self._pump()

    def _pump(self) -> None:
        """Send of each waiting request a frame in turn, as far as the windows and the socket allow."""
        stuck = 0
        while stuck < len(self._queue) and self._window > 0 and not self._paused:
            stream = self._queue.popleft()
            call = self._calls.get(stream)
            if call is None or call.rest is None:
                continue
            if call.window <= 0:
                stuck += 1
                self._queue.append(stream)
                continue
            stuck = 0
            part = call.rest[: min(self._window, call.window, self._frame_size)]
            self._window -= len(part)
            call.window -= len(part)
            whole = len(part) == len(call.rest)
            flags = http2.END_STREAM if whole else 0
            self._transport.writelines((http2.frame_head(len(part), http2.DATA, flags, stream), part))
            call.rest = None if whole else call.rest[len(part) :]
            if not whole:
                self._queue.append(stream)

    def pause_writing(self) -> None:
        """Note that the socket takes no more now."""
        self._paused = True

    def resume_writing(self) -> None:
        """Send what has waited for the socket."""
        self._paused = False
        self._pump()

    def _reset(self, stream: int) -> None:
        self._transport.write(http2.frame(http2.RST_STREAM, 0, stream, http2.number(http2.CANCEL)))
        self._leave(stream)

    def _too_late(self, stream: int, call: UnaryCall) -> None:
        if stream in self._calls:
            self._reset(stream)
        call.fail(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer came in time")

    def _leave(self, stream: int) -> UnaryCall | None:
        """Forget a call; return it, where it was one."""
        call = self._calls.pop(stream, None)
        if len(self._calls) < self._most_calls:
            self._wake()
        if not self.usable and not self._calls:
            self._transport.close()
        return call

    # -- receiving ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin HTTP/2."""
        self._transport = transport
        agreed = {
            http2.HEADER_TABLE_SIZE: 0,
            http2.ENABLE_PUSH: 0,
            http2.INITIAL_WINDOW_SIZE: _WINDOW,
            http2.MAX_FRAME_SIZE: LARGEST_FRAME,
            http2.MAX_HEADER_LIST_SIZE: http2.MOST_HEADERS,
        }
        window = http2.frame(http2.WINDOW_UPDATE, 0, 0, http2.number(_WINDOW - http2.FIRST_WINDOW))
        self._transport.write(http2.PREFACE + http2.settings(agreed) + window)

    def connection_lost(self, error: Exception | None) -> None:
        """Fail what runs: nobody knows whether the server ran it."""
        self._end(error or ConnectionResetError("the connection was closed"))
        self.closed.set()

    def _end(self, error: Exception) -> None:
        self.usable = False
        if not self._ready.done():
            self._ready.set_exception(ConnectionError(str(error)))
            self._ready.exception()  # nobody may be waiting
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.fail(grpc.StatusCode.UNAVAILABLE, "the connection was lost")
        self._wake_all()

    def data_received(self, data: bytes) -> None:
        """Take the frames that came."""
        try:
            for frame in self._reader.feed(data):
                self._frame(frame)
        except ProtocolError as error:
            self._end(ConnectionAbortedError(f"not HTTP/2: {error}"))
            goodbye = http2.number(0) + http2.number(http2.PROTOCOL_ERROR)
            self._transport.write(http2.frame(http2.GOAWAY, payload=goodbye))
            self._transport.close()

    def _frame(self, frame: Frame) -> None:
        kind, flags, stream, payload, size = frame
        if kind == http2.DATA:
            self._data(flags, stream, payload, size)
        elif kind == http2.HEADERS:
            self._headers(flags, stream, http2.read_headers(payload) if payload else None)
        elif kind == http2.WINDOW_UPDATE:
            self._more_window(stream, http2.read_number(payload))
        elif kind == http2.RST_STREAM:
            code = http2.read_number(payload)
            call = self._leave(stream)
            if call is not None:
                call.reset(code, self._loop.time())
        elif kind == http2.SETTINGS and not flags & http2.ACK:
            self._settings(payload)
        elif kind == http2.PING and not flags & http2.ACK:
            self._transport.write(http2.frame(http2.PING, http2.ACK, 0, payload))
        elif kind == http2.GOAWAY:
            self._goes_away(http2.read_number(payload))
        elif kind == http2.PUSH_PROMISE:
            raise ProtocolError("PUSH_PROMISE")
        # Left are acknowledgements, priorities, and kinds of frames that are not known.

    def _data(self, flags: int, stream: int, payload: bytes, size: int) -> None:
        self._received += size
        if self._received >= _REFILL:
            self._transport.write(http2.frame(http2.WINDOW_UPDATE, 0, 0, http2.number(self._received)))
            self._received = 0
        call = self._calls.get(stream)
        if call is None:  # it was reset
            return
        call.add(payload)
        if call.size > self._most_bytes:
            self._reset(stream)
            call.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "the answer is too large")
        elif flags & http2.END_STREAM:
            self._finish(stream, call, _NO_FIELDS)

    def _headers(self, flags: int, stream: int, fields: Mapping[str, str] | None) -> None:
        call = self._calls.get(stream)
        if call is None:
            return
        if fields is None:
            self._reset(stream)
            call.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "the headers of the answer are too large")
        elif not call.begins(fields):
            self._reset(stream)
        elif flags & http2.END_STREAM:
            self._finish(stream, call, fields)

    def _finish(self, stream: int, call: UnaryCall, trailers: Mapping[str, str]) -> None:
        if call.rest is not None:  # the server did not want all of the request
            self._reset(stream)
        else:
            self._leave(stream)
        call.finish(trailers)

    def _settings(self, payload: bytes) -> None:
        for name, value in http2.read_settings(payload):
            if name == http2.MAX_CONCURRENT_STREAMS:
                self._most_calls = value
            elif name == http2.MAX_FRAME_SIZE:
                self._frame_size = value
            elif name == http2.INITIAL_WINDOW_SIZE:
                for call in self._calls.values():
                    call.window += value - self._call_window
                self._call_window = value
        self._transport.write(http2.frame(http2.SETTINGS, http2.ACK))
        self._wake_all()
        if not self._ready.done():
            self._ready.set_result(None)
        self._pump()

    def _goes_away(self, last: int) -> None:
        self.usable = False
        self._wake_all()
        for stream in [stream for stream in self._calls if stream > last]:
            call = self._leave(stream)
            if call is not None:
                call.fail(grpc.StatusCode.UNAVAILABLE, "the server is closing", unsent=True)
        if not self._calls:
            self._transport.close()

    def _more_window(self, stream: int, value: int) -> None:
        if not stream:
            self._window += value
        elif (call := self._calls.get(stream)) is not None:
            call.window += value
        if self._queue:
            self._pump()
