"""Streams: order, bounds, cancellation, and the end that a stopping agent puts to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from edge.server import InferenceService
from edge.stream import answer_stream
from isthmus.errors import UnavailableError
from isthmus.oip import SERVICE, service_pb2, service_pb2_grpc
from isthmus.tensors import encode_request
from tests.edge import bundles, faulty_cloud
from tests.edge.held import hold
from tests.edge.serving import MODEL, Serving, serving
from tests.edge.test_overload import until


class Caller:
    """Sends numbers and remembers what was read of them; the test says when each is answered."""

    def __init__(self, count: int) -> None:
        self.read: list[int] = []
        self.written: list[int] = []
        self.cancelled: list[int] = []
        self.may_answer = [asyncio.Event() for _ in range(count)]
        self.ended = asyncio.Event()

    async def requests(self) -> AsyncIterator[bytes]:
        for number in range(len(self.may_answer)):
            self.read.append(number)
            yield bytes([number])
        await self.ended.wait()

    async def answer(self, request: bytes) -> int:
        try:
            await self.may_answer[request[0]].wait()
        except asyncio.CancelledError:
            self.cancelled.append(request[0])
            raise
        return request[0]

    async def write(self, answer: int) -> None:
        self.written.append(answer)

    def start(self, *, in_progress: int, stopping: asyncio.Event | None = None) -> asyncio.Task[None]:
        run = answer_stream(
            self.requests(), self.answer, self.write, in_progress=in_progress, stopping=stopping or asyncio.Event()
        )
        return asyncio.create_task(run)


def test_answers_come_in_order_whatever_is_ready_first() -> None:
    async def scenario() -> None:
        caller = Caller(4)
        stream = caller.start(in_progress=8)
        for number in (2, 3, 1):
            caller.may_answer[number].set()
        await until(lambda: len(caller.read) == 4)
        assert caller.written == []
        caller.may_answer[0].set()
        caller.ended.set()
        await stream
        assert caller.written == [0, 1, 2, 3]

    asyncio.run(scenario())


def test_no_more_is_read_than_may_be_in_progress() -> None:
    async def scenario() -> None:
        caller = Caller(10)
        stream = caller.start(in_progress=3)
        await until(lambda: len(caller.read) == 3)
        caller.may_answer[2].set()  # ready, but not its turn: it still counts
        for _ in range(20):
            await asyncio.sleep(0)
        assert caller.read == [0, 1, 2]
        caller.may_answer[0].set()
        await until(lambda: caller.read == [0, 1, 2, 3])
        for event in (*caller.may_answer, caller.ended):
            event.set()
        await stream
        assert caller.written == list(range(10))

    asyncio.run(scenario())


def test_caller_that_goes_away_cancels_what_is_in_progress() -> None:
    async def scenario() -> None:
        caller = Caller(3)
        stream = caller.start(in_progress=8)
        await until(lambda: len(caller.read) == 3)
        await asyncio.sleep(0)
        stream.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stream
        assert sorted(caller.cancelled) == [0, 1, 2]

    asyncio.run(scenario())


def test_stopping_answers_what_was_read_and_ends() -> None:
    async def scenario() -> None:
        caller, stopping = Caller(10), asyncio.Event()
        stream = caller.start(in_progress=2, stopping=stopping)
        await until(lambda: len(caller.read) == 2)
        await asyncio.sleep(0)
        stopping.set()
        for event in caller.may_answer:
            event.set()
        with pytest.raises(UnavailableError, match="the agent stops"):
            await stream
        assert caller.written == caller.read

    asyncio.run(scenario())


async def send(count: int, x: Any) -> AsyncIterator[Any]:
    for number in range(count):
        yield encode_request(MODEL, {"x": x}, request_id=str(number))


def test_stream_over_the_wire_is_bounded_by_the_setting(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, stream_requests=4) as agent, grpc.aio.insecure_channel(agent.address) as channel:
            held = hold(agent)
            call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(send(50, bundles.SURE))
            await until(lambda: agent.models.counters[MODEL].in_progress == 4)
            assert agent.models.find(MODEL).waiting == 4
            held.open.set()
            ids = [response.infer_response.id async for response in call]
            assert ids == [str(number) for number in range(50)]

    asyncio.run(scenario())


def test_cancelled_stream_cancels_its_escalations(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent, grpc.aio.insecure_channel(agent.address) as channel:
            agent.cloud.behaviour = faulty_cloud.black_hole
            call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(
                send(5, bundles.HARD), timeout=20
            )
            await until(lambda: len(agent.cloud.requests) == 5)
            call.cancel()
            counters = agent.models.counters[MODEL]
            await until(lambda: counters.in_progress == 0)
            assert counters.failures == {"cancelled": 5}

    asyncio.run(scenario())


def test_error_carries_the_id_of_its_request(tmp_path: Path) -> None:
    async def requests() -> AsyncIterator[bytes]:
        yield encode_request(MODEL, {"y": bundles.SURE}, request_id="wrong").SerializeToString()
        yield b"\x0a\xff\xff\xff"
        yield encode_request(MODEL, {"x": bundles.SURE}, request_id="right").SerializeToString()

    async def scenario() -> None:
        async with serving(tmp_path) as agent, grpc.aio.insecure_channel(agent.address) as channel:
            call: Any = channel.stream_stream(
                f"/{SERVICE}/ModelStreamInfer", response_deserializer=service_pb2.ModelStreamInferResponse.FromString
            )
            answers = [(answer.infer_response.id, answer.error_message) async for answer in call(requests())]
            assert answers[0][0] == "wrong"
            assert answers[0][1].startswith("INVALID_ARGUMENT: unknown input 'y'")
            assert answers[1][1].startswith("INVALID_ARGUMENT: expected a serialized inference.ModelInferRequest")
            assert answers[2] == ("right", "")

    asyncio.run(scenario())


def test_requests_of_a_stream_have_deadlines_of_their_own(tmp_path: Path) -> None:
    async def requests() -> AsyncIterator[Any]:
        request = encode_request(MODEL, {"x": bundles.HARD})
        request.parameters["timeout"].int64_param = 200_000
        yield request

    async def scenario() -> None:
        async with serving(tmp_path, default_deadline_s=60.0) as agent:
            agent.cloud.behaviour = faulty_cloud.black_hole
            async with grpc.aio.insecure_channel(agent.address) as channel:
                call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(requests())
                async with asyncio.timeout(20):
                    [answer] = [answer async for answer in call]
            assert answer.infer_response.parameters["isthmus.reason"].string_param == "deadline"

    asyncio.run(scenario())


def test_a_stream_sees_only_what_its_caller_may_use(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            serving(tmp_path, may_use=lambda model: False) as agent,
            grpc.aio.insecure_channel(agent.address) as channel,
        ):
            call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(send(2, bundles.SURE))
            messages = [answer.error_message async for answer in call]
            assert all(message.startswith("NOT_FOUND: no model 'triage'") for message in messages)

    asyncio.run(scenario())


def test_stopping_server_ends_its_streams(tmp_path: Path) -> None:
    async def idle(agent: Serving, service: InferenceService) -> AsyncIterator[Any]:
        yield encode_request(MODEL, {"x": bundles.SURE})
        await until(lambda: agent.models.counters[MODEL].routes["edge"].answers == 1)
        service.stop()
        await asyncio.Event().wait()

    async def scenario() -> None:
        async with serving(tmp_path) as agent, grpc.aio.insecure_channel(agent.address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            call = stub.ModelStreamInfer(idle(agent, agent.service), timeout=20)
            answers = aiter(call)
            assert (await anext(answers)).error_message == ""
            with pytest.raises(grpc.aio.AioRpcError, match="the agent stops") as caught:
                await anext(answers)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())
