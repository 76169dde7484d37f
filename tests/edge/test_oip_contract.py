"""Every call that an unmodified tritonclient can make, synchronous and asynchronous, against one agent."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import tritonclient.grpc as sync_triton
import tritonclient.grpc.aio as aio_triton
from tritonclient.utils import InferenceServerException

from edge.unoffered import UNOFFERED
from isthmus.oip import SERVICE, service_pb2
from tests.edge import bundles
from tests.edge.serving import MODEL, explanation, serving

Check = Callable[[Any], bool]


def tensor(x: Any = bundles.SURE) -> Any:
    return sync_triton.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x)


def is_answer(result: Any) -> bool:
    np.testing.assert_allclose(result.as_numpy("logits"), bundles.SURE @ bundles.weights(1), atol=1e-5)
    assert result.as_numpy("label").tolist() == [0]
    return bool(explanation(result)["isthmus.route"] == "edge")


def is_index(index: Any) -> bool:
    return [(m.name, m.version, m.state) for m in index.models] == [(MODEL, "1", "READY")]


def is_statistics(statistics: Any) -> bool:
    return [(stats.name, stats.version) for stats in statistics.model_stats] == [(MODEL, "1")]


def is_metadata(metadata: Any) -> bool:
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "FP32", [-1, 3])]
    outputs = [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs]
    return outputs == [("logits", "FP32", [-1, 3]), ("label", "INT64", [-1])]


# Method of both clients, its arguments, and what its answer must be.
OFFERED: Final[list[tuple[str, dict[str, Any], Check]]] = [
    ("is_server_live", {}, lambda answer: answer is True),
    ("is_server_ready", {}, lambda answer: answer is True),
    ("is_model_ready", {"model_name": MODEL}, lambda answer: answer is True),
    ("is_model_ready", {"model_name": MODEL, "model_version": "1"}, lambda answer: answer is True),
    ("get_server_metadata", {}, lambda answer: answer.name == "isthmus-agent"),
    ("get_server_metadata", {"as_json": True}, lambda answer: answer["name"] == "isthmus-agent"),
    ("get_model_metadata", {"model_name": MODEL}, is_metadata),
    ("get_model_config", {"model_name": MODEL}, lambda answer: answer.config.max_batch_size == 8),
    ("get_model_repository_index", {}, is_index),
    ("get_inference_statistics", {}, is_statistics),
    ("get_inference_statistics", {"model_name": MODEL}, is_statistics),
    ("infer", {"model_name": MODEL, "inputs": [tensor()]}, is_answer),
    ("infer", {"model_name": MODEL, "inputs": [tensor()], "model_version": "1", "client_timeout": 10}, is_answer),
    ("infer", {"model_name": MODEL, "inputs": [tensor()], "compression_algorithm": "gzip"}, is_answer),
    ("infer", {"model_name": MODEL, "inputs": [tensor()], "priority": 3, "timeout": 900_000}, is_answer),
    ("infer", {"model_name": MODEL, "inputs": [tensor()], "parameters": {"shop": "7"}}, is_answer),
    ("infer", {"model_name": MODEL, "inputs": [tensor()], "headers": {"x-trace": "1"}}, is_answer),
]

_REGION: Final = {"name": "region", "byte_size": 64, "device_id": 0}
NOT_OFFERED: Final[Mapping[str, dict[str, Any]]] = {
    "load_model": {"model_name": MODEL},
    "unload_model": {"model_name": MODEL},
    "get_system_shared_memory_status": {},
    "register_system_shared_memory": {"name": "region", "key": "/region", "byte_size": 64},
    "unregister_system_shared_memory": {},
    "get_cuda_shared_memory_status": {},
    "register_cuda_shared_memory": _REGION | {"raw_handle": b"aGFuZGxl"},
    "unregister_cuda_shared_memory": {},
    "get_trace_settings": {},
    "update_trace_settings": {},
    "get_log_settings": {},
    "update_log_settings": {"settings": {"log_info": True}},
}

SHARED = sync_triton.InferInput("x", [1, 3], "FP32")
SHARED.set_shared_memory("region", 12)
SHARED_OUTPUT = sync_triton.InferRequestedOutput("logits")
SHARED_OUTPUT.set_shared_memory("region", 12)

# What is wrong with the arguments of `infer`, and what the message must say.
NOT_FOUND: Final[Mapping[str, tuple[dict[str, Any], str]]] = {
    "unknown model": ({"model_name": "nothere"}, "models served: triage"),
    "unknown version": ({"model_version": "9"}, "version served: 1"),
}
INVALID: Final[Mapping[str, tuple[dict[str, Any], str]]] = {
    "wrong shape": ({"inputs": [tensor(np.zeros((1, 4), np.float32))]}, r"expected shape \[-1, 3\], got \[1, 4\]"),
    "no input": ({"inputs": []}, "missing input x"),
    "unknown output": ({"outputs": [sync_triton.InferRequestedOutput("y")]}, "logits, label"),
    "classification": (
        {"outputs": [sync_triton.InferRequestedOutput("logits", class_count=2)]},
        "expected no parameters, got classification",
    ),
    "shared memory input": ({"inputs": [SHARED]}, "got shared_memory_byte_size, shared_memory_region"),
    "shared memory output": ({"outputs": [SHARED_OUTPUT]}, "expected no parameters, got shared_memory"),
    "sequence": ({"sequence_id": 5, "sequence_start": True}, "models keep nothing between requests"),
    "bad route": ({"parameters": {"isthmus.route": "moon"}}, "expected 'edge' or 'cloud'"),
    "typing error": ({"parameters": {"isthmus.rout": "edge"}}, "unknown parameter 'isthmus.rout'"),
    "bad timeout": ({"timeout": -5}, "expected 1 to 3600000000 microseconds, got -5"),
}


async def ask(address: str, kind: str, method: str, arguments: Mapping[str, Any]) -> Any:
    """Call a method of the synchronous or the asynchronous client."""
    if kind == "aio":
        async with aio_triton.InferenceServerClient(address) as client:
            return await getattr(client, method)(**arguments)

    def call() -> Any:
        with sync_triton.InferenceServerClient(address) as client:
            return getattr(client, method)(**arguments)

    return await asyncio.to_thread(call)


both = pytest.mark.parametrize("kind", ["grpc", "aio"])


@both
def test_every_offered_call_answers(tmp_path: Path, kind: str) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            for method, arguments, check in OFFERED:
                assert check(await ask(agent.address, kind, method, arguments)), method

    asyncio.run(scenario())


@both
def test_every_other_call_says_what_to_do_instead(tmp_path: Path, kind: str) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            for method, arguments in NOT_OFFERED.items():
                with pytest.raises(InferenceServerException) as caught:
                    await ask(agent.address, kind, method, arguments)
                assert caught.value.status() == "StatusCode.UNIMPLEMENTED", method
                assert caught.value.message() in UNOFFERED.values(), method

    asyncio.run(scenario())


@both
def test_errors_of_infer(tmp_path: Path, kind: str) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            cases = [("NOT_FOUND", *case) for case in NOT_FOUND.values()]
            cases += [("INVALID_ARGUMENT", *case) for case in INVALID.values()]
            for status, changes, message in cases:
                arguments = {"model_name": MODEL, "inputs": [tensor()]} | changes
                with pytest.raises(InferenceServerException, match=message) as caught:
                    await ask(agent.address, kind, "infer", arguments)
                assert caught.value.status() == f"StatusCode.{status}"
            assert is_answer(await ask(agent.address, kind, "infer", {"model_name": MODEL, "inputs": [tensor()]}))

    asyncio.run(scenario())


@both
@pytest.mark.parametrize("method", ["get_model_metadata", "get_model_config", "get_inference_statistics"])
def test_errors_of_descriptions(tmp_path: Path, kind: str, method: str) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            for arguments in ({"model_name": "nothere"}, {"model_name": MODEL, "model_version": "9"}):
                with pytest.raises(InferenceServerException) as caught:
                    await ask(agent.address, kind, method, arguments)
                assert caught.value.status() == "StatusCode.NOT_FOUND"

    asyncio.run(scenario())


def test_async_infer_of_the_synchronous_client(tmp_path: Path) -> None:
    def call(address: str) -> list[Any]:
        results: queue.Queue[Any] = queue.Queue()
        with sync_triton.InferenceServerClient(address) as client:
            for x in (bundles.SURE, np.zeros((1, 4), np.float32)):
                client.async_infer(MODEL, [tensor(x)], callback=lambda result, error: results.put(error or result))
            return [results.get(timeout=10) for _ in range(2)]

    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            answers = await asyncio.to_thread(call, agent.address)
            [error] = [answer for answer in answers if isinstance(answer, InferenceServerException)]
            assert error.status() == "StatusCode.INVALID_ARGUMENT"
            [result] = [answer for answer in answers if answer is not error]
            assert is_answer(result)

    asyncio.run(scenario())


def test_stream_of_the_synchronous_client(tmp_path: Path) -> None:
    def call(address: str) -> list[Any]:
        results: queue.Queue[Any] = queue.Queue()
        with sync_triton.InferenceServerClient(address) as client:
            client.start_stream(callback=lambda result, error: results.put(error or result))
            for number, x in enumerate((bundles.SURE, np.zeros((1, 4), np.float32), bundles.HARD, bundles.SURE)):
                client.async_stream_infer(MODEL, [tensor(x)], request_id=str(number), enable_empty_final_response=True)
            answers = [results.get(timeout=10) for _ in range(4)]
            client.stop_stream()
        return answers

    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            first, wrong, hard, last = await asyncio.to_thread(call, agent.address)
            assert str(wrong.message()).startswith("INVALID_ARGUMENT: input 'x': expected shape [-1, 3], got [1, 4]")
            for answer, number, route in ((first, "0", "edge"), (hard, "2", "cloud"), (last, "3", "edge")):
                assert answer.get_response().id == number
                assert explanation(answer)["isthmus.route"] == route
                assert answer.get_response().parameters["triton_final_response"].bool_param is True
            counters = agent.models.counters[MODEL]
            assert counters.failures == {"invalid-input": 1}
            assert counters.routes["edge"].answers == 2

    asyncio.run(scenario())


def test_stream_of_the_asynchronous_client(tmp_path: Path) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number, model in enumerate((MODEL, "nothere", MODEL)):
            yield {"model_name": model, "inputs": [tensor()], "request_id": str(number)}

    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            answers = [pair async for pair in agent.client.stream_infer(requests())]
            assert [None if error else result.get_response().id for result, error in answers] == ["0", None, "2"]
            assert answers[1][1].message().startswith("NOT_FOUND: no model 'nothere' here")
            assert "triton_final_response" not in answers[0][0].get_response().parameters

    asyncio.run(scenario())


def test_no_call_of_the_clients_is_left_out() -> None:
    helpers = {"close", "plugin", "register_plugin", "unregister_plugin"}
    streams = {"async_infer", "async_stream_infer", "start_stream", "stop_stream", "stream_infer"}  # tests of their own
    tested = {method for method, _, _ in OFFERED} | set(NOT_OFFERED) | helpers | streams
    for client in (sync_triton.InferenceServerClient, aio_triton.InferenceServerClient):
        assert {name for name in dir(client) if not name.startswith("_")} <= tested


def test_every_method_of_the_service_is_answered_or_explained() -> None:
    service = service_pb2.DESCRIPTOR.services_by_name[SERVICE.rpartition(".")[2]]
    offered = {
        "ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics",
        "RepositoryIndex", "ModelInfer", "ModelStreamInfer",
    }  # fmt: skip
    assert {method.name for method in service.methods} == offered | set(UNOFFERED)
    assert not offered & set(UNOFFERED)
