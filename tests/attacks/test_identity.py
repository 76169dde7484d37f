"""Somebody who is not who they say: stolen tokens and certificates, replays, races, and devices that were revoked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from cloud import database as db
from edge.identity import DeviceHome
from isthmus.errors import IdentityError
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc
from security.authority import load_certificate
from security.enrolment import make_csr, new_device_key
from security.keyfiles import load_ec_key
from security.tls import channel_credentials
from security.tokens import make_assertion
from tests.attacks.doors import REVOKED_WITHIN_S, Door, EnrolledDevice, ask, door_process, open_door, refusal

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
WHO = fleet_pb2.WhoAmIRequest()
WATCH = fleet_pb2.WatchRequest(models=["triage"])

Story = Callable[[Door], Awaitable[None]]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[db.Database]:
    opened = db.Database(f"sqlite:///{tmp_path / 'isthmus.db'}")
    yield opened
    opened.close()


def at_the_door(workspace: Path, database: db.Database, story: Story) -> None:
    async def run() -> None:
        async with open_door(workspace, database) as door:
            await story(door)

    asyncio.run(run())


# -- stolen tokens and certificates ---------------------------------------------------------------------------------


def test_a_device_uses_its_token_on_its_own_connection(workspace: Path, database: db.Database, tmp_path: Path) -> None:
    """Without this, every refusal below could be for the wrong reason."""

    async def story(door: Door) -> None:
        camera = await door.enrol("camera-1", tmp_path / "camera")
        told = await camera.ask("WhoAmI", WHO, await camera.token())
        assert told.subject == "camera-1"
        assert (told.tls_version, told.tls_group) == ("TLSv1.3", "X25519MLKEM768")

    at_the_door(workspace, database, story)


def test_a_stolen_token_is_good_on_no_other_connection(workspace: Path, database: db.Database, tmp_path: Path) -> None:
    async def story(door: Door) -> None:
        camera, thief = [await door.enrol(name, tmp_path / name) for name in ("camera-1", "thief")]
        stolen = await camera.token()
        assert await refusal(thief.ask("WhoAmI", WHO, stolen)) == (UNAUTHENTICATED, "certificate-mismatch")
        assert await refusal(door.ask("WhoAmI", WHO, stolen)) == (UNAUTHENTICATED, "certificate-required")
        async with thief.channel() as channel:
            watch = fleet_pb2_grpc.FleetServiceStub(channel).Watch(
                WATCH, metadata=(("authorization", f"Bearer {stolen}"),), timeout=20
            )
            assert await refusal(_first(watch)) == (UNAUTHENTICATED, "certificate-mismatch")

    at_the_door(workspace, database, story)


def test_the_request_of_a_stolen_token_is_not_read(workspace: Path, database: db.Database, tmp_path: Path) -> None:
    """A call that never sends its request is refused at once; the device's own would be waited for."""

    async def story(door: Door) -> None:
        camera, thief = [await door.enrol(name, tmp_path / name) for name in ("camera-1", "thief")]
        metadata = (("authorization", f"Bearer {await camera.token()}"),)

        async def never() -> AsyncIterator[bytes]:
            await asyncio.Event().wait()
            yield b""

        async def report(device: EnrolledDevice) -> grpc.StatusCode:
            async with device.channel() as channel:
                stub: Any = channel.stream_unary("/isthmus.v1.FleetService/Report")
                call = stub(never(), metadata=metadata)
                try:
                    code: grpc.StatusCode = await asyncio.wait_for(call.code(), 5)
                    return code
                finally:
                    call.cancel()

        assert await report(thief) is not grpc.StatusCode.OK
        with pytest.raises(TimeoutError):
            await report(camera)

    at_the_door(workspace, database, story)


def test_a_device_gets_no_token_for_another_one(workspace: Path, database: db.Database, tmp_path: Path) -> None:
    async def story(door: Door) -> None:
        camera, thief = [await door.enrol(name, tmp_path / name) for name in ("camera-1", "thief")]
        # The thief's own key under the victim's name; and an assertion of the victim's, overheard before it was used.
        forged = camera.assertion(key=thief.home.key)
        assert await refusal(thief.token(forged)) == (UNAUTHENTICATED, "wrong-signature")
        assert await refusal(thief.token(camera.assertion())) == (UNAUTHENTICATED, "certificate-mismatch")
        request = fleet_pb2.IssueTokenRequest(assertion=camera.assertion())
        assert await refusal(door.ask("IssueToken", request)) == (UNAUTHENTICATED, "certificate-required")

    at_the_door(workspace, database, story)


