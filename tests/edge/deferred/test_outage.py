"""A long outage, and an agent that is killed again and again: a thousand hard requests, each answered once."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from edge.identity import DeviceHome, enrol
from edge.status_client import fetch_status
from isthmus.deferred import DeferredAnswers, LateAnswer
from isthmus.oip import read_parameters
from isthmus.tensors import Array, decode_outputs
from tests.edge import bundles
from tests.edge.serving import explanation
from tests.edge.simulated_cloud import CODE, SimulatedCloud, simulated_cloud
from tests.edge.test_agent import running

pytestmark = pytest.mark.slow
REQUESTS = 1000
CLIENTS = 8
PATIENCE_S = 120
KILLS = (200, 500, 800)  # answered requests before each
KILL_WHILE_DELIVERING = 400  # delivered results


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.02)


class AgentProcess:
    """A real agent in a process of its own, which can be killed and started again on the same port."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._ready = home / "ready.json"
        self._process: asyncio.subprocess.Process | None = None
        self.address = "127.0.0.1:0"

    async def start(self) -> None:
        self._ready.unlink(missing_ok=True)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "isthmus", "--log-level", "error", "edge", "run", "--home", str(self._home),
            "--model", "triage", "--listen", self.address, "--ready-file", str(self._ready),
            env=os.environ | {"PYTHONPATH": ".:proto"},
        )  # fmt: skip
        await until(self._ready.exists)
        self.address = json.loads(self._ready.read_bytes())["address"]

    async def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def stop(self) -> int:
        assert self._process is not None
        self._process.terminate()
        return await self._process.wait()


def hard(number: int) -> Array:
    return bundles.HARD + np.float32(number * 1e-5)


async def ask(client: triton.InferenceServerClient, number: int) -> dict[str, Any]:
    """Ask until there is an answer, always with the same id, as an application does."""
    x = hard(number)
    tensor = triton.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x)
    while True:
        try:
            result = await client.infer(
                "triage", [tensor], request_id=f"r{number}", parameters={"isthmus.defer": True}, client_timeout=5
            )
        except InferenceServerException:
            await asyncio.sleep(0.05)
        else:
            return explanation(result)


async def ask_all(agent: AgentProcess) -> list[dict[str, Any]]:
    numbers = iter(range(REQUESTS))
    answers: list[dict[str, Any]] = []
    options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200)]

    async def ask_in_turn(client: triton.InferenceServerClient) -> None:
        for number in numbers:
            answers.append(await ask(client, number))

    def enough(count: int) -> bool:
        return len(answers) >= count

    async def kill_now_and_then() -> None:
        for count in KILLS:
            await until(partial(enough, count))
            await agent.kill()
            await agent.start()

    client = triton.InferenceServerClient(agent.address, channel_args=options)
    async with asyncio.TaskGroup() as group:
        group.create_task(kill_now_and_then())
        for _ in range(CLIENTS):
            group.create_task(ask_in_turn(client))
    await client.close()
    return answers


async def collect(agent: AgentProcess, cursor: Path, received: list[LateAnswer], count: int) -> None:
    async with DeferredAnswers(agent.address, cursor=cursor) as answers:
        async for answer in answers:
            received.append(answer)
            if len(received) == count:
                return


async def collect_all(agent: AgentProcess, cursor: Path, received: list[LateAnswer]) -> None:
    """Subscribe through all kills, and come back as a new client half way."""
    await collect(agent, cursor, received, REQUESTS // 2)
    await collect(agent, cursor, received, REQUESTS)


def test_every_request_of_an_outage_is_answered_once(tmp_path: Path) -> None:
    home, cursor = tmp_path / "device", tmp_path / "cursor.json"
    cloud = SimulatedCloud(tmp_path / "workspace")
    agent = AgentProcess(home)
    received: list[LateAnswer] = []

    async def scenario() -> None:
        async with simulated_cloud(cloud):
            await enrol(DeviceHome(home), cloud=cloud.address, code=CODE, trust=cloud.trust)
            cloud.publish(1)
            cloud.release(1)
            async with running(home) as first:
                await first.serves(1)
        await agent.start()
        async with asyncio.TaskGroup() as group:
            subscriber = group.create_task(collect_all(agent, cursor, received))
            answers = await ask_all(agent)
            assert len(answers) == REQUESTS
            assert {(told["isthmus.route"], told["isthmus.deferred"]) for told in answers} == {("fallback", True)}
            assert received == []
            async with simulated_cloud(cloud, port=int(cloud.address.rpartition(":")[2])):
                await until(lambda: len(received) >= KILL_WHILE_DELIVERING)
                await agent.kill()
                await agent.start()
                await subscriber
                status = await asyncio.to_thread(fetch_status, agent.address)
                assert (status["deferred"]["pending"], status["deferred"]["results"]) == (0, 0)
        async with asyncio.timeout(10):
            assert await agent.stop() == 0

    asyncio.run(scenario())
    assert Counter(answer.request_id for answer in received) == {f"r{n}": 1 for n in range(REQUESTS)}
    for answer in received:
        expected = hard(int(answer.request_id[1:])) + np.float32(100)
        np.testing.assert_array_equal(decode_outputs(answer.response)["logits"], expected)
        told = read_parameters(answer.response.parameters)  # type: ignore[union-attr]
        assert (told["isthmus.route"], told["isthmus.provisional"]) == ("cloud", False)
        assert (told["isthmus.reason"], answer.response.id) == ("uncertain", answer.request_id)  # type: ignore[union-attr]
    assert REQUESTS <= len(cloud.inference.requests) <= REQUESTS + 2  # at worst what was on its way when it was killed
