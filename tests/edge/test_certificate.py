"""The device's certificate and tokens over its life: renewal, clocks that are wrong, addresses and keys that change."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from cloud import database as db
from edge.access import AccessToken
from edge.certificate import CertificateKeeper
from edge.channel import RenewableChannel
from edge.identity import DeviceHome
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc
from security.authority import load_certificate
from security.enrolment import IssuingCa, make_csr
from security.keyfiles import load_ec_key
from security.rotation import rotate_token_keys
from security.workspace import init_workspace
from tests.attacks.doors import Door, ask, open_door
from tests.cloud.conftest import eventually

WHO = fleet_pb2.WhoAmIRequest()
DAY_S = 86400.0


class Clock:
    """A clock that is as wrong as one likes."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        self.ahead_s = ahead_s

    def __call__(self) -> float:
        return datetime.now(UTC).timestamp() + self.ahead_s


@dataclass(slots=True)
class Running:
    """What an agent runs of all this."""

    home: DeviceHome
    channel: RenewableChannel
    token: AccessToken
    keeper: CertificateKeeper
    keys: list[bytes]

    async def who(self) -> str:
        """Ask the cloud who we are, with the token and the connection of now."""
        return str((await ask(self.channel, "WhoAmI", WHO, await self.token.wait())).subject)


@asynccontextmanager
async def online(home: DeviceHome, clock: Clock) -> AsyncIterator[Running]:
    """Run a device's loops."""
    keys: list[bytes] = []
    channel = RenewableChannel(home.connect())
    token = AccessToken(
        home, home.enrolment(), channel,
        clock=clock, new_keys=keys.append, moved=lambda: channel.replace(home.connect()),
    )  # fmt: skip
    keeper = CertificateKeeper(home, channel, token, home.connect, spread=0.0)
    loops = [asyncio.create_task(loop()) for loop in (token.keep, keeper.keep, keeper.follow)]
    try:
        yield Running(home, channel, token, keeper, keys)
    finally:
        for task in loops:
            task.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        await channel.close()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    root = tmp_path / "workspace"
    init_workspace(root, ["localhost", "127.0.0.1"], "acme", datetime.now(UTC))
    return root


def with_a_device(workspace: Path, tmp_path: Path, story: Any, *, clock: Clock | None = None) -> None:
    """Run a story with an open door and an enrolled device."""

    async def run() -> None:
        database = db.Database(f"sqlite:///{tmp_path / 'isthmus.db'}")
        async with open_door(workspace, database, clock=clock or Clock()) as door:
            device = await door.enrol("camera-1", tmp_path / "device")
            await story(door, device.home)
        database.close()

    asyncio.run(run())


def _serial(home: DeviceHome) -> int:
    return load_certificate(home.certificate).serial_number


def _age(workspace: Path, home: DeviceHome, days: float) -> None:
    """Give the device the certificate that it would have, had it been enrolled so long ago."""
    csr = make_csr(load_ec_key(home.key), "", ["camera-1.example.org"])
    issued = datetime.now(UTC) - timedelta(days=days)
    home.certificate.write_bytes(IssuingCa.load(workspace / "cloud").sign(csr, "camera-1", issued))


@pytest.mark.parametrize("days", [61, 89, 91, 800])
def test_a_certificate_is_renewed_well_before_its_end_and_after_it(
    workspace: Path, tmp_path: Path, days: float
) -> None:
    """After 800 days on a shelf nothing else of the device is valid any more either: its key is enough."""

    async def story(door: Door, home: DeviceHome) -> None:
        _age(workspace, home, days)
        before, key = _serial(home), home.key.read_bytes()
        async with online(home, Clock()) as device:

            async def is_renewed() -> bool:
                return _serial(home) != before

            await eventually(is_renewed, "the certificate is renewed")

            async def is_known() -> bool:
                try:
                    return await asyncio.wait_for(device.who(), 10) == "camera-1"
                except grpc.aio.AioRpcError:
                    return False

            await eventually(is_known, "the device is known with the new one")
            assert device.keeper.due_at() > datetime.now(UTC) + timedelta(days=50)
        certificate = load_certificate(home.certificate)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert "camera-1.example.org" in str(list(names))  # the hosts of before
        assert home.key.read_bytes() == key

    with_a_device(workspace, tmp_path, story)


def test_a_young_certificate_is_left_alone(workspace: Path, tmp_path: Path) -> None:
    async def story(door: Door, home: DeviceHome) -> None:
        before = _serial(home)
        async with online(home, Clock()) as device:
            assert await device.who() == "camera-1"
        assert _serial(home) == before

    with_a_device(workspace, tmp_path, story)


def test_no_call_fails_while_the_certificate_is_renewed(workspace: Path, tmp_path: Path) -> None:
    async def story(door: Door, home: DeviceHome) -> None:
        async with online(home, Clock()) as device:
            await device.token.wait()
            stub: Any = fleet_pb2_grpc.FleetServiceStub(device.channel)
            done = asyncio.Event()

            async def call() -> int:
                calls = 0
                while not done.is_set():
                    metadata = (("authorization", f"Bearer {device.token.current()}"),)
                    assert (await stub.WhoAmI(WHO, metadata=metadata, timeout=20)).subject == "camera-1"
                    calls += 1
                return calls

            callers = [asyncio.create_task(call()) for _ in range(4)]
            serials = {_serial(home)}
            for _ in range(3):
                await device.keeper.renew()
                serials.add(_serial(home))
            done.set()
            assert sum(await asyncio.gather(*callers)) > 0
            assert len(serials) == 4

    with_a_device(workspace, tmp_path, story)


@pytest.mark.parametrize("ahead_s", [-3 * DAY_S, -600.0, 600.0, 3 * DAY_S, 365 * DAY_S])
def test_a_device_whose_clock_is_wrong_gets_tokens(workspace: Path, tmp_path: Path, ahead_s: float) -> None:
    async def story(door: Door, home: DeviceHome) -> None:
        async with online(home, Clock(ahead_s)) as device:
            assert await asyncio.wait_for(device.who(), 20) == "camera-1"
            assert device.token.current()
            assert abs(device.token.now() - datetime.now(UTC).timestamp()) < 60.0

    with_a_device(workspace, tmp_path, story)


def test_new_token_keys_of_the_cloud_reach_the_device_with_a_token(workspace: Path, tmp_path: Path) -> None:
    async def story(door: Door, home: DeviceHome) -> None:
        rotate_token_keys(workspace / "cloud" / "tokens", datetime.now(UTC))
        database = db.Database(f"sqlite:///{tmp_path / 'isthmus.db'}")
        async with open_door(workspace, database) as after:  # which has read the new keys
            moved = home.enrolment().model_copy(update={"cloud": after.address, "device_address": after.device_address})
            home.keep_enrolment(moved)
            async with online(home, Clock()) as device:
                await device.token.wait()
                assert len(json.loads(home.jwks.read_bytes())["keys"]) == 2
                assert device.keys == [home.jwks.read_bytes()]
        database.close()

    with_a_device(workspace, tmp_path, story)


@pytest.mark.parametrize("known", ["", "localhost:1"], ids=["of an earlier release", "that is wrong"])
def test_a_device_finds_the_address_for_devices(workspace: Path, tmp_path: Path, known: str) -> None:
    async def story(door: Door, home: DeviceHome) -> None:
        home.keep_enrolment(home.enrolment().model_copy(update={"device_address": known}))
        async with online(home, Clock()) as device:
            assert await asyncio.wait_for(device.who(), 30) == "camera-1"
        assert home.enrolment().device_address == door.device_address

    with_a_device(workspace, tmp_path, story)
