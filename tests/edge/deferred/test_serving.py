"""Deferral as clients see it: provisional answers, late ones, retries, faults, several subscribers, an orderly stop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from edge.deferred.store import Limits
from isthmus.deferred import DeferredAnswers
from isthmus.errors import InputError
from isthmus.fusion import fuse
from isthmus.oip import read_parameters, service_pb2
from isthmus.tensors import Array, decode_outputs
from isthmus.v1 import agent_pb2, agent_pb2_grpc
from tests.edge import bundles, faulty_cloud
from tests.edge.deferred.serving import deferring
from tests.edge.serving import FUSION_WEIGHT, MODEL, fuse_answers, open_variant

DOWN = faulty_cloud.refusing(grpc.StatusCode.UNAVAILABLE)
NO = faulty_cloud.refusing(grpc.StatusCode.INVALID_ARGUMENT)


def test_request_of_an_outage_is_answered_later_with_its_id(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deferring(tmp_path) as agent:
            agent.cloud.behaviour = DOWN
            told = await agent.infer("r1", queue="night")
            assert (told["isthmus.route"], told["isthmus.provisional"], told["isthmus.deferred"]) == (
                "fallback",
                True,
                True,
            )
            again = await agent.infer("r1", queue="night")  # a retry: nothing is stored or escalated
            assert (again["isthmus.reason"], again["isthmus.deferred"]) == ("deferred", True)
            assert agent.deferred.deferral.counters.stored == 1
            agent.cloud.behaviour = faulty_cloud.right
            agent.deferred.sender.connected()
            (late,) = await agent.receive(1, queue="night")
            assert (late.request_id, late.response.id) == ("r1", "r1")  # type: ignore[union-attr]
            late_told = read_parameters(late.response.parameters)  # type: ignore[union-attr]
            assert late_told == {
                "isthmus.route": "cloud",
                "isthmus.reason": "uncertain",
                "isthmus.provisional": False,
                "isthmus.score": told["isthmus.score"],
                "isthmus.threshold": told["isthmus.threshold"],
                "isthmus.calibration": told["isthmus.calibration"],
                "isthmus.edge_version": 1,
                "isthmus.cloud_version": "7",
            }
            np.testing.assert_array_equal(decode_outputs(late.response)["logits"], bundles.HARD + np.float32(100))
            assert (await agent.infer("r1", queue="night"))["isthmus.reason"] == "deferred"
            assert agent.deferred.deferral.totals() == (0, 0, 0)

    asyncio.run(scenario())


def test_what_needs_no_deferral_is_answered_as_ever(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deferring(tmp_path) as agent:
            assert (await agent.infer("sure", bundles.SURE))["isthmus.route"] == "edge"
            told = await agent.infer("hard")
            assert told["isthmus.route"] == "cloud"
            assert "isthmus.deferred" not in told
            agent.cloud.behaviour = DOWN
            assert "isthmus.deferred" not in await agent.infer("other", defer=False)
            assert agent.deferred.deferral.counters.stored == 0

    asyncio.run(scenario())


def test_refused_request_is_not_kept_and_a_kept_one_that_is_refused_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deferring(tmp_path) as agent:
            agent.cloud.behaviour = NO
            told = await agent.infer("now")
            assert (told["isthmus.deferred"], told["isthmus.not_deferred"]) == (False, "final")
            agent.cloud.behaviour = DOWN
            assert (await agent.infer("later"))["isthmus.deferred"] is True
            agent.cloud.behaviour = NO
            agent.deferred.sender.connected()
            (late,) = await agent.receive(1)
            assert (late.request_id, late.response, late.reason) == ("later", None, "refused")

    asyncio.run(scenario())


@pytest.mark.parametrize("behaviour", ["garbage", "wrong_shape", "not_finite"])
def test_late_answer_is_checked_as_a_live_one(tmp_path: Path, behaviour: str) -> None:
    async def scenario() -> None:
        async with deferring(tmp_path) as agent:
            agent.cloud.behaviour = DOWN
            await agent.infer("r1")
            agent.cloud.behaviour = getattr(faulty_cloud, behaviour)
            agent.deferred.sender.connected()
            (late,) = await agent.receive(1)
            assert (late.response, late.reason) == (None, "refused")
            assert "cloud" in late.message

    asyncio.run(scenario())


def test_full_quota_costs_the_promise_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deferring(tmp_path, sending=False, limits=Limits(bytes=1 << 20, entries=1)) as agent:
            agent.cloud.behaviour = DOWN
            await agent.infer("first")
            told = await agent.infer("second")
            assert (told["isthmus.route"], told["isthmus.not_deferred"]) == ("fallback", "quota")
            assert (await agent.infer("third", priority=9))["isthmus.deferred"] is True
            (late,) = await agent.receive(1)
            assert (late.request_id, late.reason) == ("first", "evicted")

    asyncio.run(scenario())


def test_expired_request_is_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deferring(tmp_path) as agent:
            agent.cloud.behaviour = DOWN
            await agent.infer("r1", ttl_s=1)
            (late,) = await agent.receive(1)
            assert (late.request_id, late.reason) == ("r1", "expired")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("request_id", "parameters", "message"),
    [
        ("", {}, "expected a request id"),
        ("r", {"priority": 11}, "isthmus.priority: expected a whole number"),
        ("r", {"queue": "../x"}, "isthmus.queue: expected a name"),
        ("r", {"ttl_s": 3601}, "from 1 to 3600"),
        ("r", {"defer": "yes"}, "expected true or false"),
    ],
)
def test_wrong_wish_is_the_callers_error(
    tmp_path: Path, request_id: str, parameters: dict[str, Any], message: str
) -> None:
    async def scenario() -> None:
        async with deferring(tmp_path) as agent:
            with pytest.raises(InferenceServerException, match=message) as caught:
                await agent.infer(request_id, **parameters)
            assert "INVALID_ARGUMENT" in caught.value.status()

    asyncio.run(scenario())


def test_every_subscriber_sees_what_is_not_acknowledged(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deferring(tmp_path) as agent, grpc.aio.insecure_channel(agent.address) as channel:
            agent.cloud.behaviour = DOWN
            for number in range(3):
                await agent.infer(f"r{number}")
            agent.cloud.behaviour = faulty_cloud.right
            agent.deferred.sender.connected()
            stub: Any = agent_pb2_grpc.AgentServiceStub(channel)
            first = stub.WatchDeferred(agent_pb2.WatchDeferredRequest(queue="default"))
            seen = [await first.read() for _ in range(3)]
            second = stub.WatchDeferred(
                agent_pb2.WatchDeferredRequest(queue="default", after=seen[0].sequence, store=seen[0].store)
            )
            assert [(await second.read()).request_id for _ in range(2)] == [m.request_id for m in seen[1:]]
            answer = service_pb2.ModelInferResponse.FromString(seen[0].answer)
            assert answer.id == seen[0].request_id

            async def acknowledge(sequence: int, store: str) -> int:
                request = agent_pb2.AcknowledgeDeferredRequest(queue="default", sequence=sequence, store=store)
                return int((await stub.AcknowledgeDeferred(request)).removed)

            assert await acknowledge(seen[1].sequence, "another store") == 0
            assert await acknowledge(seen[1].sequence, seen[1].store) == 2
            third = stub.WatchDeferred(
                agent_pb2.WatchDeferredRequest(queue="default", after=10**6, store="another store")
            )
            assert (await third.read()).request_id == seen[2].request_id
            listed = (await stub.ListDeferred(agent_pb2.ListDeferredRequest())).queues
            assert [(q.queue, q.pending, q.results, q.first_sequence) for q in listed] == [
                ("default", 0, 1, seen[2].sequence)
            ]
            for stream in (first, second, third):
                stream.cancel()

    asyncio.run(scenario())


def test_bad_calls_are_the_callers_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deferring(tmp_path) as agent, grpc.aio.insecure_channel(agent.address) as channel:
            service = "/isthmus.v1.AgentService/"
            stub: Any = agent_pb2_grpc.AgentServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.WatchDeferred(agent_pb2.WatchDeferredRequest(queue="a/b")).read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            for method in ("AcknowledgeDeferred", "ListDeferred", "PurgeDeferred"):
                call: Any = channel.unary_unary(service + method)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(b"\xff\xff")
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(InputError, match="expected a name"):
                await agent.receive(1, queue="a/b")
            streams = [stub.WatchDeferred(agent_pb2.WatchDeferredRequest(queue="q")) for _ in range(17)]
            reads = [asyncio.ensure_future(stream.read()) for stream in streams]
            done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED, timeout=5)
            (refused,) = done
            with pytest.raises(grpc.aio.AioRpcError, match="at most 16 subscribers"):
                await refused
            for stream, read in zip(streams, reads, strict=True):
                read.cancel()
                stream.cancel()

    asyncio.run(scenario())


def test_streams_end_without_an_error_when_the_agent_stops(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deferring(tmp_path) as agent, grpc.aio.insecure_channel(agent.address) as channel:
            stub: Any = agent_pb2_grpc.AgentServiceStub(channel)
            stream = stub.WatchDeferred(agent_pb2.WatchDeferredRequest(queue="default"))
            await stream.wait_for_connection()
            agent.deferred.service.stop()
            async with asyncio.timeout(5):
                assert await stream.read() is grpc.aio.EOF
                assert await stream.code() is grpc.StatusCode.OK

    asyncio.run(scenario())


def test_client_that_fails_while_it_handles_an_answer_gets_it_again(tmp_path: Path) -> None:
    cursor = tmp_path / "cursor.json"

    async def scenario() -> None:
        async with deferring(tmp_path) as agent:
            agent.cloud.behaviour = DOWN
            for number in range(3):
                await agent.infer(f"r{number}")
            agent.cloud.behaviour = faulty_cloud.right
            agent.deferred.sender.connected()
            seen: list[str] = []

            async def fail_at_the_second() -> None:
                async with DeferredAnswers(agent.address, cursor=cursor) as answers:
                    async for answer in answers:
                        seen.append(answer.request_id)
                        if len(seen) == 2:
                            raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                await fail_at_the_second()
            rest = await agent.receive(2, cursor=cursor)
            assert rest[0].request_id == seen[1]
            assert {seen[0], *(answer.request_id for answer in rest)} == {"r0", "r1", "r2"}

    asyncio.run(scenario())


def test_late_answer_is_captured_and_counted_once(tmp_path: Path) -> None:
    captured: list[tuple[str, Mapping[str, Array], Mapping[str, Array]]] = []

    async def scenario() -> None:
        async with deferring(tmp_path, capture=lambda *given: captured.append(given)) as agent:
            agent.cloud.behaviour = DOWN
            await agent.infer("r1")
            counted = agent.models.counters[MODEL]
            assert (captured, counted.compared_rows) == ([], 0)
            agent.cloud.behaviour = faulty_cloud.answering(np.array([[0, 0, 9]], np.float32))
            agent.deferred.sender.connected()
            await agent.receive(1)
            await agent.until(lambda: bool(captured))
            ((model, inputs, outputs),) = captured
            assert model == MODEL
            np.testing.assert_array_equal(inputs["x"], bundles.HARD)
            np.testing.assert_array_equal(outputs["logits"], np.array([[0, 0, 9]], np.float32))
            assert (counted.compared_rows, counted.agreed_rows) == (1, 0)

    asyncio.run(scenario())


def test_late_answer_of_another_version_is_given_and_not_learnt_from(tmp_path: Path) -> None:
    captured: list[object] = []

    async def scenario() -> None:
        async with deferring(tmp_path, capture=lambda *given: captured.append(given)) as agent:
            agent.cloud.behaviour = DOWN
            await agent.infer("r1")
            bundles.build_bundle(tmp_path / "second", version=2)
            agent.models.swap(MODEL, open_variant(tmp_path / "second"))
            agent.cloud.behaviour = faulty_cloud.right
            agent.deferred.sender.connected()
            (late,) = await agent.receive(1)
            await agent.until(lambda: agent.deferred.deferral.counters.answered == 1)
            assert late.response is not None
            assert (captured, agent.models.counters[MODEL].compared_rows) == ([], 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("route", [None, "cloud"])
def test_late_answer_is_fused_as_a_live_one(tmp_path: Path, route: str | None) -> None:
    async def scenario() -> None:
        async with deferring(tmp_path) as agent:
            fuse_answers(agent.models)
            agent.cloud.behaviour = DOWN
            wish: dict[str, Any] = {} if route is None else {"route": route}
            await agent.infer("r1", **wish)
            heavy = np.array([[0.0, 0.1, 3.0]], np.float32)
            agent.cloud.behaviour = faulty_cloud.answering_logits(heavy)
            agent.deferred.sender.connected()
            (late,) = await agent.receive(1)
            assert late.response is not None
            told = read_parameters(late.response.parameters)
            light = bundles.HARD @ bundles.weights(1)
            both = fuse(light, heavy, temperature=1.0, light_weight=FUSION_WEIGHT)
            assert told.get("isthmus.fused") is (None if route else True)
            expected = heavy if route else both  # who asks for the cloud gets the cloud's own
            np.testing.assert_allclose(decode_outputs(late.response)["logits"], expected, rtol=1e-5)

    asyncio.run(scenario())
