"""Quotas at the gateway: over real TLS, with real tokens, a real Triton, a real Redis, real agents' uplinks."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cloud.bootstrap import Cloud
from cloud.client import Address, CloudClient
from cloud.redis_quotas import RedisQuotas
from edge.breaker import Breaker
from edge.uplink import Answer, Failure, Uplink, open_channel
from isthmus.errors import IsthmusError, NotFoundError, PermissionDeniedError, QuotaError
from isthmus.oip import MODEL_INFER
from isthmus.status import PUSHBACK_KEY, REASON_KEY, RETRY_AFTER_KEY, from_rpc
from isthmus.tensors import encode_request
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc, usage_pb2
from security.tenants import add_tenant
from security.tls import channel_credentials
from security.tokens import TokenIssuer
from tests.cloud.conftest import eventually
from tests.cloud.redis_server import redis_process
from tests.cloud.test_serve import cloud_process, isthmus
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace, serving

pytestmark = pytest.mark.slow

X = np.array([[1, 2, 3, 4]], dtype=np.float32)
SLOW = np.array([[-2, 2, 3, 4]], dtype=np.float32)
REQUEST = encode_request("triage", {"x": X}).SerializeToString()
CLIENTS, AT_ONCE = 8, 5
REQUESTS = 10_000


def token(workspace: Workspace, subject: str, role: str = "client", tenant: str = "default") -> str:
    issuer = TokenIssuer.load(workspace.home)
    return issuer.mint(subject, role, models=("*",), ttl=timedelta(hours=1), tenant=tenant)[0]


def admin(workspace: Workspace, address: str, role: str = "admin", tenant: str = "default") -> CloudClient:
    file = workspace.root / f"{role}-{tenant}.token"
    file.write_text(token(workspace, "boss", role, tenant))
    return CloudClient(Address(address, workspace.trust, file), timeout_s=20.0)


def quota(device: str = "", model: str = "", tenant: str = "default", **limits: Any) -> Any:
    scope = usage_pb2.QuotaScope(tenant=tenant, device=device, model=model)
    return usage_pb2.Quota(scope=scope, limits=usage_pb2.QuotaLimits(**limits))


@dataclass(frozen=True, slots=True)
class Stage:
    """A cloud that serves triage."""

    runner: asyncio.Runner
    workspace: Workspace
    cloud: Cloud

    def set(self, *args: str, **limits: Any) -> None:
        """Set a quota of the default tenant, a device of it, and a model."""

        async def story() -> None:
            with admin(self.workspace, self.cloud.address) as client:
                await asyncio.to_thread(client.set_quota, quota(*args, **limits))

        self.runner.run(story())

    def usage(self, prefix: str) -> Counter[str]:
        """Return the usage of the devices whose names begin like this."""

        async def story() -> list[Any]:
            with admin(self.workspace, self.cloud.address) as client:
                return await asyncio.to_thread(client.usage, usage_pb2.GetUsageRequest(by=["device"]))

        total: Counter[str] = Counter()
        for row in self.runner.run(story()):
            if row.device.startswith(prefix):
                total.update(
                    {
                        name: getattr(row, name)
                        for name in ("answered", "limited", "refused", "failed", "cancelled", "calls")
                    }
                )
        return total


@pytest.fixture(scope="module", params=["memory", "redis"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("admission")
    workspace = make_workspace(folder / "workspace")
    for name in ("mine", "theirs"):
        add_tenant(workspace.home, name, folder / name, workspace.trust / "ca.pem", datetime.now(UTC))
    redis = request.getfixturevalue("redis_address") if request.param == "redis" else ""
    with asyncio.Runner() as runner:
        running = serving(workspace, redis=redis, redis_timeout_s=60)
        cloud = runner.run(running.__aenter__())

        async def publish() -> None:
            with workspace.client(cloud) as client:
                bundle = make_bundle(folder / "v1", 1)
                await asyncio.to_thread(client.publish, bundle, workspace.operator)

        runner.run(publish())
        yield Stage(runner, workspace, cloud)
        runner.run(running.__aexit__(None, None, None))


@pytest.fixture(autouse=True)
def no_quota_of_another_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Remove the quotas that a test has set."""
    yield
    if "stage" not in request.fixturenames:
        return
    stage: Stage = request.getfixturevalue("stage")

    async def story() -> None:
        with admin(stage.workspace, stage.cloud.address) as client:
            for each in await asyncio.to_thread(client.quotas):
                await asyncio.to_thread(client.clear_quota, each.scope)

    stage.runner.run(story())


