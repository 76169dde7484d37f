"""Floods, slow peers and half-open connections against running servers.

While an attack runs, a well-behaved client is served without one failure; afterwards the server has given back
memory, threads and files. What each single limit stops is told by tests/security/test_listener.py.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import grpc
import pytest

from tests.attacks import wire
from tests.attacks.stage import WHO_AM_I, GoodClient, Target, is_served, program, wait_until
from tests.attacks.wire import Wire
from tests.cloud.workspaces import make_workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ATTACK_S: Final = 1.0
METHOD: Final = b"/grpc.health.v1.Health/Check"  # the only kind of method that strangers get to
GROWTH_MIB: Final = 64  # of resident memory, after an attack: what allocators keep
FEW: Final = 12  # threads and files more than before: pools that grow once, connections of the tests themselves


def opened(target: Target) -> Wire:
    return Wire.open(target.address, target.ca)


def flood(target: Target, make: Callable[[Wire], bytes], *, prologue: bytes = b"") -> None:
    """Send frames for as long as an attack lasts; connect again when the server hangs up."""
    end = time.monotonic() + ATTACK_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError), opened(target) as connection:
            connection.sock.settimeout(ATTACK_S)
            connection.send(prologue)
            while time.monotonic() < end:
                connection.send(make(connection))


def headers(connection: Wire, *, flags: int = wire.END_HEADERS) -> bytes:
    block = wire.block(wire.request_headers(METHOD))
    return wire.frame(wire.HEADERS, flags, connection.new_stream(), block)


def rapid_reset(target: Target) -> None:
    """CVE-2023-44487."""

    def pairs(connection: Wire) -> bytes:
        out = b""
        for _ in range(100):
            out += headers(connection)
            out += wire.frame(wire.RST_STREAM, 0, connection.last_stream, wire.CANCEL.to_bytes(4))
        return out

    flood(target, pairs)


def half_open_streams(target: Target) -> None:
    """A thousand calls whose request never comes, on several connections."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(opened(target)) for _ in range(10)]
        for connection in connections:
            connection.send(b"".join(headers(connection) for _ in range(100)))
        time.sleep(ATTACK_S)


def half_open_connections(target: Target) -> None:
    """A thousand connections that say nothing."""
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(wire.connect(target.address))
        time.sleep(ATTACK_S)


def unfinished_tls(target: Target) -> None:
    """A hundred TLS handshakes, byte by byte."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(wire.connect(target.address)) for _ in range(100)]
        hello = client_hello()
        for byte in hello[:20]:
            for sock in sockets:
                with contextlib.suppress(OSError):
                    sock.sendall(bytes((byte,)))
            time.sleep(ATTACK_S / 20)


def client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


def without_preface(target: Target) -> None:
    """TLS, and no HTTP/2."""
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(Wire.open(target.address, target.ca, preface=False))
        time.sleep(ATTACK_S)


def headers_without_end(target: Target) -> None:
    """Header blocks that go on byte by byte and never end."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(opened(target)) for _ in range(10)]
        for connection in connections:
            connection.send(wire.frame(wire.SETTINGS, wire.ACK) + headers(connection, flags=0))
        for _ in range(20):
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.send(wire.frame(wire.CONTINUATION, 0, connection.last_stream, b"\0"))
            time.sleep(ATTACK_S / 20)


