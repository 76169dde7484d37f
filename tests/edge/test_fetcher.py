"""Fetching over a real channel: offsets, limits, broken streams."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from edge.fetcher import METADATA_BYTES, Pace, RegistryFetcher
from edge.uplink import open_channel
from isthmus.errors import DigestMismatchError, NotFoundError, UnavailableError
from isthmus.v1 import registry_pb2, registry_pb2_grpc
from tests.edge.faulty_cloud import make_identity
from tests.edge.manual_time import ManualTime

DATA = bytes(range(256)) * 4


class Servicer(registry_pb2_grpc.RegistryServiceServicer):
    """Sends DATA in chunks of 100 bytes; breaks off as often as it is told."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.breaks = 0
        self.tokens: set[Any] = set()

    async def FetchBlob(  # noqa: N802
        self, request: registry_pb2.FetchBlobRequest, context: Any
    ) -> AsyncIterator[registry_pb2.FetchBlobResponse]:
        self.offsets.append(request.offset)
        self.tokens.add(dict(context.invocation_metadata())["authorization"])
        if request.sha256 == "missing":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such blob")
        if request.sha256 == "forbidden":
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no")
        if request.sha256 == "stalls":
            yield registry_pb2.FetchBlobResponse(data=DATA[:10])
            await asyncio.sleep(3600)
        if request.offset > len(DATA):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "beyond the end")
        for start in range(request.offset, len(DATA), 100):
            yield registry_pb2.FetchBlobResponse(data=DATA[start : start + 100])
            if self.breaks:
                self.breaks -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "lost")

    async def FetchMetadata(  # noqa: N802
        self, request: registry_pb2.FetchMetadataRequest, context: Any
    ) -> AsyncIterator[registry_pb2.FetchMetadataResponse]:
        while request.name == "trickle.json":
            yield registry_pb2.FetchMetadataResponse(data=b" ")
            await asyncio.sleep(0.02)
        while True:
            yield registry_pb2.FetchMetadataResponse(data=b"x" * (1 << 20))


Scenario = Callable[[RegistryFetcher, Servicer, Path], Awaitable[None]]


def with_fetcher(
    tmp_path: Path,
    scenario: Scenario,
    *,
    stall_s: float = 30.0,
    slow_s: float = 300.0,
    pace: Pace | None = None,
    servicer: Servicer | None = None,
) -> None:
    async def token() -> str:
        return "t"

    async def run() -> None:
        identity, registry = make_identity(tmp_path), servicer or Servicer()  # type: ignore[abstract]
        server = grpc.aio.server()
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(registry, server)
        pair = (identity.key.read_bytes(), identity.certificate.read_bytes())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        await server.start()
        async with open_channel(f"localhost:{port}", identity.ca) as channel:
            fetcher = RegistryFetcher(channel, token, stall_s=stall_s, slow_s=slow_s, pace=pace)
            await scenario(fetcher, registry, tmp_path / "file")
        await server.stop(None)

    asyncio.run(run())


def test_whole_blob_with_token(tmp_path: Path) -> None:
    async def scenario(fetcher: RegistryFetcher, servicer: Servicer, path: Path) -> None:
        assert await fetcher.blob("a", path, length=len(DATA)) == len(DATA)
        assert path.read_bytes() == DATA
        assert servicer.tokens == {"Bearer t"}

    with_fetcher(tmp_path, scenario)


def test_fetch_goes_on_after_what_is_there(tmp_path: Path) -> None:
    async def scenario(fetcher: RegistryFetcher, servicer: Servicer, path: Path) -> None:
        path.write_bytes(DATA[:333])
        assert await fetcher.blob("a", path, length=len(DATA)) == len(DATA) - 333
        assert servicer.offsets == [333]
        assert path.read_bytes() == DATA

    with_fetcher(tmp_path, scenario)


@pytest.mark.slow
def test_broken_stream_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    async def scenario(fetcher: RegistryFetcher, servicer: Servicer, path: Path) -> None:
        servicer.breaks = 3
        assert await fetcher.blob("a", path, length=len(DATA)) == len(DATA)
        assert servicer.offsets == [0, 100, 200, 300]
        assert path.read_bytes() == DATA

    with_fetcher(tmp_path, scenario)


def test_part_of_a_longer_file_than_there_is_now_is_dropped(tmp_path: Path) -> None:
    async def scenario(fetcher: RegistryFetcher, servicer: Servicer, path: Path) -> None:
        path.write_bytes(b"x" * (len(DATA) + 1))
        assert await fetcher.blob("a", path, length=len(DATA) * 2) == len(DATA)
        assert servicer.offsets == [len(DATA) + 1, 0]
        assert path.read_bytes() == DATA

    with_fetcher(tmp_path, scenario)


def test_more_bytes_than_announced_are_not_taken(tmp_path: Path) -> None:
    async def scenario(fetcher: RegistryFetcher, servicer: Servicer, path: Path) -> None:
        with pytest.raises(DigestMismatchError, match="at most 250 bytes"):
            await fetcher.blob("a", path, length=250)
        assert path.stat().st_size <= 250

    with_fetcher(tmp_path, scenario)