def test_a_certificate_is_renewed_for_its_own_key_only(workspace: Path, database: db.Database, tmp_path: Path) -> None:
    async def story(door: Door) -> None:
        camera, thief = [await door.enrol(name, tmp_path / name) for name in ("camera-1", "thief")]
        own = make_csr(load_ec_key(camera.home.key), "", [])
        another = make_csr(new_device_key(tmp_path / "new.key"), "", [])

        async def renew(assertion: str, csr: bytes) -> Any:
            return await door.ask(
                "RenewCertificate", fleet_pb2.RenewCertificateRequest(assertion=assertion, csr_pem=csr)
            )

        assert (await renew(camera.assertion(), own)).certificate_chain_pem
        assert await refusal(renew(camera.assertion(), another)) == (UNAUTHENTICATED, "wrong-key")
        assert await refusal(renew(camera.assertion(key=thief.home.key), own)) == (UNAUTHENTICATED, "wrong-signature")

    at_the_door(workspace, database, story)


def test_a_connection_that_outlasts_its_certificate_gets_no_token(
    workspace: Path, database: db.Database, tmp_path: Path
) -> None:
    ahead = timedelta(0)

    def now() -> datetime:
        return datetime.now(UTC) + ahead

    async def run() -> None:
        nonlocal ahead
        async with open_door(workspace, database, clock=lambda: now().timestamp()) as door:
            camera = await door.enrol("camera-1", tmp_path / "camera")
            audience = camera.home.enrolment().token_audience

            async def ask_for_a_token(channel: grpc.aio.Channel) -> Any:
                assertion = make_assertion(camera.home.key, "camera-1", audience, now())
                return await ask(channel, "IssueToken", fleet_pb2.IssueTokenRequest(assertion=assertion))

            async with camera.channel() as channel:
                ahead = timedelta(days=90, minutes=-5)
                answer = await ask_for_a_token(channel)
                until = load_certificate(camera.home.certificate).not_valid_after_utc
                assert answer.expires_at.ToDatetime(UTC) <= until
                ahead = timedelta(days=91)
                assert await refusal(ask_for_a_token(channel)) == (UNAUTHENTICATED, "expired-certificate")

    asyncio.run(run())


# -- revocation -----------------------------------------------------------------------------------------------------


def test_a_revoked_device_is_refused_at_once_and_its_open_streams_end(
    workspace: Path, database: db.Database, tmp_path: Path
) -> None:
    async def story(door: Door) -> None:
        camera, other = [await door.enrol(name, tmp_path / name) for name in ("camera-1", "camera-2")]
        token = await camera.token()
        async with _watching(camera, token) as watch, _watching(other, await other.token()) as undisturbed:
            begun = time.monotonic()
            await door.revoke(device_id="camera-1", reason="stolen from the yard")
            assert await refusal(_first(watch)) == (UNAUTHENTICATED, "revoked")
            assert time.monotonic() - begun < REVOKED_WITHIN_S
            assert not undisturbed.done()
        assert await refusal(camera.ask("WhoAmI", WHO, token)) == (UNAUTHENTICATED, "revoked")
        assert await refusal(camera.token()) == (UNAUTHENTICATED, "revoked")
        renewal = fleet_pb2.RenewCertificateRequest(
            assertion=camera.assertion(), csr_pem=make_csr(load_ec_key(camera.home.key), "", [])
        )
        assert await refusal(door.ask("RenewCertificate", renewal)) == (UNAUTHENTICATED, "revoked")
        assert (await other.ask("WhoAmI", WHO, await other.token())).subject == "camera-2"

    at_the_door(workspace, database, story)


