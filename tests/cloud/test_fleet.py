"""The fleet service over real TLS: one identity for a code, one token for an assertion, the right version for all."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from cloud.database import open_database
from isthmus.status import REASON_KEY
from isthmus.v1 import fleet_pb2
from security.enrolment import make_csr, new_device_key
from security.tokens import make_assertion
from tests.cloud.conftest import eventually
from tests.cloud.fleets import Clock, Fleet, fleet_on
from tests.cloud.workspaces import make_workspace

BROKEN_SUBJECT = rb'{"sub": "\ud800"}'  # JSON that no database takes


@dataclass(frozen=True, slots=True)
class Stage:
    """A fleet service behind the real interceptors, and the loop that it lives in."""

    runner: asyncio.Runner
    fleet: Fleet

    @property
    def folder(self) -> Path:
        return self.fleet.folder

    @property
    def clock(self) -> Clock:
        return self.fleet.clock

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[Any]:
        async with self.fleet.stubs() as (fleet, _):
            yield fleet

    def bearer(
        self, role: str, subject: str = "somebody", models: tuple[str, ...] = ("*",)
    ) -> tuple[tuple[str, str], ...]:
        return self.fleet.bearer(role, subject, models)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    workspace, database = make_workspace(tmp_path / "workspace"), open_database(tmp_path / "isthmus.db")
    with asyncio.Runner() as runner:
        serving = fleet_on(database, workspace, tmp_path)
        yield Stage(runner, runner.run(serving.__aenter__()))
        runner.run(serving.__aexit__(None, None, None))
    database.close()


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), str(dict(raised.value.trailing_metadata()).get(REASON_KEY, ""))


def request_for(folder: Path, name: str = "device") -> bytes:
    return make_csr(new_device_key(folder / f"{name}.key"), "whatever-it-says", ["localhost"])


async def invite(stage: Stage, fleet: Any, device: str = "camera-1", ttl_s: int = 0) -> str:
    request = fleet_pb2.InviteRequest(device_id=device, ttl_s=ttl_s)
    return str((await fleet.Invite(request, metadata=stage.bearer("operator"), timeout=10)).code)


async def enrol(stage: Stage, fleet: Any, device: str = "camera-1") -> Any:
    code = await invite(stage, fleet, device)
    request = fleet_pb2.EnrolRequest(code=code, csr_pem=request_for(stage.folder, device))
    return await fleet.Enrol(request, timeout=10)


def test_a_code_gives_one_identity(stage: Stage) -> None:
    async def story() -> None:
        async with stage.stub() as fleet:
            answer = await enrol(stage, fleet)
            assert answer.device_id == "camera-1"
            leaf = x509.load_pem_x509_certificates(answer.certificate_chain_pem)[0]
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["isthmus://device/camera-1"]
            assert b'"keys"' in answer.jwks_json

    stage.runner.run(story())


def test_two_callers_with_one_code_get_one_identity_and_one_refusal(stage: Stage) -> None:
    async def story() -> None:
        async with stage.stub() as fleet:
            for round_number in range(5):
                code = await invite(stage, fleet)
                calls = [
                    fleet.Enrol(
                        fleet_pb2.EnrolRequest(
                            code=code, csr_pem=request_for(stage.folder, f"{round_number}-{caller}")
                        ),
                        timeout=10,
                    )
                    for caller in range(4)
                ]
                results = await asyncio.gather(*calls, return_exceptions=True)
                refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
                assert len(refused) == 3
                assert {error.code() for error in refused} == {grpc.StatusCode.UNAUTHENTICATED}

    stage.runner.run(story())


def test_wrong_used_and_expired_codes_look_the_same(stage: Stage) -> None:
    async def story() -> None:
        async with stage.stub() as fleet:
            csr = request_for(stage.folder)
            used = await invite(stage, fleet)
            await fleet.Enrol(fleet_pb2.EnrolRequest(code=used, csr_pem=csr), timeout=10)
            expired = await invite(stage, fleet, ttl_s=60)
            stage.clock.offset_s += 61
            for code in (used, expired, "wrong", ""):
                call = fleet.Enrol(fleet_pb2.EnrolRequest(code=code, csr_pem=csr), timeout=10)
                assert await refusal(call) == (grpc.StatusCode.UNAUTHENTICATED, "wrong-code")

    stage.runner.run(story())


def test_a_bad_signing_request_does_not_spend_the_code(stage: Stage) -> None:
    async def story() -> None:
        async with stage.stub() as fleet:
            code = await invite(stage, fleet)
            call = fleet.Enrol(fleet_pb2.EnrolRequest(code=code, csr_pem=b"nonsense"), timeout=10)
            assert (await refusal(call))[0] is grpc.StatusCode.INVALID_ARGUMENT
            good = fleet_pb2.EnrolRequest(code=code, csr_pem=request_for(stage.folder))
            assert (await fleet.Enrol(good, timeout=10)).device_id == "camera-1"

    stage.runner.run(story())


@pytest.mark.parametrize("device", ["", "../camera", "a" * 65, "a b", ".hidden"])
def test_names_that_no_device_may_have_are_refused(stage: Stage, device: str) -> None:
    async def story() -> None:
        async with stage.stub() as fleet:
            request = fleet_pb2.InviteRequest(device_id=device)
            call = fleet.Invite(request, metadata=stage.bearer("operator"), timeout=10)
            assert (await refusal(call))[0] is grpc.StatusCode.INVALID_ARGUMENT

    stage.runner.run(story())


def test_whoever_may_use_some_models_makes_and_ends_no_devices(stage: Stage) -> None:
    """A device may use all models of its tenant, so its identity would be a way to the others."""

    async def story() -> None:
        async with stage.stub() as fleet:
            await enrol(stage, fleet)
            for name in ("camera-1", "camera-2"):
                invitation = fleet_pb2.InviteRequest(device_id=name)
                call = fleet.Invite(invitation, metadata=stage.bearer("operator", "eve", ("triage",)), timeout=10)
                assert await refusal(call) == (grpc.StatusCode.PERMISSION_DENIED, "not-all-models")
            revocation = fleet_pb2.RevokeDeviceRequest(device_id="camera-1")
            call = fleet.RevokeDevice(revocation, metadata=stage.bearer("admin", "eve", ("triage",)), timeout=10)
            assert await refusal(call) == (grpc.StatusCode.PERMISSION_DENIED, "not-all-models")

    stage.runner.run(story())


def test_an_assertion_gives_a_token_once(stage: Stage) -> None:
    async def story() -> None:
        async with stage.stub() as fleet:
            enrolled = await enrol(stage, fleet)
            key = stage.folder / "camera-1.key"
            assertion = make_assertion(key, "camera-1", enrolled.token_audience, datetime.now(UTC))
            request = fleet_pb2.IssueTokenRequest(assertion=assertion)
            token = (await fleet.IssueToken(request, timeout=10)).access_token
            me = await fleet.WhoAmI(
                fleet_pb2.WhoAmIRequest(), metadata=(("authorization", f"Bearer {token}"),), timeout=10
            )
            assert (me.subject, list(me.scopes)) == ("camera-1", ["device", "infer", "registry:read"])
            assert me.tls_version == "TLSv1.3"
            again = await refusal(fleet.IssueToken(request, timeout=10))
            assert again == (grpc.StatusCode.UNAUTHENTICATED, "replayed-assertion")

    stage.runner.run(story())


def test_a_device_is_online_once_it_has_connected(stage: Stage) -> None:
    async def story() -> None:
        async with stage.stub() as fleet:

            async def device() -> Any:
                call = fleet.ListDevices(fleet_pb2.ListDevicesRequest(), metadata=stage.bearer("operator"), timeout=10)
                return (await call).devices[0]

            async def is_online() -> bool:
                return bool((await device()).online)

            await enrol(stage, fleet)
            assert not await is_online()  # it has its certificate; its agent was never started
            stream = fleet.Watch(fleet_pb2.WatchRequest(), metadata=stage.bearer("device", "camera-1"), timeout=60)
            await eventually(is_online, "the device is online")
            stream.cancel()
            assert await is_online()  # it may be back in a moment
            stage.clock.offset_s += 600
            assert not await is_online()

    stage.runner.run(story())


def test_a_replay_is_refused_when_both_come_at_the_same_time(stage: Stage) -> None:
    async def story() -> None:
        async with stage.stub() as fleet:
            enrolled = await enrol(stage, fleet)
            key = stage.folder / "camera-1.key"
            assertion = make_assertion(key, "camera-1", enrolled.token_audience, datetime.now(UTC))
            request = fleet_pb2.IssueTokenRequest(assertion=assertion)
            calls = [fleet.IssueToken(request, timeout=10) for _ in range(4)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert len([result for result in results if isinstance(result, grpc.aio.AioRpcError)]) == 3

    stage.runner.run(story())


def test_assertions_of_others_are_refused(stage: Stage) -> None:
    async def story() -> None:
        async with stage.stub() as fleet:
            enrolled = await enrol(stage, fleet)
            new_device_key(stage.folder / "thief.key")
            now, audience = datetime.now(UTC), enrolled.token_audience
            key = stage.folder / "camera-1.key"
            header, _, signature = make_assertion(key, "camera-1", audience, now).split(".")
            half_a_character = f"{header}.{base64.urlsafe_b64encode(BROKEN_SUBJECT).decode().rstrip('=')}.{signature}"
            for assertion in (
                make_assertion(stage.folder / "thief.key", "camera-1", audience, now),
                make_assertion(key, "camera-2", audience, now),
                make_assertion(key, "camera-1", "somebody else", now),
                make_assertion(key, "camera-1", audience, now - timedelta(minutes=5)),
                half_a_character,
                "nonsense",
                "",
            ):
                call = fleet.IssueToken(fleet_pb2.IssueTokenRequest(assertion=assertion), timeout=10)
                assert (await refusal(call))[0] is grpc.StatusCode.UNAUTHENTICATED

    stage.runner.run(story())


def test_enrolling_again_replaces_the_key(stage: Stage) -> None:
    async def story() -> None:
        async with stage.stub() as fleet:
            enrolled = await enrol(stage, fleet)
            code = await invite(stage, fleet)
            request = fleet_pb2.EnrolRequest(code=code, csr_pem=request_for(stage.folder, "new"))
            await fleet.Enrol(request, timeout=10)
            old, new = (
                make_assertion(stage.folder / name, "camera-1", enrolled.token_audience, datetime.now(UTC))
                for name in ("camera-1.key", "new.key")
            )
            call = fleet.IssueToken(fleet_pb2.IssueTokenRequest(assertion=old), timeout=10)
            assert (await refusal(call))[0] is grpc.StatusCode.UNAUTHENTICATED
            assert (await fleet.IssueToken(fleet_pb2.IssueTokenRequest(assertion=new), timeout=10)).access_token

    stage.runner.run(story())


def test_watch_tells_the_state_and_every_change_and_ends_with_the_token(stage: Stage) -> None:
    async def story() -> list[tuple[str, int]]:
        await stage.fleet.publish(1, release=True)
        async with stage.stub() as fleet:
            request = fleet_pb2.WatchRequest(models=["triage", "unknown"])
            call = fleet.Watch(request, metadata=stage.bearer("device", "camera-1"), timeout=20)
            messages = aiter(call)
            heard = [await anext(messages)]
            await stage.fleet.publish(2, release=True)
            heard.append(await anext(messages))
            stage.clock.offset_s += 3600  # the token has expired; the next change ends the stream
            await stage.fleet.publish(3, release=True)
            heard += [message async for message in messages]
            return [(message.model, message.version) for message in heard]

    # The change after the expiry may or may not be told; what counts is that the stream ends.
    assert stage.runner.run(story())[:2] == [("triage", 1), ("triage", 2)]


def test_reports_are_kept_under_the_devices_own_name(stage: Stage) -> None:
    async def story() -> None:
        await stage.fleet.publish(3, release=True)
        async with stage.stub() as fleet:
            await enrol(stage, fleet)
            report = fleet_pb2.ReportRequest(
                model="triage", version=3, state=fleet_pb2.UPDATE_STATE_REFUSED, serving_version=2,
                reason="digest-mismatch", detail="\x1b[31m" + "x" * 5000, bytes_fetched=7, variant="onnxruntime-fp32",
            )  # fmt: skip
            await fleet.Report(report, metadata=stage.bearer("device", "camera-1"), timeout=10)
            stranger = fleet.Report(report, metadata=stage.bearer("device", "stranger"), timeout=10)
            assert (await refusal(stranger))[1] == "unknown-device"
            listing = fleet_pb2.ListDevicesRequest()
            (device,) = (await fleet.ListDevices(listing, metadata=stage.bearer("operator"), timeout=10)).devices
            assert device.device_id == "camera-1"
            (kept,) = device.reports
            assert (kept.serving_version, kept.reason, len(kept.detail)) == (2, "digest-mismatch", 500)
            assert kept.detail.startswith(" [31mxxx")  # nothing that an operator's terminal would obey
            call = fleet.Report(fleet_pb2.ReportRequest(), metadata=stage.bearer("device", "camera-1"), timeout=10)
            assert (await refusal(call))[0] is grpc.StatusCode.INVALID_ARGUMENT
            known = fleet_pb2.ReportRequest(state=fleet_pb2.UPDATE_STATE_ACTIVE).SerializeToString()
            known = fleet_pb2.ReportRequest(model="triage", version=3).SerializeToString() + known
            for wrong in (
                fleet_pb2.ReportRequest.FromString(known[:-1] + bytes([99])),  # an enum's value that nobody knows
                fleet_pb2.ReportRequest(model="triage", version=2**64 - 1, state=fleet_pb2.UPDATE_STATE_ACTIVE),
                fleet_pb2.ReportRequest(model="other", version=3, state=fleet_pb2.UPDATE_STATE_ACTIVE),
            ):
                call = fleet.Report(wrong, metadata=stage.bearer("device", "camera-1"), timeout=10)
                assert (await refusal(call))[0] is grpc.StatusCode.INVALID_ARGUMENT
            call = fleet.Report(report, metadata=stage.bearer("device", "camera-1", ("other",)), timeout=10)
            assert (await refusal(call))[0] is grpc.StatusCode.INVALID_ARGUMENT
            call = fleet.ListDevices(listing, metadata=stage.bearer("device", "camera-1"), timeout=10)
            assert (await refusal(call))[0] is grpc.StatusCode.PERMISSION_DENIED

    stage.runner.run(story())


def test_codes_are_not_kept_in_the_database(stage: Stage) -> None:
    async def story() -> str:
        async with stage.stub() as fleet:
            return await invite(stage, fleet)

    code = stage.runner.run(story())
    for path in stage.folder.glob("isthmus.db*"):
        assert code.encode() not in path.read_bytes()
