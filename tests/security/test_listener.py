"""Each limit of a listener, with the attack that it stops; and that without the limit the attack is not stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from security.limits import ListenerLimits
from tests.attacks import wire
from tests.attacks.wire import Frame, Wire
from tests.security.listeners import BIG, ECHO, HOLD, KNOWN, Place, with_listener

pytestmark = pytest.mark.slow

FAR = 300.0  # seconds: a limit that is not reached


def attacked(workspace: Path, attack: Callable[[Place], Any], **limits: Any) -> Any:
    """Run a blocking attack against a listener; return what it saw. Whatever happened, the next caller is served."""

    async def story(place: Place) -> Any:
        seen = await asyncio.to_thread(attack, place)
        assert await place.echo() == b"hello"
        return seen

    return with_listener(workspace, story, **limits)


def until_closed(connection: Wire, seconds: float) -> list[Frame] | None:
    """Return what comes until the server closes the connection, or None when it is open after so many seconds."""
    got, closed = collected(connection, seconds)
    return got if closed else None


def collected(connection: Wire, seconds: float, *, enough: int = 1 << 30) -> tuple[list[Frame], bool]:
    """Return what comes within so many seconds, until it is enough, and whether the server closed the connection."""
    got, end = list[Frame](), time.monotonic() + seconds
    connection.sock.settimeout(0.1)
    frames = connection.frames()
    while time.monotonic() < end and len(got) < enough:
        try:
            got.append(next(frames))
        except TimeoutError:
            frames = connection.frames()
        except StopIteration:
            return got, True
    return got, False


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", b"/test.Limited/\xff", b"/test.Limited/echo\n", b"/test.Limited/\x00", b"", b"/" * 4000]
)
def test_a_call_to_a_name_that_is_none_does_not_end_the_listener(workspace: Path, name: bytes) -> None:
    def attack(place: Place) -> bytes:
        with Wire.open(place.address, place.ca) as connection:
            connection.call(name, data=b"x")
            answer = connection.until(wire.HEADERS)
            assert answer is not None
            return answer.payload

    assert b"\x0212" in attacked(workspace, attack)  # UNIMPLEMENTED


@pytest.mark.parametrize(("limit", "held"), [(20, 20), (1000, 60)])
def test_open_connections_are_limited(workspace: Path, limit: int, held: int) -> None:
    def attack(place: Place) -> int:
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(wire.connect(place.address)) for _ in range(60)]
            end = time.monotonic() + 3
            while (still := sum(map(is_open, sockets))) > held and time.monotonic() < end:
                time.sleep(0.02)
            return still

    assert attacked(workspace, attack, connections=limit, handshake_s=FAR) == held


def is_open(sock: Any) -> bool:
    sock.setblocking(False)
    try:
        return bool(sock.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


def silent(place: Place) -> Wire:
    return Wire(wire.connect(place.address), polite=False)


def without_preface(place: Place) -> Wire:
    connection = Wire.open(place.address, place.ca, preface=False)
    connection.polite = False
    return connection


def without_settings(place: Place) -> Wire:
    connection = without_preface(place)
    connection.send(wire.PREFACE)
    return connection


def half_a_hello(place: Place) -> Wire:
    connection = silent(place)
    connection.send(b"\x16\x03\x01\x02\x00\x01\x00")
    return connection


@pytest.mark.parametrize("start", [silent, half_a_hello, without_preface, without_settings])
@pytest.mark.parametrize("limit_s", [0.3, FAR])
def test_handshakes_have_a_time_limit(workspace: Path, start: Callable[[Place], Wire], limit_s: float) -> None:
    def attack(place: Place) -> bool:
        with start(place) as connection:
            return until_closed(connection, 3 * 0.3 if limit_s == FAR else 20) is not None

    assert attacked(workspace, attack, handshake_s=limit_s) is (limit_s != FAR)


@pytest.mark.parametrize("limit_s", [1.0, FAR])
def test_a_connection_without_calls_is_ended(workspace: Path, limit_s: float) -> None:
    def attack(place: Place) -> bool:
        with Wire.open(place.address, place.ca) as connection:
            frames = until_closed(connection, 2 if limit_s == FAR else 30)
            return frames is not None and frames[-1].kind == wire.GOAWAY

    assert attacked(workspace, attack, idle_s=limit_s) is (limit_s != FAR)


@pytest.mark.parametrize("limit_s", [1.0, FAR])
def test_headers_that_never_end_are_ended_with_the_idle_connection(workspace: Path, limit_s: float) -> None:
    def attack(place: Place) -> bool:
        with Wire.open(place.address, place.ca) as connection:
            first = connection.until(wire.SETTINGS)
            while first is not None and first.flags != wire.ACK:  # nothing may come between parts of a block
                first = connection.until(wire.SETTINGS)
            connection.polite = False
            headers = wire.block(wire.request_headers(ECHO.encode()))
            connection.send(wire.frame(wire.HEADERS, 0, connection.new_stream(), headers))
            return until_closed(connection, 2 if limit_s == FAR else 30) is not None

    assert attacked(workspace, attack, idle_s=limit_s) is (limit_s != FAR)


@pytest.mark.parametrize("limit_s", [1.0, 0.0])
def test_old_connections_are_ended_with_their_streams(workspace: Path, limit_s: float) -> None:
    def attack(place: Place) -> bool:
        with Wire.open(place.address, place.ca) as connection:
            connection.call(HOLD.encode(), data=b"x")
            frames = until_closed(connection, 30 if limit_s else 2.5)
            return frames is not None and wire.GOAWAY in {frame.kind for frame in frames}

    assert attacked(workspace, attack, age_s=limit_s, age_grace_s=1) is bool(limit_s)


@pytest.mark.parametrize("limit_s", [1.0, 0.0])
def test_answers_that_nobody_reads_are_kept_as_long_as_the_connection(workspace: Path, limit_s: float) -> None:
    def attack(place: Place) -> bool:
        with Wire.open(place.address, place.ca, initial_window_size=0) as connection:
            for _ in range(4):
                connection.call(BIG.encode(), data=b"x")
            return until_closed(connection, 30 if limit_s else 2.5) is not None

    assert attacked(workspace, attack, age_s=limit_s, age_grace_s=1) is bool(limit_s)


@pytest.mark.parametrize("limit_s", [1.0, FAR])
def test_a_peer_that_reads_nothing_is_found_by_keepalive(workspace: Path, limit_s: float) -> None:
    def attack(place: Place) -> bool:
        with Wire.open(place.address, place.ca, initial_window_size=(1 << 31) - 1) as connection:
            connection.send(wire.frame(wire.WINDOW_UPDATE, payload=(1 << 30).to_bytes(4)))
            for _ in range(8):
                connection.call(BIG.encode(), data=b"x")
            end = time.monotonic() + (2.5 if limit_s == FAR else 30)
            while established(place) and time.monotonic() < end:
                time.sleep(0.05)
            return not established(place)

    limits = {"keepalive_s": limit_s, "keepalive_timeout_s": 1.0 if limit_s != FAR else FAR}
    assert attacked(workspace, attack, peer_calls=100, age_s=0, **limits) is (limit_s != FAR)


def established(place: Place) -> bool:
    """Return whether the listener has an open connection, by the kernel's table."""
    port = f":{int(place.address.rpartition(':')[2]):04X}"
    tables = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    rows = [line.split() for line in tables.splitlines()]
    return any(len(row) > 3 and row[1].endswith(port) and row[3] == "01" for row in rows)


