"""Sealed inputs, end to end: a real cloud with Triton, a real agent, and somebody who reads everything that is kept or
travels. The plaintext is nowhere; the answers are those of unsealed requests.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from edge.deferred.disk import Disk
from edge.deferred.entries import RequestHeader, read_entry, split_body
from edge.deferred.sealing import Sealer, load_key
from edge.identity import DeviceHome
from examples.quickstart.programs import ProgramError, Server, Shell, wait_until
from examples.quickstart.site import Site
from isthmus.oip import MODEL_INFER, read_parameters, service_pb2, service_pb2_grpc
from isthmus.sealed import is_sealed
from isthmus.tensors import Array, decode_outputs, encode_request
from tests.e2e.devices import servable
from tests.e2e.wiretap import TcpTap, middlebox
from tests.edge import bundles

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

T = TypeVar("T")
HEAVY = """
import numpy as np
import triton_python_backend_utils as utils


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = utils.get_input_tensor_by_name(request, "x").as_numpy()
            logits = np.tanh(3 * x[:, ::-1]).astype(np.float32)
            label = utils.Tensor("label", logits.argmax(axis=1).astype(np.int64))
            answers.append(utils.InferenceResponse([utils.Tensor("logits", logits), label]))
        return answers
"""
ROWS = (np.random.default_rng(11).normal(size=(24, 3)) * 0.1).astype(np.float32)  # none of them is easy


def right(x: Array) -> Array:
    logits: Array = np.tanh(3 * x[:, ::-1]).astype(np.float32)
    return logits


class Wires:
    """An event loop of its own for who sits between: the rest of the story waits for programs."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(60)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass(slots=True)
class Story:
    """What happened, and what was kept and seen of it."""

    site: Site
    tap: TcpTap
    device: Path
    answers: dict[str, Array] = field(default_factory=dict)
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    waiting: list[Any] = field(default_factory=list)  # requests in the deferred store, its own seal taken off
    inner: dict[str, list[bytes]] = field(default_factory=dict)  # messages, TLS taken off
    captured: Array | None = None

    def ask(self, address: str, name: str, rows: Array, **parameters: Any) -> None:
        request = encode_request("triage", {"x": rows}, request_id=name)
        for key, value in parameters.items():
            parameter = request.parameters[f"isthmus.{key}"]
            if isinstance(value, bool):
                parameter.bool_param = value
            else:
                parameter.string_param = value
        with grpc.insecure_channel(address) as channel:
            stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            answer = stub.ModelInfer(request, timeout=20)
        self.answers[name] = decode_outputs(answer)["logits"]
        self.parameters[name] = read_parameters(answer.parameters)


@contextmanager
def agent(site: Site, device: Path, name: str) -> Iterator[tuple[Server, str]]:
    server = site.start(name, device, "127.0.0.1:0")
    try:
        address = str(server.wait_ready()["address"])
        site._wait_until_ready(address)
        yield server, address
    finally:
        server.stop()


def for_devices(site: Site) -> str:
    """Return where the cloud takes calls of devices."""
    return str(site.running_cloud().state()["device_address"])


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("sealed") / "here"
    folder.mkdir()
    site = Site(Shell(Console(quiet=True), folder), folder, "triage")
    wires = Wires()
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("ISTHMUS_LOG_LEVEL", "debug")
        stack.callback(wires.close)
        stack.callback(site.stop)
        tap = TcpTap()
        wires.do(tap.start())
        stack.callback(lambda: wires.do(tap.cut()))
        patch.setenv("ISTHMUS_CLOUD_DEVICE_ADDRESS", tap.address)  # devices are told to call there
        site.init_keys()
        site.start_cloud()
        tap.target = for_devices(site)
        bundle = folder / "bundle"
        bundles.build_bundle(bundle)
        site.publish(servable(bundle, HEAVY))
        device = folder / "device"
        site.enrol("press-1", device, "onnxruntime-fp32")
        settings = 'seal_inputs = "*"\ncapture = true\ncapture_flush_s = 0.2\nguard_s = 0.01\n'
        (device / "edge.toml").write_text('variant = "onnxruntime-fp32"\n' + settings)
        told = Story(site, tap, device)
        through_the_tap(told, wires)
        through_the_middlebox(told, wires)
        site.stop()
        yield told


def through_the_tap(story: Story, wires: Wires) -> None:
    """Escalate, lose the cloud, defer, crash, come back, and be answered."""
    site, device = story.site, story.device
    home = DeviceHome(device)
    with agent(site, device, "agent-sealed") as (server, address):
        wait_until(home.sealing.exists, "the sealing keys", 60)
        wait_until(lambda: escalates(story, address), "an escalation", 60)
        story.ask(address, "batch", ROWS[2:10], route="cloud")
        wait_until(lambda: rows_of(ROWS[2:10]) <= rows_of(captures(story)), "captures", 60)
        wires.do(story.tap.cut())
        story.ask(address, "later", ROWS[10:14], defer=True)
        server.kill()
    sealer, disk = Sealer(load_key(home.deferred_key)), Disk(home.deferred)
    for name in disk.names():
        if name.endswith(".request"):
            _, body = read_entry(disk, sealer, name, RequestHeader)
            story.waiting.append(service_pb2.ModelInferRequest.FromString(split_body(body)[1]))
    wires.do(story.tap.mend())
    with agent(site, device, "agent-again") as (_, address):
        watched = site.shell.run("edge", "deferred", "watch", "--address", address, "--count", "1")
        story.answers["late"] = np.array(json.loads(watched)["outputs"]["logits"], np.float32)
    story.captured = captures(story)