def test_revocation_reaches_every_replica_within_five_seconds_and_survives_a_restart(
    workspace: Path, database_url: str, tmp_path: Path
) -> None:
    async def story(first: Door, second: Door) -> None:
        camera = await first.enrol("camera-1", tmp_path / "camera")
        token = await camera.token()
        async with _watching(camera.at(second), token) as watch:
            begun = time.monotonic()
            await first.revoke(device_id="camera-1")
            assert await refusal(_first(watch)) == (UNAUTHENTICATED, "revoked")
            assert time.monotonic() - begun < REVOKED_WITHIN_S
        assert await refusal(camera.at(second).ask("WhoAmI", WHO, token)) == (UNAUTHENTICATED, "revoked")
        with door_process(workspace, database_url) as (third, _):
            assert await refusal(camera.at(third).ask("WhoAmI", WHO, token)) == (UNAUTHENTICATED, "revoked")

    with door_process(workspace, database_url) as (first, _), door_process(workspace, database_url) as (second, _):
        asyncio.run(story(first, second))


def test_a_revoked_key_is_refused_under_any_name_and_for_good(
    workspace: Path, database: db.Database, tmp_path: Path
) -> None:
    async def story(door: Door) -> None:
        camera = await door.enrol("camera-1", tmp_path / "camera")
        token = await camera.token()
        request = fleet_pb2.GetDeviceRequest(device_id="camera-1")
        key = (await door.ask("GetDevice", request, door.mint("operator", "ann"))).device.key_sha256
        done = await door.revoke(key_sha256=key)
        assert done.device_id == "camera-1"
        assert await refusal(camera.ask("WhoAmI", WHO, token)) == (UNAUTHENTICATED, "revoked")
        csr = make_csr(load_ec_key(camera.home.key), "", [])
        for name in ("camera-1", "camera-2"):
            again = fleet_pb2.EnrolRequest(code=await door.invite(name), csr_pem=csr)
            assert await refusal(door.ask("Enrol", again)) == (UNAUTHENTICATED, "revoked")

    at_the_door(workspace, database, story)


def test_a_revoked_device_comes_back_with_a_new_key_and_its_old_token_does_not(
    workspace: Path, database: db.Database, tmp_path: Path
) -> None:
    async def story(door: Door) -> None:
        camera = await door.enrol("camera-1", tmp_path / "old")
        token = await camera.token()
        await door.revoke(device_id="camera-1")
        again = await door.enrol("camera-1", tmp_path / "new")
        assert (await again.ask("WhoAmI", WHO, await again.token())).subject == "camera-1"
        assert await refusal(camera.ask("WhoAmI", WHO, token)) == (UNAUTHENTICATED, "revoked")
        assert (await refusal(camera.token()))[0] is UNAUTHENTICATED

    at_the_door(workspace, database, story)


def test_a_new_enrolment_ends_what_the_key_before_could_do(
    workspace: Path, database: db.Database, tmp_path: Path
) -> None:
    async def story(door: Door) -> None:
        lost = await door.enrol("camera-1", tmp_path / "old")
        token = await lost.token()
        await door.enrol("camera-1", tmp_path / "new")
        assert await refusal(lost.ask("WhoAmI", WHO, token)) == (UNAUTHENTICATED, "revoked")

    at_the_door(workspace, database, story)


def test_only_an_administrator_revokes(workspace: Path, database: db.Database, tmp_path: Path) -> None:
    async def story(door: Door) -> None:
        camera = await door.enrol("camera-1", tmp_path / "camera")
        request = fleet_pb2.RevokeDeviceRequest(device_id="camera-1")
        for token in (door.mint("client", "app"), door.mint("operator", "ann")):
            assert await refusal(door.ask("RevokeDevice", request, token)) == (
                grpc.StatusCode.PERMISSION_DENIED,
                "missing-scope",
            )
        device_token = await camera.token()
        assert (await refusal(camera.ask("RevokeDevice", request, device_token)))[1] == "missing-scope"
        unknown = fleet_pb2.RevokeDeviceRequest(device_id="nobody")
        assert (await refusal(door.ask("RevokeDevice", unknown, door.mint("admin", "root"))))[1] == "unknown-device"

    at_the_door(workspace, database, story)


# -- what is good once ----------------------------------------------------------------------------------------------