def body_byte_by_byte(target: Target) -> None:
    """Requests that come one byte at a time."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(opened(target)) for _ in range(10)]
        for connection in connections:
            connection.call(METHOD)
        for byte in wire.message(bytes(15)):
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.send(wire.frame(wire.DATA, 0, connection.last_stream, bytes((byte,))))
            time.sleep(ATTACK_S / 20)


def continuation_flood(target: Target) -> None:
    """CVE-2024-27316: a header block of a gigabyte, if the server lets it."""
    flood_of_continuations(target, wire.literal(b"x-more", b"v" * 8000))


def empty_continuation_flood(target: Target) -> None:
    """Frames with nothing in them that are part of a header block."""
    flood_of_continuations(target, b"")


def flood_of_continuations(target: Target, part: bytes) -> None:
    first = wire.frame(wire.HEADERS, 0, 1, wire.block(wire.request_headers(METHOD)))
    more = wire.frame(wire.CONTINUATION, 0, 1, part) * 50
    flood(target, lambda _: more, prologue=wire.frame(wire.SETTINGS, wire.ACK) + first)


def settings_flood(target: Target) -> None:
    """SETTINGS that have to be acknowledged, and nobody reads the acknowledgements."""
    frames = wire.settings(initial_window_size=65_535) * 100
    flood(target, lambda _: frames)


def ping_flood(target: Target) -> None:
    """CVE-2019-9512."""
    frames = wire.frame(wire.PING, payload=b"pingping") * 100
    flood(target, lambda _: frames)


def empty_data_flood(target: Target) -> None:
    """CVE-2019-9518: frames without content."""

    def empty(connection: Wire) -> bytes:
        first = headers(connection) if connection.last_stream < 0 else b""
        return first + wire.frame(wire.DATA, 0, connection.last_stream) * 100

    flood(target, empty)


def priority_and_window_flood(target: Target) -> None:
    """CVE-2019-9513, and windows opened one byte at a time."""
    frames = wire.frame(wire.PRIORITY, 0, 1, b"\0\0\0\3\x10") + wire.frame(wire.WINDOW_UPDATE, payload=b"\0\0\0\1")
    flood(target, lambda _: frames * 100)


def hpack_bomb(target: Target) -> None:
    """One large header in the table, named in each of 12,000 bytes: 48 MB a request."""

    def bomb(connection: Wire) -> bytes:
        block = wire.block(wire.request_headers(METHOD)) + wire.literal(b"x-bomb", b"z" * 3900, 0x40) + b"\xbe" * 12_000
        return wire.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, connection.new_stream(), block)

    flood(target, bomb)


def ten_thousand_headers(target: Target) -> None:
    """Ten thousand headers in one request, and again."""
    many = wire.block([*wire.request_headers(METHOD), *((b"x-%d" % n, b"v") for n in range(10_000))])
    parts = [many[start : start + 16_000] for start in range(0, len(many), 16_000)]

    def request(connection: Wire) -> bytes:
        stream = connection.new_stream()
        middle = b"".join(wire.frame(wire.CONTINUATION, 0, stream, part) for part in parts[1:-1])
        last = wire.frame(wire.CONTINUATION, wire.END_HEADERS, stream, parts[-1])
        return wire.frame(wire.HEADERS, wire.END_STREAM, stream, parts[0]) + middle + last

    flood(target, request)


def closed_windows(target: Target) -> None:
    """Callers that never let an answer through."""
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(Wire.open(target.address, target.ca, initial_window_size=0)) for _ in range(10)
        ]
        for connection in connections:
            for _ in range(20):
                connection.call(METHOD, data=b"")
        time.sleep(ATTACK_S)


def plain_text(target: Target) -> None:
    """HTTP/2 without TLS, HTTP/1.1, and noise."""
    for hello in (wire.PREFACE + wire.settings(), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(range(256)) * 8):
        with wire.connect(target.address) as sock:
            answer = b""
            with contextlib.suppress(OSError):
                sock.sendall(hello)
                answer = sock.recv(100)
            assert b"HTTP" not in answer
            assert answer[:1] in (b"", b"\x15")  # closed, or a TLS alert


def names_that_are_none(target: Target) -> None:
    """Calls to methods whose names are no text; one of them used to end a grpc.aio server for good."""
    for name in (b"/\xff\xfe", b"\xff", b"/a\n", b"/\x00", b""):
        with opened(target) as connection:
            connection.call(name, data=b"")
            assert connection.until(wire.HEADERS) is not None


ATTACKS: Final = (
    rapid_reset, half_open_streams, half_open_connections, unfinished_tls, without_preface, headers_without_end,
    body_byte_by_byte, continuation_flood, empty_continuation_flood, settings_flood, ping_flood, empty_data_flood,
    priority_and_window_flood, hpack_bomb, ten_thousand_headers, closed_windows, plain_text, names_that_are_none,
)  # fmt: skip


@contextlib.contextmanager
def undisturbed(target: Target) -> Iterator[None]:
    """Check that a well-behaved client is served while the block runs, and that nothing is left of it afterwards."""
    wait_until(lambda: is_served(target), "the server serves")
    before = target.usage()
    with GoodClient(target).calling() as client:
        yield
        wait_until(lambda: client.answered > 10, "the well-behaved client is answered")
    assert not client.failures
    wait_until(lambda: is_served(target), "a new client is served")
    wait_until(lambda: target.usage().files <= before.files + FEW, "files are given back")
    wait_until(lambda: target.usage().memory <= before.memory + GROWTH_MIB, "memory is given back", 120)
    assert target.usage().threads <= before.threads + FEW


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_others_are_served_and_nothing_is_left(target: Target, attack: Callable[[Target], None]) -> None:
    with undisturbed(target):
        attack(target)


def test_connections_never_use_up_the_open_files(tmp_path: Path) -> None:
    """A process that may open 300 files says how many connections it takes, and goes on when more come."""
    workspace = make_workspace(tmp_path / "workspace")
    words = ("cloud", "serve", "--home", workspace.home, "--listen", "127.0.0.1:0")
    with program(tmp_path, "cloud", *words, files=300) as (ready, log):
        assert "fewer connections than configured" in log.read_text()
        address, token = str(ready["address"]), workspace.token("operator")
        cloud = Target("cloud", address, workspace.trust / "ca.pem", int(ready["pid"]), token, log, WHO_AM_I, b"")
        with undisturbed(cloud), contextlib.ExitStack() as stack:
            for _ in range(600):
                stack.enter_context(wire.connect(address))
            wait_until(lambda: cloud.usage().files > 150, "the connections are there")
            assert cloud.usage().files < 300
        assert "Too many open files" not in log.read_text()


def test_a_stranger_is_refused_before_its_request_is_read(target: Target) -> None:
    with opened(target) as connection:
        connection.call(target.method.encode())  # no token, and no byte of a request
        answer = connection.until(wire.HEADERS)
        assert answer is not None
        assert b"grpc-status\x0216" in answer.payload  # UNAUTHENTICATED


@pytest.mark.parametrize("token", [False, True])
def test_reflection_is_for_callers_with_tokens(target: Target, token: bool) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with target.channel() as channel:
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = stub.ServerReflectionInfo(
            iter([asked]), metadata=target.bearer if token else (), timeout=30, wait_for_ready=True
        )
        if token:
            assert len(next(answers).list_services_response.service) > 2
        else:
            with pytest.raises(grpc.RpcError) as caught:
                next(answers)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