@asynccontextmanager
async def caller(workspace: Workspace, address: str, subject: str, tenant: str = "default") -> AsyncIterator[Any]:
    """Yield a call of ModelInfer on a connection of its own."""
    credentials = channel_credentials(workspace.trust / "ca.pem")
    options = (("grpc.use_local_subchannel_pool", 1),)
    metadata = (("authorization", f"Bearer {token(workspace, subject, tenant=tenant)}"),)
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        method: Any = channel.unary_unary(MODEL_INFER)

        async def infer(request: bytes = REQUEST) -> str:
            try:
                await method(request, metadata=metadata, timeout=60)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                return str(dict(error.trailing_metadata() or ())[REASON_KEY])
            return "answered"

        yield infer


async def flood(workspace: Workspace, addresses: list[str], requests: int, name: str) -> Counter[str]:
    """Send so many requests from eight clients, each as fast as it is answered; count what becomes of them."""
    assert requests % (CLIENTS * AT_ONCE) == 0
    outcomes: Counter[str] = Counter()

    async def client(number: int) -> None:
        async with caller(workspace, addresses[number % len(addresses)], f"{name}-{number}") as infer:
            for _ in range(requests // CLIENTS // AT_ONCE):
                outcomes.update(await asyncio.gather(*(infer() for _ in range(AT_ONCE))))

    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(client(number))
    return outcomes


def test_of_ten_thousand_requests_the_burst_is_answered_and_not_one_more(stage: Stage) -> None:
    stage.set(rate="0/s", burst=2345)
    outcomes = stage.runner.run(flood(stage.workspace, [stage.cloud.address], REQUESTS, "exact"))
    assert outcomes == {"answered": 2345, "quota-exceeded": REQUESTS - 2345}
    counted = stage.usage("exact")
    assert (counted["answered"], counted["limited"], counted["calls"]) == (2345, REQUESTS - 2345, 2345)
    assert sum(counted.values()) - counted["calls"] == REQUESTS


def test_each_device_and_model_has_its_own(stage: Stage) -> None:
    stage.set("*", rate="0/s", burst=3)
    stage.set("", "triage", rate="0/s", burst=7)

    async def story() -> list[int]:
        answered = []
        for number in range(4):
            async with caller(stage.workspace, stage.cloud.address, f"d{number}") as infer:
                answered.append([await infer() for _ in range(5)].count("answered"))
        return answered

    assert stage.runner.run(story()) == [3, 3, 1, 0]


def test_as_many_run_as_may(stage: Stage) -> None:
    stage.set(concurrency=2)

    async def story() -> None:
        slow = encode_request("triage", {"x": SLOW}).SerializeToString()
        async with caller(stage.workspace, stage.cloud.address, "narrow") as infer:
            for _ in range(2):
                outcomes = await asyncio.gather(*(infer(slow) for _ in range(6)))
                assert sorted(outcomes) == ["answered"] * 2 + ["too-many-requests"] * 4
            # An answer makes room before its caller has it.
            assert [await infer() for _ in range(20)] == ["answered"] * 20
            pending = [asyncio.ensure_future(infer(slow)) for _ in range(2)]

            async def both_run() -> bool:
                return bool(sum(replica.under_way for replica in stage.cloud.pool) == 2)

            await eventually(both_run, "two requests run")
            assert await infer() == "too-many-requests"
            for call in pending:
                call.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

            async def has_room() -> bool:
                return bool(await infer() == "answered")

            await eventually(has_room, "those that were cancelled have left")

    stage.runner.run(story())


def test_a_refusal_tells_programs_and_people_when_to_come_back(stage: Stage) -> None:
    stage.set("hinted", rate="2/min", burst=1)

    async def story() -> None:
        metadata = (("authorization", f"Bearer {token(stage.workspace, 'hinted')}"),)
        async with stage.workspace.channel(stage.cloud) as channel:
            method: Any = channel.unary_unary(MODEL_INFER)
            await method(REQUEST, metadata=metadata, timeout=20)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await method(REQUEST, metadata=metadata, timeout=20)
        told = dict(raised.value.trailing_metadata() or ())
        assert 0 < int(told[PUSHBACK_KEY]) <= 30_000
        assert 0 < int(told[RETRY_AFTER_KEY]) <= 30
        error = from_rpc(raised.value, "cannot ask")
        assert isinstance(error, QuotaError)
        assert error.retry_after_s == int(told[PUSHBACK_KEY]) / 1000
        assert "tenant default, device hinted" in error.message
        assert error.hint.startswith("try again in")

    stage.runner.run(story())


def test_an_agent_waits_as_long_as_it_is_told(stage: Stage) -> None:
    stage.set("patient", rate="1/min", burst=1)

    async def story() -> None:
        channel = open_channel(stage.cloud.address, stage.workspace.trust / "ca.pem")
        access = token(stage.workspace, "patient", "device")
        uplink = Uplink(channel, lambda: access, Breaker(), Breaker(), guard_s=0.01, longest_s=20.0)
        outcomes = [await uplink.escalate(REQUEST, remaining_s=20.0, check=lambda _: None) for _ in range(4)]
        await channel.close()
        assert isinstance(outcomes[0], Answer)
        assert outcomes[1:] == [Failure("quota"), Failure("quota", "backing-off"), Failure("quota", "backing-off")]
        assert 0 < uplink._quota._until - uplink._clock() <= 60
        assert (uplink.counters.attempts, uplink.counters.skipped) == (2, 2)

    stage.runner.run(story())
    assert stage.usage("patient")["limited"] == 1


def test_tells_prometheus(stage: Stage) -> None:
    stage.set("scraped", rate="0/s", burst=3)
    registry = CollectorRegistry(auto_describe=True)
    registry.register(stage.cloud.limits.collector())

    def scraped() -> Counter[tuple[str, str]]:
        families = text_string_to_metric_families(generate_latest(registry).decode())
        samples = [sample for family in families for sample in family.samples]
        kinds = ("outcome", "reason")
        return Counter(
            {(each.name, each.labels.get(kinds[0], each.labels.get(kinds[1], ""))): int(each.value) for each in samples}
        )

    async def story() -> None:
        before = scraped()
        async with caller(stage.workspace, stage.cloud.address, "scraped") as infer:
            assert [await infer() for _ in range(5)].count("answered") == 3
        size = (
            scraped()["isthmus_usage_answer_bytes_total", ""] // scraped()["isthmus_usage_requests_total", "answered"]
        )
        grown = scraped() - before
        del grown["isthmus_usage_call_seconds_total", ""]  # whole seconds here
        assert grown == {
            ("isthmus_usage_requests_total", "answered"): 3,
            ("isthmus_usage_requests_total", "limited"): 2,
            ("isthmus_usage_request_bytes_total", ""): 5 * len(REQUEST),
            ("isthmus_usage_answer_bytes_total", ""): 3 * size,
            ("isthmus_usage_calls_total", ""): 3,
            ("isthmus_quota_refusals_total", "quota-exceeded"): 2,
        }

    stage.runner.run(story())
    shared = isinstance(stage.cloud.limits.store, RedisQuotas)
    assert (("isthmus_quota_redis_up", "") in scraped()) is shared


def test_a_request_that_is_larger_than_ever_allowed_is_refused_for_good(stage: Stage) -> None:
    stage.set("small", bytes_rate="1KB/s", bytes_burst=1000)

    async def story() -> None:
        metadata = (("authorization", f"Bearer {token(stage.workspace, 'small')}"),)
        large = encode_request("triage", {"x": np.ones((8, 4), np.float32)}, request_id="x" * 2000).SerializeToString()
        async with stage.workspace.channel(stage.cloud) as channel:
            method: Any = channel.unary_unary(MODEL_INFER)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await method(large, metadata=metadata, timeout=20)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert dict(raised.value.trailing_metadata() or ())[REASON_KEY] == "too-large"
            await method(REQUEST, metadata=metadata, timeout=20)

    stage.runner.run(story())
    assert stage.usage("small")["limited"] == 1


def test_a_quota_that_is_cleared_counts_no_more(stage: Stage) -> None:
    stage.set("cleared", rate="0/s", burst=0)

    async def story() -> None:
        async with caller(stage.workspace, stage.cloud.address, "cleared") as infer:
            assert await infer() == "quota-exceeded"
            with admin(stage.workspace, stage.cloud.address) as client:
                scope = usage_pb2.QuotaScope(tenant="default", device="cleared")
                assert [q.scope for q in await asyncio.to_thread(client.quotas, "default")] == [scope]
                await asyncio.to_thread(client.clear_quota, scope)
                with pytest.raises(NotFoundError):
                    await asyncio.to_thread(client.clear_quota, scope)
            assert await infer() == "answered"

    stage.runner.run(story())


@pytest.mark.parametrize("role", ["operator", "admin"])
def test_others_see_their_own_tenant_and_set_nothing(stage: Stage, role: str) -> None:
    async def story() -> None:
        with admin(stage.workspace, stage.cloud.address) as client:
            for tenant in ("default", "mine", "theirs"):
                await asyncio.to_thread(client.set_quota, quota(tenant=tenant, rate="1000/s"))
        async with caller(stage.workspace, stage.cloud.address, "somebody") as infer:
            assert await infer() == "answered"
        with pytest.raises(grpc.aio.AioRpcError, match="there is no model"):
            async with caller(stage.workspace, stage.cloud.address, "stranger", "mine") as infer:
                await infer()  # a model of the default tenant
        with admin(stage.workspace, stage.cloud.address, role, "mine") as client:
            request = usage_pb2.GetUsageRequest(by=["tenant", "device", "model"])
            (row,) = await asyncio.to_thread(client.usage, request)
            assert (row.tenant, row.device, row.model) == ("mine", "stranger", "")
            assert row.refused >= 1
            assert {q.scope.tenant for q in await asyncio.to_thread(client.quotas)} == {"mine"}
            forbidden: list[Any] = [
                (client.usage, usage_pb2.GetUsageRequest(tenant="theirs")),
                (client.quotas, "theirs"),
                (client.set_quota, quota(tenant="mine", rate="100000/s")),
                (client.clear_quota, usage_pb2.QuotaScope(tenant="mine")),
                (client.compute, usage_pb2.GetComputeRequest()),
            ]
            for method, argument in forbidden:
                with pytest.raises(PermissionDeniedError):
                    await asyncio.to_thread(method, argument)

    stage.runner.run(story())


def test_a_token_for_some_models_sees_their_usage(stage: Stage) -> None:
    async def story() -> None:
        async with caller(stage.workspace, stage.cloud.address, "somebody") as infer:
            assert await infer() == "answered"
        for models, seen in ((("triage",), {"triage"}), (("other",), set())):
            file = stage.workspace.root / "limited.token"
            file.write_text(stage.workspace.token("operator", models=models))
            with CloudClient(Address(stage.cloud.address, stage.workspace.trust, file), timeout_s=20.0) as client:
                rows = await asyncio.to_thread(client.usage, usage_pb2.GetUsageRequest(by=["model"]))
                assert {row.model for row in rows} == seen

    stage.runner.run(story())


def test_what_cannot_be_a_quota_is_refused(stage: Stage) -> None:
    async def story() -> None:
        with admin(stage.workspace, stage.cloud.address) as client:
            wrong = [
                quota(tenant="", rate="1/s"), quota(rate="fast"), quota(burst=5), quota(concurrency=-1),
                quota("d\n", rate="1/s"), quota("d" * 1000, rate="1/s"), quota(rate="1/s", burst=2**60),
            ]  # fmt: skip
            for each in wrong:
                with pytest.raises(IsthmusError):
                    await asyncio.to_thread(client.set_quota, each)

    stage.runner.run(story())


def test_a_device_has_two_open_streams_and_no_third(stage: Stage) -> None:
    async def story() -> None:
        metadata = (("authorization", f"Bearer {token(stage.workspace, 'camera', 'device')}"),)
        async with stage.workspace.channel(stage.cloud) as channel:
            fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)
            request = fleet_pb2.WatchRequest(models=["triage"])
            streams = [fleet.Watch(request, metadata=metadata) for _ in range(2)]
            for stream in streams:
                await stream.read()
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await fleet.Watch(request, metadata=metadata).read()
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert dict(raised.value.trailing_metadata() or ())[REASON_KEY] == "too-many-streams"
            other = (("authorization", f"Bearer {token(stage.workspace, 'door', 'device')}"),)
            await fleet.Watch(request, metadata=other).read()
            streams[0].cancel()

            async def has_room() -> bool:
                stream = fleet.Watch(request, metadata=metadata)
                try:
                    await stream.read()
                except grpc.aio.AioRpcError:
                    return False
                stream.cancel()
                return True

            await eventually(has_room, "the stream that was cancelled has left")

    stage.runner.run(story())