def captures(story: Story) -> Array:
    """Return the inputs that the device's disk holds, opened with the gateway's keys; none before the first."""
    output = story.device.parent / "captures.safetensors"
    try:
        story.site.shell.run(
            *("edge", "captures", "export", "--home", story.device, "--output", output),
            *("--sealing-keys", story.site.folder / "site" / "cloud"),
        )
    except ProgramError:  # nothing was written yet
        return ROWS[:0]
    inputs: Array = load_file(output)["input.x"]
    output.unlink()
    return inputs


def rows_of(inputs: Array) -> set[bytes]:
    return {row.tobytes() for row in inputs}


def escalates(story: Story, address: str) -> bool:
    story.ask(address, "one", ROWS[:1])
    return bool(story.parameters["one"]["isthmus.route"] == "cloud")


def through_the_middlebox(story: Story, wires: Wires) -> None:
    """Escalate through somebody who ends TLS; then once more without sealing, to see that he would have seen it."""
    site, cloud = story.site, story.site.folder / "site" / "cloud"
    home = DeviceHome(story.device)
    stack = middlebox(
        for_devices(site), home.ca, (cloud / "server.key", cloud / "server.pem"), (home.key, home.certificate)
    )
    box, story.tap.target = wires.do(stack.__aenter__())
    plain = story.device.parent.parent / "unsealed"  # not part of what is searched
    try:
        for name, device, rows in (("sealed", story.device, ROWS[14:18]), ("plain", plain, ROWS[18:22])):
            if device is plain:
                shutil.copytree(story.device, plain)
                (plain / "edge.toml").write_text('variant = "onnxruntime-fp32"\n')
            with agent(site, device, f"agent-{name}") as (_, listening):
                wait_until(lambda at=listening: escalates(story, at), "an escalation", 60)  # type: ignore[misc]
                box.seen.clear()
                story.ask(listening, name, rows, route="cloud")
                story.inner[name] = box.messages(MODEL_INFER)
    finally:
        wires.do(stack.__aexit__(None, None, None))


def traces_of(rows: Array) -> list[bytes]:
    """Return what the rows look like in a file or on a wire: raw, as base64 and as text."""
    traces = [row.tobytes() for row in rows]
    for offset in range(3):  # base64 of the row, wherever in a longer text it starts
        traces += [base64.b64encode(b"\0" * offset + row.tobytes())[4:-4] for row in rows]
    return traces + [repr(float(value)).encode() for value in rows.flat] + [str(value).encode() for value in rows.flat]


SECRET = ROWS[:18]


def test_answers_are_those_of_unsealed_requests(story: Story) -> None:
    np.testing.assert_allclose(story.answers["batch"], right(ROWS[2:10]), rtol=1e-6)
    np.testing.assert_allclose(story.answers["sealed"], right(ROWS[14:18]), rtol=1e-6)
    np.testing.assert_allclose(story.answers["plain"], right(ROWS[18:22]), rtol=1e-6)
    np.testing.assert_allclose(story.answers["late"], right(ROWS[10:14]), rtol=1e-6)
    assert {story.parameters[name]["isthmus.route"] for name in ("batch", "sealed", "plain")} == {"cloud"}
    assert story.parameters["later"]["isthmus.deferred"] is True


def test_the_plaintext_is_nowhere_on_a_disk(story: Story) -> None:
    files = [path for path in story.site.folder.rglob("*") if path.is_file()]
    assert len(files) > 50
    found = [
        (path, trace) for path in files for data in (path.read_bytes(),) for trace in traces_of(SECRET) if trace in data
    ]
    assert found == []


def test_the_plaintext_is_not_in_the_traffic(story: Story) -> None:
    seen = bytes(story.tap.seen)
    assert len(seen) > 10_000
    assert [trace for trace in traces_of(SECRET) if trace in seen] == []


def test_whoever_ends_tls_sees_envelopes_and_would_have_seen_the_plaintext(story: Story) -> None:
    sealed, plain = story.inner["sealed"], story.inner["plain"]
    assert [trace for trace in traces_of(SECRET) for message in sealed if trace in message] == []
    assert any(is_sealed(service_pb2.ModelInferRequest.FromString(message)) for message in sealed[:1])
    assert any(row.tobytes() in message for row in ROWS[18:22] for message in plain)


def test_what_waits_on_the_device_is_sealed_inside_of_its_own_seal(story: Story) -> None:
    assert len(story.waiting) == 1
    assert is_sealed(story.waiting[0])
    assert story.waiting[0].inputs[0].datatype == "BYTES"


def test_captures_open_with_the_gateways_keys(story: Story) -> None:
    assert story.captured is not None
    assert rows_of(story.captured) >= rows_of(ROWS[2:10])


def test_a_search_would_have_found_it(story: Story, tmp_path: Path) -> None:
    for number, form in enumerate((SECRET[3].tobytes(), base64.b64encode(b"ab" + SECRET[3].tobytes()))):
        (tmp_path / str(number)).write_bytes(b"before" + form + b"after")
        assert any(trace in (tmp_path / str(number)).read_bytes() for trace in traces_of(SECRET))
