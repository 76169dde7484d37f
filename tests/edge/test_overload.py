"""More requests than the agent can take, and callers that go away: what waits is bounded, and never runs in vain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.utils import InferenceServerException

from isthmus.oip import service_pb2_grpc
from isthmus.tensors import encode_request
from tests.edge import bundles, faulty_cloud
from tests.edge.held import hold
from tests.edge.serving import MODEL, Serving, explanation, serving


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def start(agent: Serving, x: Any, **kwargs: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(agent.infer(x, client_timeout=20, **kwargs))


def test_full_queue_refuses_at_once_and_what_waits_is_answered(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            held = hold(agent, queue=2)
            admitted = [start(agent, bundles.SURE) for _ in range(3)]
            await until(lambda: agent.models.find(MODEL).waiting == 3)
            async with grpc.aio.insecure_channel(agent.address) as channel:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                with pytest.raises(grpc.aio.AioRpcError, match="the light model is busy: 3 requests") as caught:
                    await stub.ModelInfer(encode_request(MODEL, {"x": bundles.SURE}))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert ("isthmus-reason", "overloaded") in tuple(caught.value.trailing_metadata())
            held.open.set()
            for answer in await asyncio.gather(*admitted):
                assert explanation(answer)["isthmus.route"] == "edge"
            counters = agent.models.counters[MODEL]
            assert counters.failures == {"overloaded": 1}
            assert counters.routes["edge"].answers == 3

    asyncio.run(scenario())


def test_requests_in_progress_are_bounded_for_each_model(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, model_calls=2) as agent:
            agent.cloud.behaviour = faulty_cloud.black_hole
            escalating = [start(agent, bundles.HARD) for _ in range(2)]
            await until(lambda: len(agent.cloud.requests) == 2)
            with pytest.raises(InferenceServerException, match="2 requests are in progress") as caught:
                await agent.infer(bundles.SURE)
            assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
            for task in escalating:
                task.cancel()
            await until(lambda: agent.models.counters[MODEL].in_progress == 0)
            assert explanation(await agent.infer(bundles.SURE))["isthmus.route"] == "edge"

    asyncio.run(scenario())


@pytest.mark.slow
def test_overload_sheds_and_what_is_admitted_waits_behind_a_full_queue_at_most(tmp_path: Path) -> None:
    takes_s, queue = 0.02, 4

    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            held = hold(agent, queue=queue, takes_s=takes_s)
            held.open.set()
            light = agent.models.find(MODEL)
            waiting: list[int] = []  # as each inference begins and as each request ends
            held.begins = lambda: waiting.append(light.waiting)
            answered = 0
            shed: list[str] = []
            ends = time.monotonic() + 3.0

            async def caller() -> None:
                nonlocal answered
                while time.monotonic() < ends:
                    try:
                        await agent.infer(bundles.SURE, client_timeout=20)
                        answered += 1
                    except InferenceServerException as error:
                        shed.append(error.status())
                        await asyncio.sleep(takes_s / 4)  # the pace of a caller that tries again
                    waiting.append(light.waiting)

            async with asyncio.TaskGroup() as group:
                for _ in range(24):
                    group.create_task(caller())
            counters = agent.models.counters[MODEL]
            assert counters.routes["edge"].answers == answered
            assert counters.failures == {"overloaded": len(shed)}
            assert set(shed) == {"StatusCode.RESOURCE_EXHAUSTED"}
            assert len(shed) > answered > queue
            assert max(waiting) == queue + 1  # one runs: nothing that is admitted waits for more than a full queue

    asyncio.run(scenario())


def test_cancelled_request_that_waits_never_runs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            held = hold(agent)
            first = start(agent, bundles.SURE)
            await until(lambda: len(held.seen) == 1)
            waiting = start(agent, bundles.HARD)
            await until(lambda: agent.models.find(MODEL).waiting == 2)
            waiting.cancel()
            await until(lambda: agent.models.find(MODEL).waiting == 1)
            held.open.set()
            await first
            await agent.infer(bundles.SURE)
            assert [inputs["x"].tolist() for inputs in held.seen] == [bundles.SURE.tolist()] * 2
            counters = agent.models.counters[MODEL]
            assert (counters.failures, counters.in_progress) == ({"cancelled": 1}, 0)
            assert counters.routes["edge"].answers == 2
            assert agent.cloud.requests == []

    asyncio.run(scenario())


def test_request_whose_deadline_passes_while_it_waits_never_runs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            held = hold(agent)
            first = start(agent, bundles.SURE)
            await until(lambda: len(held.seen) == 1)
            with pytest.raises(InferenceServerException) as caught:
                await agent.infer(bundles.HARD, client_timeout=0.1)
            assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
            await until(lambda: agent.models.find(MODEL).waiting == 1)
            held.open.set()
            await first
            assert len(held.seen) == 1

    asyncio.run(scenario())


def test_cancelled_request_cancels_its_escalation(tmp_path: Path) -> None:
    cancelled = asyncio.Event()

    async def until_cancelled(raw: bytes, context: Any) -> bytes:
        try:
            return await faulty_cloud.black_hole(raw, context)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            agent.cloud.behaviour = until_cancelled
            hard = start(agent, bundles.HARD)
            await until(lambda: len(agent.cloud.requests) == 1)
            hard.cancel()
            async with asyncio.timeout(20):
                await cancelled.wait()
            await until(lambda: agent.models.counters[MODEL].in_progress == 0)
            assert agent.models.counters[MODEL].failures == {"cancelled": 1}
            counters = agent.uplink.counters
            assert (counters.attempts, counters.successes, counters.failures, counters.cancelled) == (1, 0, 0, 1)
            assert agent.uplink.breaker.state == "closed"

    asyncio.run(scenario())