def _second_home(workspace: Workspace, root: Path) -> Workspace:
    """Another replica's folders: the same keys, and a state of its own."""
    import shutil

    shutil.copytree(workspace.root, root, ignore=shutil.ignore_patterns("state", "ready.json"))
    return Workspace(root)


def test_two_gateways_share_one_redis_to_the_request(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "one")
    with redis_process(_made(tmp_path / "redis")) as (address, redis), ExitStack() as stack:
        shared = {
            "ISTHMUS_CLOUD_REDIS": address,
            "ISTHMUS_CLOUD_REDIS_TIMEOUT_S": "60",
            "ISTHMUS_CLOUD_DATABASE": f"sqlite:///{tmp_path / 'shared.db'}",
            "ISTHMUS_CLOUD_BLOBS": str(tmp_path / "blobs"),
            "ISTHMUS_CLOUD_TRITON_STOP_S": "0.2",
            "ISTHMUS_CLOUD_METERING_FLUSH_S": "0.5",
        }
        _, one = stack.enter_context(cloud_process(workspace, **shared))
        with admin(workspace, one["address"]) as client:
            bundle = make_bundle(tmp_path / "v1", 1)
            client.publish(bundle, workspace.operator)
            client.set_quota(quota(rate="0/s", burst=617))
        other_home = _second_home(workspace, tmp_path / "two")
        _, two = stack.enter_context(cloud_process(other_home, **shared))
        addresses = [one["address"], two["address"]]
        outcomes = asyncio.run(flood(workspace, addresses, REQUESTS, "exact"))
        assert outcomes == {"answered": 617, "quota-exceeded": REQUESTS - 617}

        def counted() -> int:
            flags = ("--trust", workspace.trust, "--token-file", workspace.root / "admin-default.token", "--cloud")
            shown = isthmus("usage", "--json", *flags, one["address"])
            assert shown.returncode == 0, shown.stderr
            return sum(row["requests"] for row in json.loads(shown.stdout))

        async def all_counted() -> bool:
            return await asyncio.to_thread(counted) == REQUESTS

        asyncio.run(eventually(all_counted, "both gateways' counts are in the database", within_s=60))
        _kill(redis)
        # Without Redis each gateway counts by itself: more than was meant, but never without a limit.
        outcomes = asyncio.run(flood(workspace, addresses, 2000, "later"))
        assert outcomes == {"answered": 2 * 617, "quota-exceeded": 2000 - 2 * 617}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(30)
