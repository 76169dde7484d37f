"""What one caller may cost while its calls are in progress; without the limit, the same attack goes through."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus.status import REASON_KEY
from isthmus.v1 import fleet_pb2
from security.enrolment import IssuingCa, make_csr, new_device_key
from tests.attacks import wire
from tests.attacks.wire import Wire
from tests.security.listeners import ECHO, HOLD, KNOWN, PARSED, UPLOAD, Place, with_listener

pytestmark = pytest.mark.slow

FAR = 300.0  # seconds: a limit that is not reached
GRPC_STATUS = {4: b"\x014", 8: b"\x018"}  # DEADLINE_EXCEEDED and RESOURCE_EXHAUSTED, as they travel


def first_end(connection: Wire, seconds: float) -> bytes | None:
    """Return the trailers of the next call that ends, or None when none does in time."""
    connection.sock.settimeout(seconds)
    try:
        frames = connection.frames()
        return next((f.payload for f in frames if f.kind == wire.HEADERS and f.flags & wire.END_STREAM), b"")
    except TimeoutError:
        return None


@pytest.mark.parametrize("limit_s", [0.3, FAR])
@pytest.mark.parametrize("body", [b"", b"\x00\x00\x00\x00\x05h", b"\x00\x7f\xff\xff\xff"])
def test_a_request_that_never_comes_whole_is_not_waited_for(workspace: Path, body: bytes, limit_s: float) -> None:
    def attack(place: Place) -> bytes | None:
        with Wire.open(place.address, place.ca) as connection:
            stream = connection.call(ECHO.encode())
            for number in range(len(body)):  # byte by byte
                connection.send(wire.frame(wire.DATA, 0, stream, body[number : number + 1]))
            return first_end(connection, 1 if limit_s == FAR else 20)

    async def story(place: Place) -> bytes | None:
        return await asyncio.to_thread(attack, place)

    end = with_listener(workspace, story, request_s=limit_s)
    if body.startswith(b"\x00\x7f"):  # two gigabytes are announced: refused before the first byte of them
        assert end is not None
        assert GRPC_STATUS[8] in end
    elif limit_s == FAR:
        assert end is None
    else:
        assert end is not None
        assert GRPC_STATUS[4] in end


async def two_and_silence(after: asyncio.Event) -> AsyncIterator[bytes]:
    yield b"one"
    yield b"two"
    await after.wait()


@pytest.mark.parametrize("limit_s", [0.3, FAR])
def test_an_upload_that_falls_silent_is_not_waited_for(workspace: Path, limit_s: float) -> None:
    async def story(place: Place) -> bool:
        never = asyncio.Event()
        async with place.method("stream_unary", UPLOAD) as upload:
            call = upload(two_and_silence(never), timeout=1.5 if limit_s == FAR else 60)
            with pytest.raises(grpc.aio.AioRpcError):
                await call
            told = dict(await call.trailing_metadata() or ())
            return REASON_KEY in told  # the server's own refusal, not the caller's deadline

    assert with_listener(workspace, story, stream_idle_s=limit_s) is (limit_s != FAR)


def test_an_upload_goes_on_for_as_long_as_it_moves(workspace: Path) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(10):
            await asyncio.sleep(0.2)
            yield b"part"

    async def story(place: Place) -> bytes:
        async with place.method("stream_unary", UPLOAD) as upload:
            answer: bytes = await upload(slowly(), timeout=60)
            return answer

    assert with_listener(workspace, story, stream_idle_s=1.8) == b"40"


@pytest.mark.parametrize(
    ("limits", "method", "held"),
    [
        ({"peer_calls": 3}, HOLD, 3),
        ({"peer_calls": 100, "stranger_calls": 4}, HOLD, 4),
        ({"peer_calls": 100, "stranger_calls": 100}, HOLD, 10),
    ],
)
def test_a_stranger_holds_few_calls_and_callers_with_tokens_are_served(
    workspace: Path, limits: dict[str, Any], method: str, held: int
) -> None:
    async def story(place: Place) -> tuple[int, bytes]:
        async with place.method("unary_stream", method) as hold:
            calls = [hold(b"x", timeout=60) for _ in range(10)]
            ends = await asyncio.gather(*(first(call) for call in calls))
            return ends.count(b"held"), await place.echo(KNOWN, token=True)

    assert with_listener(workspace, story, **limits) == (held, b"hello")


def make_device(workspace: Path, folder: Path, name: str) -> tuple[Path, Path]:
    """Return key and certificate of a device, as enrolment leaves them."""
    key, certificate = folder / f"{name}.key", folder / f"{name}.pem"
    request = make_csr(new_device_key(key), name, ())
    certificate.write_bytes(IssuingCa.load(workspace / "cloud").sign(request, name, datetime.now(UTC)))
    return key, certificate


def test_devices_with_certificates_are_kept_out_by_no_strangers_and_by_no_neighbours(
    workspace: Path, tmp_path: Path
) -> None:
    """All of them ask for their tokens from one address, as devices behind one router do."""
    devices = [make_device(workspace, tmp_path, f"camera-{number}") for number in range(6)]

    async def story(place: Place) -> list[bytes]:
        async with place.method("unary_stream", HOLD) as hold:
            strangers = [hold(b"x", timeout=60) for _ in range(10)]
            assert [await first(call) for call in strangers].count(b"held") == 3
            async with contextlib.AsyncExitStack() as stack:
                calls: list[Any] = []
                for device in devices:
                    channel = await stack.enter_async_context(place.device_channel(*device))
                    hold_here: Any = channel.unary_stream(HOLD)
                    calls.append(hold_here(b"x", timeout=60))
                return [await first(call) for call in calls]

    assert with_listener(workspace, story, peer_calls=4, stranger_calls=3) == [b"held"] * 6


def test_a_device_holds_no_more_calls_than_an_address(workspace: Path, tmp_path: Path) -> None:
    device = make_device(workspace, tmp_path, "camera")

    async def story(place: Place) -> int:
        async with place.device_channel(*device) as one, place.device_channel(*device) as other:
            methods: list[Any] = [channel.unary_stream(HOLD) for channel in (one, other)]
            calls = [method(b"x", timeout=60) for method in methods for _ in range(4)]
            return [await first(call) for call in calls].count(b"held")

    assert with_listener(workspace, story, peer_calls=3) == 3


async def first(call: Any) -> bytes:
    answer: bytes | object
    try:
        answer = await anext(aiter(call))
    except grpc.aio.AioRpcError as error:
        answer = (error.code(), dict(error.trailing_metadata())[REASON_KEY])
    assert answer in (b"held", (grpc.StatusCode.RESOURCE_EXHAUSTED, "too-many-calls"))
    return answer if isinstance(answer, bytes) else b""


def test_places_are_given_back(workspace: Path) -> None:
    async def story(place: Place) -> None:
        async with place.method("unary_stream", HOLD) as hold, place.method("unary_unary", PARSED) as parsed:
            for _ in range(20):  # one at a time: cancelled, refused, answered
                call = hold(b"x", timeout=60)
                assert await anext(aiter(call)) == b"held"
                call.cancel()
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await parsed(b"\xff", timeout=60)
                async with asyncio.timeout(20):
                    while True:
                        with contextlib.suppress(grpc.aio.AioRpcError):
                            assert await place.echo() == b"hello"
                            break

    with_listener(workspace, story, peer_calls=2, stranger_calls=2)


@pytest.mark.parametrize("raw", [b"\xff", b"\x0a\xff\xff\xff\x7f", b"\x0a\x02\xff\xfe", b"GET / HTTP/1.1\r\n\r\n"])
def test_bytes_that_are_no_message_are_the_callers_error(workspace: Path, raw: bytes) -> None:
    async def story(place: Place) -> tuple[grpc.StatusCode, str]:
        async with place.method("unary_unary", PARSED) as parsed:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await parsed(raw, timeout=30)
            assert await parsed(fleet_pb2.EnrolRequest(code="code").SerializeToString(), timeout=30) == b"code"
            return caught.value.code(), str(caught.value.details())

    code, details = with_listener(workspace, story)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details == f"expected a serialized message, got {len(raw)} bytes that are not one"
