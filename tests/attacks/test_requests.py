"""Requests that are not what they should be: each is refused with what was expected and what came, and costs nothing.

INVALID_ARGUMENT is the answer to all of them but two kinds, which the reference documents: a model or version that is
not here is NOT_FOUND, and what gRPC itself finds too large is RESOURCE_EXHAUSTED.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import pytest

from edge.identity import DeviceHome, enrol
from isthmus.oip import SERVICE, service_pb2
from isthmus.tensors import encode_request
from tests.edge import bundles, faulty_cloud
from tests.edge.serving import MODEL, explanation, serving
from tests.edge.simulated_cloud import CODE, SimulatedCloud, simulated_cloud

METHOD: Final = f"/{SERVICE}/ModelInfer"
NAN, INFINITE = (np.array([[1.0, value, 0.0]], np.float32) for value in (np.nan, -np.inf))


def valid() -> Any:
    return encode_request(MODEL, {"x": bundles.SURE})


def changed(**fields: Any) -> bytes:
    """Return a request whose input tensor differs in these fields; `raw` stands for the raw contents."""
    request = valid()
    tensor = request.inputs[0]
    if "raw" in fields:
        del request.raw_input_contents[:]
        request.raw_input_contents.extend(fields.pop("raw"))
    for name, value in fields.items():
        if name == "shape":
            del tensor.shape[:]
            tensor.shape.extend(value)
        else:
            setattr(tensor, name, value)
    return bytes(request.SerializeToString())


def typed(raw: bool = False, **contents: Any) -> bytes:
    """Return a request with typed contents."""
    request = valid()
    if not raw:
        del request.raw_input_contents[:]
    for field, values in contents.items():
        getattr(request.inputs[0].contents, field).extend(values)
    return bytes(request.SerializeToString())


def edited(edit: Callable[[Any], object]) -> bytes:
    """Return a request after `edit`."""
    request = valid()
    edit(request)
    return bytes(request.SerializeToString())


def with_parameter(name: str, **choice: Any) -> bytes:
    """Return a request with a parameter; no choice is one without a value."""

    def edit(request: Any) -> None:
        request.parameters[name].SetInParent()
        for kind, value in choice.items():
            setattr(request.parameters[name], kind, value)

    return edited(edit)


def repeat(request: Any, count: int) -> None:
    """Give the input `count` times."""
    for _ in range(count - 1):
        request.inputs.append(request.inputs[0])
        request.raw_input_contents.append(request.raw_input_contents[0])


def without_inputs(request: Any) -> None:
    request.ClearField("inputs")
    request.ClearField("raw_input_contents")


def ask_for(request: Any, *names: str) -> None:
    """Ask for these outputs."""
    for name in names:
        request.outputs.add(name=name)


def values(array: Any) -> bytes:
    """Return a request with these values."""
    return bytes(encode_request(MODEL, {"x": array}).SerializeToString())


INVALID: Final[Mapping[str, tuple[bytes, str]]] = {
    # the message itself
    "no message": (b"\x0a\xff\xff\xff", r"expected a serialized inference.ModelInferRequest, got 4 bytes"),
    "text": (b"GET / HTTP/1.1\r\n\r\n", "expected a serialized inference.ModelInferRequest, got 18 bytes"),
    "cut short": (valid().SerializeToString()[:-3], "expected a serialized"),
    "bytes after the end": (valid().SerializeToString() + b"\xff\xff", "expected a serialized"),
    "name that is no text": (b"\x0a\x02\xff\xfe", "expected a serialized"),
    # names
    "unknown input": (changed(name="y"), "unknown input 'y'; the model's inputs are x"),
    "input without a name": (changed(name=""), "unknown input ''; the model's inputs are x"),
    "endless name": (changed(name="x" * 100_000), f"unknown input '{'x' * 80}'; the model's inputs are x"),
    "missing input": (edited(without_inputs), "missing input x; the model's inputs are x"),
    "input twice": (edited(lambda r: repeat(r, 2)), "input 'x' is given twice"),
    "input ten thousand times": (edited(lambda r: repeat(r, 10_000)), "input 'x' is given twice"),
    "unknown output": (edited(lambda r: ask_for(r, "secret")), "the model's outputs are logits, label"),
    "output twice": (edited(lambda r: ask_for(r, "label", "label")), "output 'label' is asked for twice"),
    # datatypes
    "other datatype": (changed(datatype="INT32"), "expected datatype FP32, got 'INT32'"),
    "wider datatype": (changed(datatype="FP64", raw=[bytes(24)]), "expected datatype FP32, got 'FP64'"),
    "no datatype": (changed(datatype=""), "expected datatype FP32, got ''"),
    "datatype in small letters": (changed(datatype="fp32"), "expected datatype FP32, got 'fp32'"),
    "BYTES": (changed(datatype="BYTES", raw=[b"\x03\x00\x00\x00abc"]), "expected datatype FP32, got 'BYTES'"),
    "typed BYTES": (typed(bytes_contents=[b"abc"]), "FP32 is expected in fp32_contents, got bytes_contents"),
    # shapes
    "too few axes": (changed(shape=[3]), r"expected shape \[-1, 3\], got \[3\]"),
    "no axes": (changed(shape=[]), r"expected shape \[-1, 3\], got \[\]"),
    "a thousand axes": (changed(shape=[1] * 1000), r"expected shape \[-1, 3\], got \[1, 1, 1, 1, 1, 1, 1, 1\]"),
    "other width": (changed(shape=[1, 4]), r"expected shape \[-1, 3\], got \[1, 4\]"),
    "negative batch": (changed(shape=[-1, 3]), r"expected shape \[-1, 3\], got \[-1, 3\]"),
    "most negative batch": (changed(shape=[-(1 << 63), 3]), r"expected shape \[-1, 3\], got"),
    "negative width": (changed(shape=[1, -3]), r"expected shape \[-1, 3\], got \[1, -3\]"),
    "two negatives": (changed(shape=[-1, -3]), r"expected shape \[-1, 3\], got \[-1, -3\]"),
    "empty batch": (changed(shape=[0, 3], raw=[b""]), r"expected shape \[-1, 3\], got \[0, 3\]"),
    "batch too large": (changed(shape=[9, 3], raw=[bytes(108)]), "batch of 9 is larger than the limit of 8"),
    "batch of 2^62": (changed(shape=[1 << 62, 3]), "is larger than the limit of 8"),
    "product beyond 64 bits": (changed(shape=[1 << 62, 1 << 62]), r"expected shape \[-1, 3\]"),
    # contents
    "too few bytes": (changed(raw=[b"123"]), r"shape \[1, 3\] FP32 takes 12 bytes, got 3"),
    "too many bytes": (changed(raw=[bytes(13)]), r"takes 12 bytes, got 13"),
    "bytes of another shape": (changed(shape=[2, 3]), r"shape \[2, 3\] FP32 takes 24 bytes, got 12"),
    "empty bytes": (changed(raw=[b""]), "takes 12 bytes, got 0"),
    "no contents": (changed(raw=[]), r"shape \[1, 3\] takes 3 values, got 0"),
    "more contents than inputs": (changed(raw=[bytes(12)] * 2), "expected 1 raw_input_contents, .*, got 2"),
    "raw and typed": (typed(raw=True, fp32_contents=[1, 2, 3]), "expected raw_input_contents or contents, got both"),
    "wrong typed field": (typed(int_contents=[1, 2, 3]), "FP32 is expected in fp32_contents, got int_contents"),
    "two typed fields": (
        typed(fp32_contents=[1, 2, 3], fp64_contents=[1, 2, 3]),
        "FP32 is expected in fp32_contents, got fp32_contents and fp64_contents",
    ),
    "too few values": (typed(fp32_contents=[1, 2]), "takes 3 values, got 2"),
    "too many values": (typed(fp32_contents=range(100)), "takes 3 values, got 100"),
    "NaN": (values(NAN), "input 'x': expected finite numbers, got 1 of NaN or infinity"),
    "infinity": (values(INFINITE), "input 'x': expected finite numbers, got 1 of NaN or infinity"),
    "typed NaN": (typed(fp32_contents=[0, float("nan"), float("nan")]), "expected finite numbers, got 2 of NaN"),
    # parameters
    "parameter of the input": (
        edited(lambda r: setattr(r.inputs[0].parameters["binary_data_size"], "int64_param", 12)),
        "input 'x': expected no parameters, got binary_data_size",
    ),
    "shared memory": (
        edited(lambda r: setattr(r.inputs[0].parameters["shared_memory_region"], "string_param", "/x")),
        "input 'x': expected no parameters, got shared_memory_region",
    ),
    "parameter of an output": (
        edited(lambda r: setattr(r.outputs.add(name="logits").parameters["classification"], "int64_param", 1)),
        "output 'logits': expected no parameters, got classification",
    ),
    "parameter without a value": (with_parameter("anything"), "parameter 'anything': expected a value, got none"),
    "route without a value": (with_parameter("isthmus.route"), "parameter 'isthmus.route': expected a value, got none"),
    "unknown route": (with_parameter("isthmus.route", string_param="moon"), "expected 'edge' or 'cloud', got 'moon'"),
    "route as a number": (with_parameter("isthmus.route", int64_param=1), "expected 'edge' or 'cloud', got '1'"),
    "unknown parameter of ours": (with_parameter("isthmus.rute", string_param="edge"), "unknown parameter 'isthmus.ru"),
    "timeout of nothing": (with_parameter("timeout", int64_param=0), "expected 1 to 3600000000 microseconds, got 0"),
    "negative timeout": (with_parameter("timeout", int64_param=-1), "microseconds, got -1"),
    "endless timeout": (with_parameter("timeout", int64_param=(1 << 63) - 1), "microseconds, got 9223372036854775807"),
    "timeout as text": (with_parameter("timeout", string_param="1s"), "microseconds, got '1s'"),
    "timeout as truth": (with_parameter("timeout", bool_param=True), "microseconds, got True"),
    "negative priority": (with_parameter("priority", int64_param=-1), "expected a whole number from 0, got -1"),
    "priority as text": (with_parameter("priority", string_param="high"), "expected a whole number from 0, got 'high'"),
    "sequence": (with_parameter("sequence_id", int64_param=7), "models keep nothing between requests, got 7"),
    "sequence by name": (with_parameter("sequence_id", string_param="a"), "keep nothing between requests, got 'a'"),
    "final response as text": (
        with_parameter("triton_enable_empty_final_response", string_param="yes"),
        "expected true or false, got 'yes'",
    ),
}
NOT_FOUND: Final[Mapping[str, tuple[bytes, str]]] = {
    "empty request": (b"", "no model '' here; models served: triage"),
    "other model": (edited(lambda r: setattr(r, "model_name", "../triage")), r"no model '../triage' here"),
    "endless model": (edited(lambda r: setattr(r, "model_name", "m" * 100_000)), f"no model '{'m' * 80}' here"),
    "other version": (edited(lambda r: setattr(r, "model_version", "2")), "no version '2'; version served: 1"),
    "version that is no number": (edited(lambda r: setattr(r, "model_version", "1.0")), "no version '1.0'"),
}


@pytest.mark.parametrize(
    ("code", "cases"),
    [(grpc.StatusCode.INVALID_ARGUMENT, INVALID), (grpc.StatusCode.NOT_FOUND, NOT_FOUND)],
    ids=["invalid", "not-found"],
)
def test_each_is_refused_with_what_was_expected_and_what_came(
    tmp_path: Path, code: grpc.StatusCode, cases: Mapping[str, tuple[bytes, str]]
) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent, grpc.aio.insecure_channel(agent.address) as channel:
            call: Any = channel.unary_unary(METHOD)
            for case, (request, message) in cases.items():
                with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
                    await call(request)
                assert caught.value.code() is code, case
                assert len(caught.value.details() or "") < 1000, case
            assert agent.cloud.requests == []
            assert explanation(await agent.infer(bundles.SURE))["isthmus.route"] == "edge"
            failures = agent.models.counters[MODEL].failures + agent.models.unserved.failures
            assert failures.total() == len(cases)

    asyncio.run(scenario())


def test_operator_may_accept_what_is_not_finite(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, allow_non_finite=True) as agent:
            agent.cloud.behaviour = faulty_cloud.answering(bundles.SURE)
            for array in (NAN, INFINITE):
                told = explanation(await agent.infer(array))
                assert (told["isthmus.route"], told["isthmus.reason"]) == ("cloud", "not-finite")

    asyncio.run(scenario())


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_what_is_too_large_is_refused_before_it_is_read(tmp_path: Path, compression: grpc.Compression) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, message_bytes=1 << 20) as agent:
            async with grpc.aio.insecure_channel(agent.address) as channel:
                call: Any = channel.unary_unary(METHOD)
                with pytest.raises(grpc.aio.AioRpcError) as caught:  # compressed, it is a few kilobytes
                    await call(changed(raw=[bytes(4 << 20)]), compression=compression)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert explanation(await agent.infer(bundles.SURE))["isthmus.route"] == "edge"

    asyncio.run(scenario())


@asynccontextmanager
async def agent_process(folder: Path) -> Any:
    """Run an enrolled agent as a process of its own; yield its address and process id."""
    home, ready = folder / "device", folder / "ready.json"
    async with simulated_cloud(SimulatedCloud(folder / "workspace")) as cloud:
        await enrol(DeviceHome(home), cloud=cloud.address, code=CODE, trust=cloud.trust)
        cloud.publish(1)
        cloud.release(1)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "isthmus", "--log-level", "error", "edge", "run", "--home", str(home),
            "--model", MODEL, "--listen", f"unix:{folder / 'agent.sock'}", "--ready-file", str(ready),
            env=os.environ | {"PYTHONPATH": ".:proto"}, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            async with asyncio.timeout(60):
                while not ready.exists():
                    await asyncio.sleep(0.05)
            yield f"unix:{folder / 'agent.sock'}", process.pid
        finally:
            process.terminate()
            await process.wait()


def resident_kib(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


async def send_all(call: Any, requests: Iterator[bytes], count: int) -> None:
    async def sender() -> None:
        for request in requests:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(request, wait_for_ready=True, timeout=60)
            assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)

    requests = itertools.islice(requests, count)
    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(sender())


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_of_them(tmp_path: Path) -> None:
    requests = [request for request, _ in (*INVALID.values(), *NOT_FOUND.values())]
    large = changed(raw=[bytes(256 << 10)])

    async def scenario() -> None:
        async with agent_process(tmp_path) as (address, pid), grpc.aio.insecure_channel(address) as channel:
            ready: Any = channel.unary_unary(
                f"/{SERVICE}/ModelReady", response_deserializer=service_pb2.ModelReadyResponse.FromString
            )
            async with asyncio.timeout(60):
                asked = service_pb2.ModelReadyRequest(name=MODEL).SerializeToString()
                while not (await ready(asked, wait_for_ready=True)).ready:
                    await asyncio.sleep(0.05)
            call: Any = channel.unary_unary(METHOD)
            endless = itertools.cycle([*requests, large])
            await send_all(call, endless, 2_000)
            warm = resident_kib(pid)
            await send_all(call, endless, 10_000)
            grown = resident_kib(pid) / warm - 1
            assert grown < 0.05, f"{warm} KiB when warm, {grown:+.1%} after 10,000 more"
            answer: bytes = await call(valid().SerializeToString())
            assert service_pb2.ModelInferResponse.FromString(answer).model_name == MODEL

    asyncio.run(scenario())
