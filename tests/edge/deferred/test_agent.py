"""The whole agent: what the command line shows, what the status adds up to, and whose queues are whose."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from edge.bootstrap import build_agent
from edge.cli import app
from edge.identity import DeviceHome, enrol
from isthmus.errors import IsthmusError, NotFoundError
from isthmus.oip import read_parameters, service_pb2_grpc, set_parameter
from isthmus.tensors import encode_request
from isthmus.v1 import agent_pb2, agent_pb2_grpc
from security.tls import channel_credentials
from tests.edge import bundles, faulty_cloud
from tests.edge.simulated_cloud import CODE, SimulatedCloud, simulated_cloud
from tests.edge.test_agent import Running, enrolled, running, settings, until

pytestmark = pytest.mark.slow
DOWN = faulty_cloud.refusing(grpc.StatusCode.UNAVAILABLE)
DEFER = {"isthmus.defer": True}


async def command(*arguments: str) -> str:
    result = await asyncio.to_thread(CliRunner().invoke, app, ["deferred", *arguments])
    assert result.exception is None, result.exception
    return result.stdout


async def defer(agent: Running, *ids: str) -> None:
    for request_id in ids:
        told = await agent.infer(bundles.HARD, request_id=request_id, parameters=DEFER)
        assert told["isthmus.deferred"] is True


def test_command_line_lists_watches_and_purges(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            cloud.publish(1)
            cloud.release(1)
            async with running(home, breaker_failures=1000) as agent:
                await agent.serves(1)
                at = ("--address", agent.address)
                assert json.loads(await command("list", *at, "--json")) == []
                cloud.inference.behaviour = DOWN
                await defer(agent, "a", "b", "c")
                (queue,) = json.loads(await command("list", *at, "--json"))
                assert (queue["queue"], queue["pending"], queue["results"]) == ("default", 3, 0)
                cloud.inference.behaviour = faulty_cloud.right
                cursor = str(tmp_path / "cursor.json")
                lines = (await command("watch", *at, "--count", "2", "--cursor", cursor)).splitlines()
                lines += (await command("watch", *at, "--count", "1", "--cursor", cursor)).splitlines()
                told = [json.loads(line) for line in lines]
                assert sorted(answer["request_id"] for answer in told) == ["a", "b", "c"]
                assert told[0]["outputs"]["logits"] == (bundles.HARD + 100).tolist()
                assert told[0]["parameters"]["isthmus.route"] == "cloud"
                cloud.inference.behaviour = DOWN
                await defer(agent, "d")
                purged = json.loads(await command("purge", *at, "--json"))
                assert purged == {"queue": "default", "pending": 1, "results": 0}
                status = await agent.status()
                counted = status["deferred"]
                assert (counted["stored"], counted["answered"], counted["acknowledged"]) == (4, 3, 3)
                assert (counted["purged_pending"], counted["pending"], counted["results"]) == (1, 0, 0)
                answers, uplink = status["models"][0]["answers"], status["uplink"]
                assert uplink["attempts"] + uplink["skipped"] == answers["fallback"] + counted["attempts"]
                assert uplink["attempts"] == len(cloud.inference.requests)

    asyncio.run(scenario())


def test_agent_that_does_not_defer_says_so(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            cloud.publish(1)
            cloud.release(1)
            async with running(home, defer=False) as agent:
                await agent.serves(1)
                cloud.inference.behaviour = DOWN
                told = await agent.infer(bundles.HARD, request_id="a", parameters=DEFER)
                assert (told["isthmus.deferred"], told["isthmus.not_deferred"]) == (False, "off")
                assert (await agent.status())["deferred"] is None
                result = await asyncio.to_thread(
                    CliRunner().invoke, app, ["deferred", "list", "--address", agent.address]
                )
                assert isinstance(result.exception, IsthmusError)
                assert "does not defer" in result.exception.message
                assert "defer = true" in result.exception.hint
            assert not (home / "deferred").exists()

    asyncio.run(scenario())


def test_callers_beyond_loopback_have_queues_of_their_own(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrol(DeviceHome(home), cloud=cloud.address, code=CODE, trust=cloud.trust, hosts=["127.0.0.1"])
            cloud.publish(1)
            cloud.release(1)
            stop = asyncio.Event()
            agent = build_agent(settings(home, listen="0.0.0.0:0"))
            async with asyncio.TaskGroup() as group:
                group.create_task(agent.run(stop))
                await until(lambda: agent.models.ready)
                cloud.inference.behaviour = DOWN
                address = json.loads((home / "ready.json").read_bytes())["address"].replace("0.0.0.0", "127.0.0.1")
                async with grpc.aio.secure_channel(address, channel_credentials(home / "trust" / "ca.pem")) as channel:
                    stub: Any = agent_pb2_grpc.AgentServiceStub(channel)
                    inference: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                    counts = []
                    for subject in ("app", "other"):
                        token, _ = cloud.issuer.mint(subject, "client", ttl=timedelta(minutes=1))
                        metadata = (("authorization", f"Bearer {token}"),)
                        if subject == "app":
                            request = encode_request("triage", {"x": bundles.HARD}, request_id="a")
                            set_parameter(request, "isthmus.defer", value=True)
                            response = await inference.ModelInfer(request, metadata=metadata)
                            assert read_parameters(response.parameters)["isthmus.deferred"] is True
                        listed = await stub.ListDeferred(agent_pb2.ListDeferredRequest(), metadata=metadata)
                        purged = await stub.PurgeDeferred(
                            agent_pb2.PurgeDeferredRequest(queue="default" if subject == "other" else "none"),
                            metadata=metadata,
                        )
                        counts.append((len(listed.queues), purged.pending))
                    assert counts == [(1, 0), (0, 0)]
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await stub.ListDeferred(agent_pb2.ListDeferredRequest())
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                stop.set()

    asyncio.run(scenario())


def test_wrong_queue_and_no_agent_are_named() -> None:
    result = CliRunner().invoke(app, ["deferred", "watch", "--address", "localhost:1"])
    assert isinstance(result.exception, IsthmusError)
    assert "agent at localhost:1" in result.exception.message
    assert not isinstance(result.exception, NotFoundError)