def test_an_assertion_is_good_once_at_all_replicas_and_after_a_restart(
    workspace: Path, database_url: str, tmp_path: Path
) -> None:
    async def story(first: Door, second: Door) -> tuple[EnrolledDevice, str]:
        camera = await first.enrol("camera-1", tmp_path / "camera")
        assertion = camera.assertion()
        assert await camera.token(assertion)
        for door in (first, second):
            assert await refusal(camera.at(door).token(assertion)) == (UNAUTHENTICATED, "replayed-assertion")
        fresh = camera.assertion()
        tries = await asyncio.gather(
            *(camera.at(door).token(fresh) for door in (first, second) * 4), return_exceptions=True
        )
        assert sum(isinstance(result, str) for result in tries) == 1
        return camera, fresh

    with door_process(workspace, database_url) as (first, _), door_process(workspace, database_url) as (second, _):
        camera, spent = asyncio.run(story(first, second))
    with door_process(workspace, database_url) as (restarted, _):
        refused = asyncio.run(refusal(camera.at(restarted).token(spent)))
    assert refused == (UNAUTHENTICATED, "replayed-assertion")


def test_a_code_is_good_once(workspace: Path, database: db.Database, tmp_path: Path) -> None:
    async def story(door: Door) -> None:
        code = await door.invite("camera-1")
        request = fleet_pb2.EnrolRequest(code=code, csr_pem=make_csr(new_device_key(tmp_path / "a.key"), "", []))
        assert (await door.ask("Enrol", request)).device_id == "camera-1"
        assert await refusal(door.ask("Enrol", request)) == (UNAUTHENTICATED, "wrong-code")

    at_the_door(workspace, database, story)


def test_of_two_processes_with_one_code_exactly_one_wins(workspace: Path, database_url: str, tmp_path: Path) -> None:
    """Twenty codes, each used at the same instant at two cloud processes by two connections each."""

    async def race(doors: tuple[Door, Door]) -> list[int]:
        winners = []
        requests = [make_csr(new_device_key(tmp_path / f"{number}.key"), "", []) for number in range(4)]
        channels = [
            grpc.aio.secure_channel(
                door.address, channel_credentials(door.ca), options=(("grpc.use_local_subchannel_pool", 1),)
            )
            for door in doors * 2
        ]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        for number in range(20):
            code = await doors[0].invite(f"camera-{number}")
            results = await asyncio.gather(
                *(
                    ask(channel, "Enrol", fleet_pb2.EnrolRequest(code=code, csr_pem=csr))
                    for channel, csr in zip(channels, requests, strict=True)
                ),
                return_exceptions=True,
            )
            refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
            assert {error.code() for error in refused} == {UNAUTHENTICATED}
            winners.append(len(results) - len(refused))
        await asyncio.gather(*(channel.close() for channel in channels))
        return winners

    with door_process(workspace, database_url) as (first, _), door_process(workspace, database_url) as (second, _):
        assert asyncio.run(race((first, second))) == [1] * 20


def test_agents_with_one_code_get_one_identity(workspace: Path, database: db.Database, tmp_path: Path) -> None:
    from edge.identity import enrol

    async def story(door: Door) -> None:
        code = await door.invite("camera-1")
        homes = [DeviceHome(tmp_path / f"home-{number}") for number in range(4)]
        tries = await asyncio.gather(
            *(enrol(home, cloud=door.address, code=code, trust=workspace / "trust") for home in homes),
            return_exceptions=True,
        )
        assert sum(isinstance(result, IdentityError) for result in tries) == 3
        enrolled = [home for home in homes if (home.path / "enrolment.json").exists()]
        assert len(enrolled) == 1
        assert await EnrolledDevice(door, "camera-1", enrolled[0]).token()

    at_the_door(workspace, database, story)


# -- helpers --------------------------------------------------------------------------------------------------------


class _watching:  # noqa: N801
    """An open Watch of a device, from which nothing has come."""

    def __init__(self, device: EnrolledDevice, token: str) -> None:
        self._channel, self._token = device.channel(), token

    async def __aenter__(self) -> Any:
        stub: Any = fleet_pb2_grpc.FleetServiceStub(self._channel)
        self._call = stub.Watch(WATCH, metadata=(("authorization", f"Bearer {self._token}"),), timeout=60)
        self._first = asyncio.ensure_future(_first(self._call))
        await asyncio.sleep(0)
        await ask(self._channel, "WhoAmI", WHO, self._token)  # on the same connection: the Watch has arrived, too
        return self._first

    async def __aexit__(self, *_error: object) -> None:
        self._first.cancel()
        await asyncio.gather(self._first, return_exceptions=True)
        await self._channel.close()


async def _first(stream: Any) -> Any:
    if isinstance(stream, asyncio.Future):
        return await stream
    async for message in stream:
        return message
    raise AssertionError("the stream ended well")