def test_endless_metadata_is_cut_off(tmp_path: Path) -> None:
    async def scenario(fetcher: RegistryFetcher, servicer: Servicer, path: Path) -> None:
        with pytest.raises(DigestMismatchError, match=f"at most {METADATA_BYTES} bytes"):
            await fetcher.metadata("timestamp.json")

    with_fetcher(tmp_path, scenario)


def test_missing_blob_is_not_found_and_other_refusals_may_pass(tmp_path: Path) -> None:
    async def scenario(fetcher: RegistryFetcher, servicer: Servicer, path: Path) -> None:
        with pytest.raises(NotFoundError, match="no such blob"):
            await fetcher.blob("missing", path, length=9)
        with pytest.raises(NotFoundError):
            await fetcher.metadata("targets/missing")
        with pytest.raises(UnavailableError):
            await fetcher.metadata("targets/forbidden")

    with_fetcher(tmp_path, scenario)


@pytest.mark.slow
def test_stalled_stream_is_given_up_after_some_attempts(tmp_path: Path) -> None:
    async def scenario(fetcher: RegistryFetcher, servicer: Servicer, path: Path) -> None:
        with pytest.raises(UnavailableError, match="nothing came"):
            await fetcher.metadata("targets/stalls")

    with_fetcher(tmp_path, scenario, stall_s=0.2)


def test_metadata_that_trickles_is_given_up(tmp_path: Path) -> None:
    """Slow retrieval: each byte comes long before the stream counts as stalled, and the file never ends."""

    async def scenario(fetcher: RegistryFetcher, servicer: Servicer, path: Path) -> None:
        with pytest.raises(UnavailableError) as refusal:
            await fetcher.metadata("trickle.json")
        assert refusal.value.reason == "too-slow"

    with_fetcher(tmp_path, scenario, stall_s=30.0, slow_s=0.3)


@pytest.mark.slow
def test_a_link_that_drops_every_256_kib_brings_every_byte_once(tmp_path: Path) -> None:
    data = random.Random(5).randbytes(5 * (256 << 10) // 2)

    class Dropping(Servicer):
        async def FetchBlob(  # noqa: N802
            self, request: registry_pb2.FetchBlobRequest, context: Any
        ) -> AsyncIterator[registry_pb2.FetchBlobResponse]:
            self.offsets.append(request.offset)
            end = min(request.offset + (256 << 10), len(data))
            for start in range(request.offset, end, 64 << 10):
                yield registry_pb2.FetchBlobResponse(data=data[start : min(start + (64 << 10), end)])
            if end < len(data):
                await context.abort(grpc.StatusCode.UNAVAILABLE, "dropped")

    async def scenario(fetcher: RegistryFetcher, servicer: Servicer, path: Path) -> None:
        assert await fetcher.blob("a", path, length=len(data)) == len(data)
        assert servicer.offsets == [0, 256 << 10, 512 << 10]
        assert path.read_bytes() == data

    with_fetcher(tmp_path, scenario, servicer=Dropping())  # type: ignore[abstract]


@pytest.mark.slow
def test_a_cloud_that_is_killed_during_a_fetch_costs_no_byte_twice(tmp_path: Path) -> None:
    """The registry is a process of its own; it is killed after half of the file, and started again on its port."""
    data = random.Random(6).randbytes(2 << 20)
    (tmp_path / "blob").write_bytes(data)
    identity = make_identity(tmp_path)

    def start(port: int) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-m", "tests.edge.registry_process", str(tmp_path), str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout as told:
            return process, int(told.readline())

    async def token() -> str:
        return "t"

    async def scenario() -> None:
        process, port = start(0)
        path = tmp_path / "file"
        async with open_channel(f"localhost:{port}", identity.ca) as channel:
            fetching = asyncio.ensure_future(RegistryFetcher(channel, token).blob("a", path, length=len(data)))
            async with asyncio.timeout(60):
                while not (tmp_path / "log").exists() or path.stat().st_size < len(data) // 4:
                    await asyncio.sleep(0.005)
                process.kill()
                process.wait()
                process, _ = start(port)
                assert await fetching == len(data)
        process.kill()
        process.wait()
        assert path.read_bytes() == data
        assert "killed before its end" in (tmp_path / "log").read_text()

    asyncio.run(scenario())


def test_a_rate_is_kept_and_time_that_nobody_used_is_not_saved_up() -> None:
    time = ManualTime()
    pace = Pace(1000, clock=time.clock, pause=time.pause)

    async def scenario() -> None:
        began = time.seconds
        for _ in range(10):
            await pace.spend(500)
        assert time.seconds - began == pytest.approx(5.0)
        time.seconds += 1000
        began = time.seconds
        for _ in range(4):
            await pace.spend(500)
        assert time.seconds - began == pytest.approx(2.0)

    asyncio.run(scenario())


def test_files_come_at_the_pace_that_is_set(tmp_path: Path) -> None:
    time = ManualTime()

    async def scenario(fetcher: RegistryFetcher, servicer: Servicer, path: Path) -> None:
        began = time.seconds
        await fetcher.blob("a", path, length=len(DATA))
        assert time.seconds - began == pytest.approx(len(DATA) / 100)

    with_fetcher(tmp_path, scenario, pace=Pace(100, clock=time.clock, pause=time.pause))