@pytest.mark.parametrize(("limit", "refused"), [(50, 150), (1000, 0)])
def test_streams_of_one_connection_are_limited(workspace: Path, limit: int, refused: int) -> None:
    def attack(place: Place) -> int:
        with Wire.open(place.address, place.ca) as connection:
            headers = wire.block(wire.request_headers(ECHO.encode()))
            frames = [wire.frame(wire.HEADERS, wire.END_HEADERS, connection.new_stream(), headers) for _ in range(200)]
            connection.send(b"".join(frames))
            seen, _ = collected(connection, 20 if refused else 2, enough=refused or 1 << 30)
            while refused and len(calm(seen)) < refused:
                more, closed = collected(connection, 20, enough=1)
                assert more
                assert not closed
                seen += more
            return len(calm(seen))

    assert attacked(workspace, attack, streams=limit, peer_calls=1000, stranger_calls=1000) == refused


def calm(frames: list[Frame]) -> list[Frame]:
    return [frame for frame in frames if frame.kind == wire.RST_STREAM and frame.error_code == wire.ENHANCE_YOUR_CALM]


@pytest.mark.parametrize("interval_s", [60.0, 0.0])
def test_pings_without_end_end_the_connection(workspace: Path, interval_s: float) -> None:
    def attack(place: Place) -> bool:
        with Wire.open(place.address, place.ca) as connection:
            connection.send(wire.frame(wire.PING, payload=b"pingping") * 20)
            answer = connection.until(wire.GOAWAY) if interval_s else None
            return answer is not None and b"too_many_pings" in answer.payload

    assert attacked(workspace, attack, ping_interval_s=interval_s) is bool(interval_s)


