"""Sealed inputs against a real gateway: what was altered, moved, replayed or sealed for another key is refused.

Nothing of it reaches Triton, and no refusal tells what was inside.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import x25519

from cloud.bootstrap import Cloud
from isthmus.oip import service_pb2_grpc
from isthmus.sealed import Binding, SealingKey, SealingKeys, binding_of_token, parse_keys, seal_request
from isthmus.status import REASON_KEY
from isthmus.tensors import decode_outputs, encode_request
from isthmus.v1 import sealing_pb2, sealing_pb2_grpc
from security.sealing import rotate_sealing_keys
from security.tokens import TokenIssuer
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace, serving

pytestmark = pytest.mark.slow

X = np.array([[1.5, 2.5, 3.5, 4.5]], dtype=np.float32)
READER = Binding("default", "reader")


@dataclass(frozen=True, slots=True)
class Stage:
    runner: asyncio.Runner
    workspace: Workspace
    cloud: Cloud

    @property
    def keys(self) -> SealingKeys:
        trust = self.workspace.trust
        return parse_keys((trust / "sealing.json").read_bytes(), (trust / "ca.pem").read_bytes())

    def token(self, subject: str = "reader", tenant: str = "default") -> str:
        issuer = TokenIssuer.load(self.workspace.home)
        return issuer.mint(subject, "client", ttl=timedelta(hours=1), tenant=tenant)[0]

    def sealed(self, request_id: str = "q-1", model: str = "triage") -> Any:
        return seal_request(encode_request(model, {"x": X}, request_id=request_id), self.keys.current, READER)

    def infer(self, request: Any, token: str = "") -> Any:
        async def story() -> Any:
            async with self.workspace.channel(self.cloud) as channel:
                stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                metadata = (("authorization", f"Bearer {token or self.token()}"),)
                return await stub.ModelInfer(request, metadata=metadata)

        return self.runner.run(story())

    def refused(self, request: Any, token: str = "") -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            self.infer(request, token)
        assert "1.5" not in str(raised.value.details())
        return raised.value.code(), str(dict(raised.value.trailing_metadata()).get(REASON_KEY, ""))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("sealed")
    workspace = make_workspace(folder / "workspace")
    with asyncio.Runner() as runner:
        running = serving(workspace)
        cloud = runner.run(running.__aenter__())

        async def publish() -> None:
            with workspace.client(cloud) as client:
                for model in ("triage", "other"):
                    bundle = make_bundle(folder / model, 1, model=model)
                    await asyncio.to_thread(client.publish, bundle, workspace.operator)

        runner.run(publish())
        yield Stage(runner, workspace, cloud)
        runner.run(running.__aexit__(None, None, None))


def test_a_sealed_request_is_answered_as_the_unsealed_one(stage: Stage) -> None:
    plain = decode_outputs(stage.infer(encode_request("triage", {"x": X})))["logits"]
    sealed = decode_outputs(stage.infer(stage.sealed()))["logits"]
    np.testing.assert_array_equal(plain, sealed)
    np.testing.assert_array_equal(sealed, 10 * X[:, :3])


def test_clients_get_the_signed_keys_and_their_binding_from_the_cloud(stage: Stage) -> None:
    async def story() -> Any:
        async with stage.workspace.channel(stage.cloud) as channel:
            stub: Any = sealing_pb2_grpc.SealingServiceStub(channel)
            metadata = (("authorization", f"Bearer {stage.token('carl', 'acme')}"),)
            return await stub.GetSealingKeys(sealing_pb2.GetSealingKeysRequest(), metadata=metadata)

    answer = stage.runner.run(story())
    assert parse_keys(answer.keys_json, (stage.workspace.trust / "ca.pem").read_bytes()) is not None
    assert (answer.tenant, answer.subject) == ("acme", "carl")
    assert binding_of_token(stage.token("carl", "acme")) == Binding("acme", "carl")


def alter(place: int) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        data = bytearray(request.raw_input_contents[0])
        data[place] ^= 1
        request.raw_input_contents[0] = bytes(data)

    return change


def cut(length: int) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        request.raw_input_contents[0] = request.raw_input_contents[0][:length]

    return change


def put(**fields: str) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        for name, value in fields.items():
            setattr(request, name, value)

    return change


def declare(name: str, value: str) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        request.inputs[0].parameters[name].string_param = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(alter(-1), "sealed-not-openable", id="tag"),
        pytest.param(alter(-20), "sealed-not-openable", id="ciphertext"),
        pytest.param(alter(30), "sealed-not-openable", id="wrapped key"),
        pytest.param(alter(10), "sealed-unknown-key", id="key id"),
        pytest.param(alter(4), "sealed-malformed", id="magic"),
        pytest.param(alter(0), "sealed-malformed", id="length"),
        pytest.param(cut(60), "sealed-malformed", id="truncated"),
        pytest.param(cut(0), "sealed-malformed", id="empty"),
        pytest.param(put(id="q-2"), "sealed-not-openable", id="replayed under another id"),
        pytest.param(put(id=""), "sealed-not-openable", id="replayed without its id"),
        pytest.param(put(model_name="other"), "sealed-not-openable", id="moved to another model"),
        pytest.param(declare("isthmus.shape", "2,2"), "sealed-not-openable", id="another shape"),
        pytest.param(declare("isthmus.datatype", "INT32"), "sealed-not-openable", id="another datatype"),
        pytest.param(declare("isthmus.datatype", "X"), "sealed-malformed", id="no datatype"),
    ],
)
def test_what_was_altered_or_moved_is_refused(stage: Stage, change: Callable[[Any], None], reason: str) -> None:
    request = stage.sealed()
    change(request)
    assert stage.refused(request) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


def test_a_request_replayed_by_another_caller_is_refused(stage: Stage) -> None:
    """Or whoever reads the traffic could have the gateway compute on it, and read the answer."""
    request = stage.sealed()
    for token in (stage.token("mallory"), stage.token("reader", "acme")):
        assert stage.refused(request, token)[0] in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert stage.infer(request)


def test_an_envelope_for_another_gateway_is_refused(stage: Stage) -> None:
    other = SealingKey(secrets.token_hex(8), x25519.X25519PrivateKey.generate().public_key())
    request = seal_request(encode_request("triage", {"x": X}), other, READER)
    assert stage.refused(request) == (grpc.StatusCode.INVALID_ARGUMENT, "sealed-unknown-key")
    impostor = SealingKey(stage.keys.current.id, other.public)
    request = seal_request(encode_request("triage", {"x": X}), impostor, READER)
    assert stage.refused(request) == (grpc.StatusCode.INVALID_ARGUMENT, "sealed-not-openable")


def test_an_envelope_without_its_flag_is_no_tensor(stage: Stage) -> None:
    request = stage.sealed()
    del request.parameters["isthmus.sealed"]
    assert stage.refused(request)[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_a_flag_without_an_envelope_is_refused(stage: Stage) -> None:
    request = encode_request("triage", {"x": X}, request_id="q-1")
    request.parameters["isthmus.sealed"].string_param = "1"
    assert stage.refused(request) == (grpc.StatusCode.INVALID_ARGUMENT, "sealed-malformed")


def test_a_rotation_needs_no_restart_and_keeps_what_was_sealed_before(stage: Stage) -> None:
    before = stage.sealed()
    rotate_sealing_keys(stage.workspace.root, datetime.now(UTC))
    after = stage.sealed("q-9")

    async def until_known() -> None:
        async with asyncio.timeout(60), stage.workspace.channel(stage.cloud) as channel:
            stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            while True:
                call = stub.ModelInfer(after, metadata=(("authorization", f"Bearer {stage.token()}"),))
                if await call.code() is grpc.StatusCode.OK:
                    return
                assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
                await asyncio.sleep(0.2)

    stage.runner.run(until_known())
    assert stage.infer(before)
