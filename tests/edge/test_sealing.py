"""What a device seals, with which keys, and that it fails closed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from edge.sealing import InputSealer
from isthmus.envelopes import Opener
from isthmus.errors import UnavailableError
from isthmus.oip import service_pb2
from isthmus.sealed import Binding, is_sealed, open_request
from isthmus.tensors import encode_request
from isthmus.v1 import sealing_pb2, sealing_pb2_grpc
from security.sealing import load_gateway_keys, rotate_sealing_keys
from security.workspace import init_workspace

X = np.array([[1, 2, 3]], np.float32)
RAW = encode_request("triage", {"x": X}, request_id="q").SerializeToString()


class Cloud(sealing_pb2_grpc.SealingServiceServicer):
    """Hands out a document, as the cloud does."""

    def __init__(self, root: Path) -> None:
        self.document = (root / "trust" / "sealing.json").read_bytes()

    async def GetSealingKeys(self, request: Any, context: Any) -> Any:  # noqa: N802
        assert ("authorization", "Bearer token") in context.invocation_metadata()
        return sealing_pb2.GetSealingKeysResponse(keys_json=self.document, tenant="default", subject="press-1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sealing") / "workspace"
    init_workspace(root, ["localhost"], "acme", datetime.now(UTC))
    return root


@asynccontextmanager
async def sealer(cloud: Cloud, root: Path, file: Path, *names: str) -> AsyncIterator[InputSealer]:
    server = grpc.aio.server()
    sealing_pb2_grpc.add_SealingServiceServicer_to_server(cloud, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def token() -> str:
        return "token"

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        made = InputSealer(names, file, root / "trust" / "ca.pem", channel, token)
        keeping = asyncio.create_task(made.keep())
        try:
            yield made
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await server.stop(0)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.01)


def play(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(story)


def test_keys_come_from_the_cloud_and_are_there_after_a_restart(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "sealing.json"

    async def story() -> None:
        cloud = Cloud(root)
        async with sealer(cloud, root, file, "*") as made:
            await until(file.exists)
            assert is_sealed(service_pb2.ModelInferRequest.FromString(made.seal("triage", RAW)))
        cloud.document = b"not now"
        async with sealer(cloud, root, file, "x") as again:
            sealed = service_pb2.ModelInferRequest.FromString(again.seal("triage", RAW))
            keys = load_gateway_keys(root / "cloud")
            assert keys is not None
            assert open_request(sealed, keys.private, Binding("default", "press-1")).SerializeToString() == RAW
            box = again.seal_capture("triage", b"rows")
            assert Opener(keys.private).open(box, ("capture", "triage")) == b"rows"

    play(story())


def test_without_a_key_nothing_leaves(root: Path, tmp_path: Path) -> None:
    async def story() -> None:
        cloud = Cloud(root)
        cloud.document = b"{}"
        async with sealer(cloud, root, tmp_path / "none.json", "*") as made:
            with pytest.raises(UnavailableError) as raised:
                made.seal("triage", RAW)
            assert raised.value.reason == "no-sealing-key"
            with pytest.raises(UnavailableError):
                made.seal_capture("triage", b"rows")
        assert not (tmp_path / "none.json").exists()

    play(story())


@pytest.mark.parametrize(
    ("names", "model", "outcome"),
    [
        (("x",), "triage", "sealed"), (("triage/x",), "triage", "sealed"), (("*",), "triage", "sealed"),
        (("triage/*",), "triage", "sealed"), (("other/x",), "triage", "plain"), (("y",), "triage", "kept"),
        (("triage/y",), "triage", "kept"), (("y", "x"), "triage", "kept"),
    ],
)  # fmt: skip
def test_names_say_which_inputs_of_which_models(
    root: Path, tmp_path: Path, names: tuple[str, ...], model: str, outcome: str
) -> None:
    async def story() -> None:
        file = tmp_path / "sealing.json"
        async with sealer(Cloud(root), root, file, *names) as made:
            await until(file.exists)
            if outcome == "kept":  # a name that is wrong must not send the input in the clear
                with pytest.raises(UnavailableError):
                    made.seal(model, RAW)
                return
            sealed = made.seal(model, RAW)
            assert is_sealed(service_pb2.ModelInferRequest.FromString(sealed)) is (outcome == "sealed")
            assert made.concerns(model) is (outcome == "sealed")

    play(story())


def test_an_older_set_of_keys_is_not_taken(tmp_path: Path) -> None:
    root, file = tmp_path / "workspace", tmp_path / "sealing.json"
    init_workspace(root, ["localhost"], "acme", datetime.now(UTC))

    async def story() -> None:
        old = Cloud(root)
        rotate_sealing_keys(root, datetime.now(UTC))
        async with sealer(Cloud(root), root, file, "*"):
            await until(file.exists)
        newest = json.loads(file.read_text())
        async with sealer(old, root, file, "*") as made:
            before = made.seal("triage", RAW)
            await asyncio.sleep(0.3)
            assert json.loads(file.read_text()) == newest
            key_of = slice(8, 16)
            now = service_pb2.ModelInferRequest.FromString(made.seal("triage", RAW)).raw_input_contents[0][key_of]
            assert service_pb2.ModelInferRequest.FromString(before).raw_input_contents[0][key_of] == now

    play(story())


def test_a_file_that_was_altered_is_not_used(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "sealing.json"
    file.write_text(json.dumps({"document": "{}", "tenant": "t", "subject": "s"}))

    async def story() -> None:
        cloud = Cloud(root)
        cloud.document = b""
        async with sealer(cloud, root, file, "*") as made:
            with pytest.raises(UnavailableError):
                made.seal("triage", RAW)

    play(story())
