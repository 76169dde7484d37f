"""The audit log of a real cloud: who did what, seen by whom it concerns; a full disk stops administrators only."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from cloud.audit_cli import app
from cloud.bootstrap import Cloud
from cloud.client import CloudClient
from isthmus.errors import IsthmusError, UnavailableError
from isthmus.oip import service_pb2_grpc
from isthmus.tensors import encode_request
from isthmus.v1 import audit_pb2, audit_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from security.audit.keys import load_public_keys
from security.audit.reading import Query, search
from security.audit.records import parse_head
from security.audit.verification import verify
from security.enrolment import make_csr, new_device_key
from security.tokens import TokenIssuer
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace, serving

pytestmark = pytest.mark.slow

X = np.array([[1, 2, 3, 4]], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Stage:
    runner: asyncio.Runner
    workspace: Workspace
    cloud: Cloud

    @property
    def log(self) -> Path:
        return self.workspace.home / "state" / "audit"

    async def records(self, count: int, **query: Any) -> list[dict[str, Any]]:
        """Return the matching records, as soon as there are so many: what needs no waiting for is written soon."""
        async with asyncio.timeout(20):
            while len(found := list(search(self.log, Query(**query)))) < count:
                await asyncio.sleep(0.02)
        return found


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("audited")
    workspace = make_workspace(folder / "workspace")
    with asyncio.Runner() as runner:
        running = serving(workspace, audit_share=1.0)
        cloud = runner.run(running.__aenter__())

        async def publish() -> None:
            with workspace.client(cloud) as client:
                await asyncio.to_thread(client.publish, make_bundle(folder / "v1", 1), workspace.operator)
                await asyncio.to_thread(client.publish, make_bundle(folder / "v2", 2), workspace.operator)

        runner.run(publish())
        yield Stage(runner, workspace, cloud)
        runner.run(running.__aexit__(None, None, None))


def bearer(token: str, *more: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"), *more)


async def refused(call: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await call


def in_client(stage: Stage, work: Any) -> Any:
    async def story() -> Any:
        with stage.workspace.client(stage.cloud) as client:
            return await asyncio.to_thread(work, client)

    return stage.runner.run(story())


def test_an_action_is_recorded_before_it_runs_and_when_it_has(stage: Stage) -> None:
    def work(client: CloudClient) -> None:
        client.invite("press-1")
        client.release("triage", 1)
        client.release("triage", 2)

    in_client(stage, work)
    for action, fields in (("Invite", {"device": "press-1"}), ("Release", {"model": "triage", "version": 2})):
        allowed, done = stage.runner.run(stage.records(2, action=action, **fields))[-2:]
        assert (allowed["decision"], done["decision"]) == ("allowed", "done")
        assert allowed["subject"] == "somebody"
        assert allowed["tenant"] == "default"
        assert len(allowed["token_id"]) > 8
        assert allowed["peer"].startswith("ipv4:127.0.0.1:")
    published = stage.runner.run(stage.records(4, action="RegistryService/Publish", model="triage"))
    assert [(record["version"], record["decision"]) for record in published] == [
        (1, "allowed"), (1, "done"), (2, "allowed"), (2, "done"),
    ]  # fmt: skip


def test_an_action_that_fails_says_why(stage: Stage) -> None:
    def work(client: CloudClient) -> None:
        with pytest.raises(IsthmusError):
            client.pin("nobody", "triage", 1)

    in_client(stage, work)
    allowed, failed = stage.runner.run(stage.records(2, action="Pin", device="nobody"))
    assert (allowed["decision"], failed["decision"]) == ("allowed", "failed")
    assert failed["reason"] == "unknown-device"


def test_a_withdrawal_names_model_and_version(stage: Stage) -> None:
    in_client(stage, lambda client: client.withdraw("triage", 1, "hurts", stage.workspace.operator))
    (record,) = stage.runner.run(stage.records(1, action="model.withdrawn"))
    assert (record["model"], record["version"], record["detail"]["why"]) == ("triage", 1, "hurts")
    submitted = stage.runner.run(stage.records(2, action="SubmitMetadata"))
    assert any(name.endswith("targets.json") for name in submitted[0]["detail"])


def test_enrolment_token_refusals_and_reports_are_recorded(stage: Stage, tmp_path: Path) -> None:
    async def story() -> None:
        async with stage.workspace.channel(stage.cloud) as channel:
            fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)
            operator = bearer(stage.workspace.token("operator", "olga"))
            invited = await fleet.Invite(fleet_pb2.InviteRequest(device_id="press-2"), metadata=operator)
            csr = make_csr(new_device_key(tmp_path / "device.key"), "x", ())
            request = fleet_pb2.EnrolRequest(code=invited.code, csr_pem=csr)
            await fleet.Enrol(request)
            await refused(fleet.Enrol(request))
            await refused(fleet.IssueToken(fleet_pb2.IssueTokenRequest(assertion="nonsense")))
            report = fleet_pb2.ReportRequest(
                model="triage", version=2, state=fleet_pb2.UPDATE_STATE_ROLLED_BACK, reason="crashed", number=1
            )
            await fleet.Report(report, metadata=bearer(stage.workspace.token("device", "press-2")))
        done, again = await stage.records(2, action="Enrol")
        assert (done["decision"], done["device"]) == ("done", "press-2")
        assert (again["decision"], again["reason"]) == ("refused", "wrong-code")
        (token,) = await stage.records(1, action="IssueToken")
        assert token["decision"] == "refused"
        (kept,) = await stage.records(1, action="device.report")
        assert (kept["device"], kept["version"], kept["reason"]) == ("press-2", 2, "crashed")

    stage.runner.run(story())


def test_refusals_say_who_where_that_is_known(stage: Stage) -> None:
    async def story() -> None:
        async with stage.workspace.channel(stage.cloud) as channel:
            fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)
            inference: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            client = bearer(stage.workspace.token("client", "carl"), ("x-request-id", "r-1"))
            await refused(fleet.ListDevices(fleet_pb2.ListDevicesRequest(), metadata=client))
            await refused(fleet.ListDevices(fleet_pb2.ListDevicesRequest(), metadata=bearer("no.to.ken")))
            await refused(inference.ModelInfer(encode_request("nothing", {"x": X}), metadata=client))
        known, stranger = await stage.records(2, action="ListDevices", decision="refused")
        assert (known["reason"], known["subject"], known["request_id"]) == ("missing-scope", "carl", "r-1")
        assert "subject" not in stranger
        assert "no.to.ken" not in json.dumps(stranger)
        (model,) = await stage.records(1, action="ModelInfer", decision="refused")
        assert (model["reason"], model["subject"]) == ("unknown-model", "carl")

    stage.runner.run(story())


def test_a_flood_of_refusals_is_counted_and_does_not_fill_the_disk(stage: Stage) -> None:
    async def story() -> None:
        refused = 0  # as the callers count it
        async with stage.workspace.channel(stage.cloud) as channel:
            fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)
            for _ in range(30):
                calls = [fleet.GetDevice(fleet_pb2.GetDeviceRequest(), metadata=bearer("x")) for _ in range(10)]
                codes = [await call.code() for call in calls]
                refused += codes.count(grpc.StatusCode.UNAUTHENTICATED)
        assert refused > 200
        async with asyncio.timeout(60):
            while True:
                records = await stage.records(1, action="GetDevice", decision="refused")
                counted = sum(record.get("detail", {}).get("counted", 0) for record in records)
                singly = sum("counted" not in record.get("detail", {}) for record in records)
                if singly + counted == refused:
                    break
                await asyncio.sleep(0.1)
        assert singly < 150

    stage.runner.run(story())


def test_inference_is_sampled_without_payloads(stage: Stage) -> None:
    async def story() -> None:
        async with stage.workspace.channel(stage.cloud) as channel:
            inference: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            request = encode_request("triage", {"x": X}, request_id="q-7")
            await inference.ModelInfer(request, metadata=bearer(stage.workspace.token("client", "carl")))
        (record,) = await stage.records(1, action="inference.answered", request_id="q-7")
        assert (record["subject"], record["model"], record["version"]) == ("carl", "triage", 2)
        assert set(record["detail"]) == {"share"}

    stage.runner.run(story())


def test_auditors_see_their_own_tenant_and_operators_nothing(stage: Stage) -> None:
    issuer = TokenIssuer.load(stage.workspace.home)

    def token(role: str, tenant: str) -> str:
        return issuer.mint(f"{role}-{tenant}", role, ttl=timedelta(hours=1), tenant=tenant)[0]

    async def story() -> None:
        async with stage.workspace.channel(stage.cloud) as channel:
            fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)
            audit: Any = audit_pb2_grpc.AuditServiceStub(channel)
            for tenant in ("acme", "umbrella"):
                client = bearer(token("client", tenant))
                await refused(fleet.ListDevices(fleet_pb2.ListDevicesRequest(), metadata=client))
                await stage.records(1, subject=f"client-{tenant}")

            async def seen(tenant: str) -> list[dict[str, Any]]:
                call = audit.SearchRecords(
                    audit_pb2.SearchRecordsRequest(limit=10_000), metadata=bearer(token("auditor", tenant))
                )
                return [json.loads(answer.record_json) async for answer in call]

            async def exported(tenant: str) -> list[dict[str, Any]]:
                call = audit.ExportRecords(audit_pb2.ExportRecordsRequest(), metadata=bearer(token("auditor", tenant)))
                return [json.loads(line) async for answer in call for line in answer.lines.splitlines()]

            for look in (seen, exported):
                assert {record["tenant"] for record in await look("acme")} == {"acme"}
                assert {record.get("tenant", "") for record in await look("default")} == {"default", ""}
            heads = await audit.GetHeads(audit_pb2.GetHeadsRequest(), metadata=bearer(token("auditor", "acme")))
            assert len(heads.head_json) == 1
            await refused(audit.GetHeads(audit_pb2.GetHeadsRequest(), metadata=bearer(token("operator", "acme"))))
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in audit.SearchRecords(
                    audit_pb2.SearchRecordsRequest(limit=10_001), metadata=bearer(token("auditor", "acme"))
                ):
                    pass

    stage.runner.run(story())


def test_the_commands_ask_the_cloud(stage: Stage, tmp_path: Path) -> None:
    token = tmp_path / "auditor.token"
    token.write_text(stage.workspace.token("auditor", "ada"))
    where = ["--cloud", stage.cloud.address, "--trust", str(stage.workspace.trust), "--token-file", str(token)]

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, [*words, *where], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    async def story() -> None:
        rows = json.loads(await asyncio.to_thread(run, "search", "--action", "Invite", "--device", "press-1", "--json"))
        assert [row["decision"] for row in rows] == ["allowed", "done"]
        assert "press-1" in await asyncio.to_thread(run, "search", "--since", "1h")
        output = tmp_path / "records.jsonl"
        await asyncio.to_thread(run, "export", "--output", str(output), "--since", "1h")
        assert b'"device":"press-1"' in output.read_bytes()
        kept = tmp_path / "heads.json"
        await asyncio.to_thread(run, "head", "--output", str(kept))
        keys = load_public_keys(stage.workspace.trust / "audit.pub")
        (report,) = verify(stage.log, keys, [parse_head(line) for line in kept.read_bytes().splitlines()])
        assert report.problem is None

    stage.runner.run(story())


def test_with_a_full_disk_administrators_are_refused_and_inference_goes_on(stage: Stage) -> None:
    async def infer() -> None:
        async with stage.workspace.channel(stage.cloud) as channel:
            inference: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            metadata = bearer(stage.workspace.token("client"))
            await inference.ModelInfer(encode_request("triage", {"x": X}), metadata=metadata)

    async def story() -> None:
        with stage.workspace.client(stage.cloud) as client:
            await asyncio.to_thread(client.invite, "press-8")
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            size = max(path.stat().st_size for path in stage.log.glob("*.jsonl"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # no file of this process can grow beyond the log
            try:
                with pytest.raises(UnavailableError, match="the audit log cannot be written") as raised:
                    await asyncio.to_thread(client.invite, "press-9")
                assert raised.value.reason == "audit-unavailable"
                await infer()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            await asyncio.to_thread(client.invite, "press-10")
        assert not list(search(stage.log, Query(device="press-9")))
        assert await stage.records(2, device="press-10")
        assert await stage.records(1, action="audit.lost")

    stage.runner.run(story())


def test_the_log_of_all_this_is_sound(stage: Stage) -> None:
    (report,) = verify(stage.log, load_public_keys(stage.workspace.trust / "audit.pub"))
    assert report.problem is None
    assert report.records > 50