# What each frame alone may hold, gRPC's core looks at; 12 KiB in several, the guard does.
@pytest.mark.parametrize(
    ("limit", "frames", "refused"),
    [(8 << 10, 1, True), (8 << 10, 20, True), (12 << 10, 20, True), (1 << 20, 1, False), (1 << 20, 20, False)],
)
@pytest.mark.parametrize("method", [ECHO, KNOWN])
def test_metadata_is_limited_in_one_frame_and_in_many(
    workspace: Path, method: str, limit: int, frames: int, refused: bool
) -> None:
    def attack(place: Place) -> bytes:
        with Wire.open(place.address, place.ca) as connection:
            stream = connection.new_stream()
            first = wire.request_headers(method.encode())
            blocks = [wire.block([*first, (b"x-0", b"v" * 10_000)])]
            blocks += [wire.literal(b"x-%d" % n, b"v" * 4000) for n in range(1, frames)]
            kinds = [wire.HEADERS] + [wire.CONTINUATION] * (len(blocks) - 1)
            for number, (kind, block) in enumerate(zip(kinds, blocks, strict=True), 1):
                connection.send(wire.frame(kind, wire.END_HEADERS if number == len(blocks) else 0, stream, block))
            connection.send(wire.frame(wire.DATA, wire.END_STREAM, stream, wire.message(b"x")))
            end = next((f for f in connection.frames() if f.kind == wire.HEADERS and f.flags & wire.END_STREAM), None)
            assert end is not None
            return end.payload

    exhausted = b"\x018" in attacked(workspace, attack, metadata_bytes=limit)
    assert exhausted is refused


def test_calls_in_progress_are_limited(workspace: Path) -> None:
    async def story(place: Place) -> list[str]:
        async with place.channel() as channel:
            hold: Any = channel.unary_stream(HOLD)
            held = [hold(b"x") for _ in range(3)]
            assert [await anext(aiter(call)) for call in held] == [b"held"] * 3
            refused = hold(b"x")
            code = await refused.code()
            for call in held:
                call.cancel()
        assert await eventually_echo(place) == b"hello"
        return [code.name]

    assert with_listener(workspace, story, calls=3) == ["RESOURCE_EXHAUSTED"]


async def eventually_echo(place: Place) -> bytes:
    """Call until a place is free: a cancelled call is gone a moment after it was cancelled."""
    import grpc

    async with asyncio.timeout(20):
        while True:
            try:
                return await place.echo()
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.02)


def test_connections_never_take_all_files(workspace: Path) -> None:
    program = (
        "import resource, sys\n"
        "from isthmus import tls13; tls13.enforce()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, int(sys.argv[1])))\n"
        "from security.limits import allowed_connections\n"
        "print(allowed_connections(1000), resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )

    def run(hard: int) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", program, str(hard)], capture_output=True, text=True, check=True, timeout=60,
            env=os.environ | {"PYTHONPATH": ".:proto"},
        )  # fmt: skip
        return done.stdout.splitlines()[-1], done.stdout + done.stderr

    assert run(5000)[0] == "1000 1128"
    allowed, log = run(300)
    assert allowed == "172 300"
    assert "too few open files" in log


def test_the_limits_are_what_the_documentation_says() -> None:
    rows = Path("docs/deployment.md").read_text()
    for name in ListenerLimits.model_fields:
        assert f"`{name}`" in rows, name
