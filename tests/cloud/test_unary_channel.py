"""The client of unary calls against gRPC's own server, and against servers that answer as no such server would."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hpack import Encoder
from hypothesis import given
from hypothesis import strategies as st

from cloud import http2
from cloud.http2_reader import FrameReader
from cloud.unary_call import CallError
from cloud.unary_channel import UnaryChannel
from security.tls import server_credentials
from tests.cloud.conftest import eventually
from tests.cloud.workspaces import make_workspace

METHOD = "/test.Service/Call"
MOST = 8 << 20
Behaviour = Callable[[bytes, Any], Awaitable[bytes]]
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


async def echo(raw: bytes, _context: Any) -> bytes:
    return raw


@asynccontextmanager
async def grpc_server(
    behaviour: Behaviour, address: str = "127.0.0.1:0", credentials: Any = None, **options: int
) -> AsyncIterator[str]:
    """Serve one method; options have a dot for each double underscore."""
    given = {"grpc.max_receive_message_length": -1, "grpc.max_send_message_length": -1}
    given |= {f"grpc.{name}": value for name, value in options.items()}
    server = grpc.aio.server(options=tuple(given.items()))
    handlers: Any = {"Call": grpc.unary_unary_rpc_method_handler(behaviour)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", handlers),))
    secure = credentials is not None
    port = server.add_secure_port(address, credentials) if secure else server.add_insecure_port(address)
    await server.start()
    try:
        yield address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def channel_to(address: str, ca: Path | None = None) -> AsyncIterator[UnaryChannel]:
    channel = UnaryChannel(address, ca=ca, most_bytes=MOST)
    try:
        yield channel
    finally:
        await channel.close()


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[str]:
    """Serve HTTP/2 by hand: the preface and the settings are exchanged, then comes the script."""
    count = 0
    tasks = set[asyncio.Task[None]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        try:
            await reader.readexactly(len(http2.PREFACE))
            writer.write(http2.settings({}))
            await script(reader, writer, count)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def next_call(reader: asyncio.StreamReader) -> int:
    """Return the stream of the next request that has come whole."""
    while True:
        head = await reader.readexactly(http2.FRAME_HEAD)
        await reader.readexactly(int.from_bytes(head[:3]))
        if head[3] == http2.DATA and head[4] & http2.END_STREAM:
            return int.from_bytes(head[5:])


def fields(*pairs: tuple[str, str]) -> bytes:
    """Return a header block as other servers than gRPC's make them: with Huffman's code, and no table."""
    encoder = Encoder()
    encoder.header_table_size = 0
    return bytes(encoder.encode(pairs, huffman=True))


FIRST = fields((":status", "200"), ("content-type", "application/grpc+proto"))
OK = fields(("grpc-status", "0"))


def answer(stream: int, message: bytes = b"yes") -> bytes:
    data = b"\0" + len(message).to_bytes(4) + message
    return b"".join((
        http2.frame(http2.HEADERS, http2.END_HEADERS, stream, FIRST),
        http2.frame(http2.DATA, 0, stream, data),
        http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream, OK),
    ))  # fmt: skip


async def becomes(condition: Callable[[], bool], what: str) -> None:
    async def holds() -> bool:
        return condition()

    await eventually(holds, what)


async def failure(channel: UnaryChannel, message: bytes = b"", timeout_s: float = 60) -> CallError:
    with pytest.raises(CallError) as raised:
        await channel.call(METHOD, message, timeout_s=timeout_s)
    return raised.value


def test_messages_of_all_sizes_pass_side_by_side(tmp_path: Path) -> None:
    sizes = (0, 1, 16_378, 16_379, 16_380, 65_530, 65_531, 1 << 20, 6 << 20)

    async def story() -> None:
        for address in ("127.0.0.1:0", f"unix:{tmp_path / 'socket'}"):
            async with grpc_server(echo, address) as bound, channel_to(bound) as channel:
                sent = [bytes([number]) * size for number, size in enumerate(sizes * 4)]
                got = await asyncio.gather(*(channel.call(METHOD, raw, timeout_s=60) for raw in sent))
                assert got == sent

    asyncio.run(story())


def test_calls_wait_for_a_place_and_pass_it_on() -> None:
    async def story() -> None:
        gate, running = asyncio.Event(), 0

        async def slow(raw: bytes, _context: Any) -> bytes:
            nonlocal running
            running += 1
            await gate.wait()
            return raw

        async with grpc_server(slow, max_concurrent_streams=2) as address, channel_to(address) as channel:
            calls = [asyncio.create_task(channel.call(METHOD, b"%d" % n, timeout_s=60)) for n in range(10)]
            await becomes(lambda: running == 2, "two calls run")
            late = await failure(channel, timeout_s=0.05)
            assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED
            calls[2].cancel()
            calls[5].cancel()
            gate.set()
            got = await asyncio.gather(*calls, return_exceptions=True)
            assert [n for n, raw in enumerate(got) if raw != b"%d" % n] == [2, 5]

    asyncio.run(story())


def test_the_server_hears_of_callers_that_leave_and_of_time_that_is_up() -> None:
    async def story() -> None:
        ended, limits = list[str](), list[float]()

        async def endless(raw: bytes, context: Any) -> bytes:
            limits.append(context.time_remaining())
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append(raw.decode())
                raise
            return raw

        async with grpc_server(endless) as address, channel_to(address) as channel:
            call = asyncio.create_task(channel.call(METHOD, b"left", timeout_s=600))
            await becomes(lambda: len(limits) == 1, "the call runs")
            call.cancel()
            await becomes(lambda: ended == ["left"], "the server hears that the caller has left")
            assert 300 < limits[0] <= 600
            late = await failure(channel, b"late", timeout_s=0.2)
            assert (late.code, late.unsent) == (grpc.StatusCode.DEADLINE_EXCEEDED, False)
            await becomes(lambda: ended[1:] == ["late"], "the server hears that the time is up")

    asyncio.run(story())


def test_what_the_server_says_of_a_failure_arrives() -> None:
    async def story() -> None:
        async def fails(raw: bytes, context: Any) -> bytes:
            if raw == b"large":
                return bytes(MOST + 1)
            await context.abort(grpc.StatusCode.NOT_FOUND, "100 % of »it« is\nnot there")
            return b""

        async with grpc_server(fails) as address, channel_to(address) as channel:
            error = await failure(channel)
            assert (error.code, error.unsent) == (grpc.StatusCode.NOT_FOUND, False)
            assert error.details == "100 % of »it« is\nnot there"
            assert (await failure(channel, b"large")).code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (await failure(channel)).code is grpc.StatusCode.NOT_FOUND  # the connection goes on

    asyncio.run(story())


def test_connections_that_the_server_ends_cost_no_call() -> None:
    async def story() -> None:
        connections = set[str]()

        async def peers(raw: bytes, context: Any) -> bytes:
            connections.add(context.peer())
            return raw

        async with (
            grpc_server(peers, max_connection_age_ms=30, max_connection_age_grace_ms=60_000) as address,
            channel_to(address) as channel,
        ):

            async def caller() -> None:
                while len(connections) < 6:
                    assert await channel.call(METHOD, b"x", timeout_s=60) == b"x"

            async with asyncio.timeout(120):
                await asyncio.gather(*(caller() for _ in range(4)))

    asyncio.run(story())


def test_a_server_that_closes_at_once_is_not_called_again_and_again() -> None:
    connections = 0

    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.write(http2.settings({}) + http2.frame(http2.GOAWAY, payload=http2.number(0) + http2.number(0)))
        await reader.read()
        writer.close()

    async def story() -> None:
        server = await asyncio.start_server(closing, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, channel_to(address) as channel, asyncio.timeout(60):
            for _ in range(100):
                assert (await failure(channel)).unsent

    asyncio.run(story())
    assert connections < 100  # without a pause, three for each call


def test_closing_ends_a_connection_that_is_being_made_and_tells_its_callers() -> None:
    ended = asyncio.Event()
    begun = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begun.set()
        await reader.read()
        ended.set()
        writer.close()

    async def story() -> None:
        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        async with server, asyncio.timeout(60):
            channel = UnaryChannel(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", ca=None, most_bytes=1 << 20)
            caller = asyncio.create_task(failure(channel))
            await begun.wait()
            await channel.close()
            error = await caller
            assert (error.code, error.unsent) == (grpc.StatusCode.UNAVAILABLE, True)
            await ended.wait()

    asyncio.run(story())


def test_a_server_that_is_away_is_told_at_once_and_found_again(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'socket'}"

    async def story() -> None:
        async with channel_to(address) as channel:
            for _ in range(3):
                error = await failure(channel)
                assert (error.code, error.unsent) == (grpc.StatusCode.UNAVAILABLE, True)
            for _ in range(2):
                async with grpc_server(echo, address):
                    await channel.wait_until_connected(60)
                    assert await channel.call(METHOD, b"x", timeout_s=60) == b"x"
            with pytest.raises(TimeoutError):
                await channel.wait_until_connected(0.2)
        assert (await failure(channel)).unsent  # it is closed

    asyncio.run(story())


def test_the_server_must_have_a_certificate_of_the_authority_and_speak_tls_1_3(tmp_path: Path) -> None:
    workspace, other = make_workspace(tmp_path / "workspace"), make_workspace(tmp_path / "other")
    key, chain = workspace.home / "server.key", workspace.home / "server.pem"
    ca = workspace.trust / "ca.pem"
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.load_cert_chain(chain, key)
    old.set_alpn_protocols(["h2"])

    async def story() -> None:
        async with grpc_server(echo, credentials=server_credentials(key, chain)) as address:
            async with channel_to(address, ca) as channel:
                assert await channel.call(METHOD, bytes(1 << 20), timeout_s=60) == bytes(1 << 20)
            for wrong in (other.trust / "ca.pem", None):
                async with channel_to(address, wrong) as channel:
                    assert (await failure(channel)).unsent
        async with grpc_server(echo) as address, channel_to(address, ca) as channel:
            assert (await failure(channel)).unsent
        server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=old)
        async with server, channel_to(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", ca) as channel:
            assert (await failure(channel)).unsent

    asyncio.run(story())


def test_a_refused_call_is_sent_again_and_one_that_may_have_run_is_not() -> None:
    seen = list[int]()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int) -> None:
        while True:
            stream = await next_call(reader)
            seen.append(stream)
            match connection, len(seen):
                case _, 1:
                    writer.write(http2.frame(http2.RST_STREAM, 0, stream, http2.number(http2.REFUSED_STREAM)))
                case _, 2:
                    writer.write(http2.frame(http2.GOAWAY, payload=http2.number(1) + http2.number(0)))
                case 2, 3:
                    writer.write(answer(stream))
                case 2, 4:
                    writer.write(http2.frame(http2.RST_STREAM, 0, stream, http2.number(2)))
                case _:
                    return

    async def story() -> None:
        async with scripted(script) as address, channel_to(address) as channel:
            assert await channel.call(METHOD, b"x", timeout_s=60) == b"yes"
            assert seen == [1, 3, 1]
            error = await failure(channel)
            assert (error.code, error.unsent) == (grpc.StatusCode.INTERNAL, False)
            error = await failure(channel)  # the connection ends
            assert (error.code, error.unsent) == (grpc.StatusCode.UNAVAILABLE, False)
            assert len(seen) == 5

    asyncio.run(story())


def test_a_server_that_cancels_when_the_time_is_up_is_late_and_not_lost() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _connection: int) -> None:
        while True:
            stream = await next_call(reader)
            writer.write(http2.frame(http2.RST_STREAM, 0, stream, http2.number(http2.CANCEL)))

    async def story() -> None:
        async with scripted(script) as address, channel_to(address) as channel:
            assert (await failure(channel)).code is grpc.StatusCode.CANCELLED
            for _ in range(20):
                assert (await failure(channel, timeout_s=0.009)).code is grpc.StatusCode.DEADLINE_EXCEEDED

    asyncio.run(story())


def test_frames_that_only_other_servers_send_are_understood() -> None:
    data = b"\0\0\0\0\3yes"

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _connection: int) -> None:
        stream = await next_call(reader)
        early = fields((":status", "103"))
        for piece in (
            http2.frame(http2.HEADERS, http2.END_HEADERS, stream, early),
            http2.frame(
                http2.HEADERS, http2.PADDED | http2.HAS_PRIORITY, stream, b"\2" + bytes(5) + FIRST[:3] + b"\0\0"
            ),
            http2.frame(http2.CONTINUATION, 0, stream, FIRST[3:5]),
            http2.frame(http2.CONTINUATION, http2.END_HEADERS, stream, FIRST[5:]),
            http2.frame(http2.DATA, http2.PADDED, stream, b"\3" + data[:4] + b"\0\0\0"),
            http2.frame(0x42, 0, 0, b"unknown"),
            http2.frame(http2.PING, 0, 0, b"12345678"),
            http2.frame(http2.DATA, 0, stream + 40, b"of nobody"),
            http2.frame(http2.DATA, 0, stream, data[4:]),
            http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream, OK),
        ):
            for byte in piece:
                writer.write(bytes((byte,)))
                await writer.drain()
        await reader.read()

    async def story() -> None:
        async with scripted(script) as address, channel_to(address) as channel:
            assert await channel.call(METHOD, b"x", timeout_s=60) == b"yes"

    asyncio.run(story())


@given(
    kinds=st.lists(
        st.tuples(st.sampled_from((http2.DATA, http2.HEADERS, http2.PING)), st.integers(0, 40)), max_size=12
    ),
    cuts=st.lists(st.integers(1, 30), max_size=60),
)
def test_frames_are_the_same_wherever_the_socket_cuts_them(kinds: list[tuple[int, int]], cuts: list[int]) -> None:
    flags = http2.END_STREAM | http2.END_HEADERS
    wanted = [(kind, flags, n, bytes([n]) * size) for n, (kind, size) in enumerate(kinds, 1)]
    sent = http2.settings({}) + b"".join(http2.frame(kind, flags, n, load) for kind, flags, n, load in wanted)
    reader, got = FrameReader(), list[tuple[int, int, int, bytes]]()
    for cut in [*cuts, len(sent)]:
        piece, sent = sent[:cut], sent[cut:]
        for kind, flags, n, load, _ in reader.feed(piece) if piece else ():
            if got and kind == http2.DATA and got[-1][:3] == (kind, 0, n):
                load = got.pop()[3] + load
            got.append((kind, flags, n, load))
    assert got[1:] == wanted


def test_headers_too_large_to_be_read_are_left_out_wherever_they_are_cut() -> None:
    large = bytes(http2.MOST_HEADERS + 1)
    reader = FrameReader()
    reader.feed(http2.settings({}))
    whole = reader.feed(http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1, large))
    assert whole == [(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1, b"", len(large))]
    parts = http2.frame(http2.HEADERS, http2.END_STREAM, 3, large[:40_000])
    parts += http2.frame(http2.CONTINUATION, http2.END_HEADERS, 3, large[40_000:])
    assert reader.feed(parts) == [(http2.HEADERS, http2.END_STREAM, 3, b"", len(large))]
    parts = http2.frame(http2.HEADERS, 0, 5, large[:100]) + http2.frame(http2.CONTINUATION, http2.END_HEADERS, 5, b"y")
    assert reader.feed(parts) == [(http2.HEADERS, 0, 5, large[:100] + b"y", 101)]


BROKEN = {
    "too large": b"\xff\xff\xff" + bytes((http2.DATA, 0)) + (1).to_bytes(4),
    "too much padding": http2.frame(http2.DATA, http2.PADDED, 1, b"\x09abc"),
    "no padding": http2.frame(http2.HEADERS, http2.PADDED, 1, b""),
    "a table": http2.frame(http2.HEADERS, http2.END_HEADERS, 1, b"\xbe"),
    "no headers": http2.frame(http2.HEADERS, http2.END_HEADERS, 1, b"\x00\x7f"),
    "a push": http2.frame(http2.PUSH_PROMISE, http2.END_HEADERS, 1, bytes(4) + FIRST),
    "no end of headers": http2.frame(http2.HEADERS, 0, 1, FIRST) + http2.frame(http2.DATA, 0, 1),
    "endless headers": http2.frame(http2.HEADERS, 0, 1, FIRST)
    + 17 * http2.frame(http2.CONTINUATION, 0, 1, bytes(1 << 20)),
    "a short reset": http2.frame(http2.RST_STREAM, 0, 1, b"\0"),
    "a short number": http2.frame(http2.GOAWAY, payload=b"\0\0"),
    "half a setting": http2.frame(http2.SETTINGS, payload=b"\0\4\0"),
    "a window beyond all": http2.settings({http2.INITIAL_WINDOW_SIZE: 1 << 31}),
    "a tiny frame": http2.settings({http2.MAX_FRAME_SIZE: 1}),
}


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN)
def test_what_is_not_http2_ends_the_connection_and_its_calls(sent: bytes) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int) -> None:
        stream = await next_call(reader)
        writer.write(sent if connection == 1 else answer(stream))
        await reader.read()

    async def story() -> None:
        async with scripted(script) as address, channel_to(address) as channel:
            error = await failure(channel)
            assert (error.code, error.unsent) == (grpc.StatusCode.UNAVAILABLE, False)
            assert await channel.call(METHOD, b"x", timeout_s=60) == b"yes"

    asyncio.run(story())


ODD = {
    "not gRPC": (fields((":status", "200"), ("content-type", "text/html")), b"", grpc.StatusCode.UNKNOWN),
    "a proxy's": (fields((":status", "503")), b"", grpc.StatusCode.UNAVAILABLE),
    "no status": (FIRST, b"", grpc.StatusCode.INTERNAL),
    "no number": (FIRST, fields(("grpc-status", "x")), grpc.StatusCode.INTERNAL),
    "a number without end": (FIRST, fields(("grpc-status", "9" * 5000)), grpc.StatusCode.INTERNAL),
    "too many fields": (FIRST, fields(*[("a", "b")] * 5000), grpc.StatusCode.RESOURCE_EXHAUSTED),
    "a status of the future": (FIRST, fields(("grpc-status", "99")), grpc.StatusCode.UNKNOWN),
    "no message": (FIRST, OK, grpc.StatusCode.INTERNAL),
    "too much said": (FIRST, fields(("grpc-message", "~" * 100_000)), grpc.StatusCode.RESOURCE_EXHAUSTED),
}


@pytest.mark.parametrize(("first", "last", "code"), ODD.values(), ids=ODD)
def test_odd_answers_are_failures_of_their_call(first: bytes, last: bytes, code: grpc.StatusCode) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _connection: int) -> None:
        stream = await next_call(reader)
        writer.write(http2.frame(http2.HEADERS, http2.END_HEADERS, stream, first))
        if last:
            writer.write(http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream, last))
        else:
            writer.write(http2.frame(http2.DATA, http2.END_STREAM, stream, b"\0\0\0\0\1x"))
        writer.write(answer(await next_call(reader)))
        await reader.read()

    async def story() -> None:
        async with scripted(script) as address, channel_to(address) as channel:
            error = await failure(channel)
            assert (error.code, error.unsent) == (code, False)
            assert await channel.call(METHOD, b"x", timeout_s=60) == b"yes"

    asyncio.run(story())
