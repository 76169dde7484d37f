"""No secret reaches a log: a whole installation runs at level debug, is used and misused, and everything that it wrote
is searched for every secret that it used.

The secrets: private keys of the workspace and the device in several forms, tokens of operator and admin, the enrolment
code, API keys, and every assertion and access token, which are read where they pass (tests/e2e/wiretap.py). They may be
in their own files and in the output of the command that was asked for them, and nowhere else.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from rich.console import Console

from edge.identity import DeviceHome
from examples.quickstart.programs import Shell, command, environment, wait_until
from examples.quickstart.site import Site
from isthmus.oip import service_pb2_grpc
from isthmus.tensors import encode_request
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc
from security.tls import channel_credentials
from tests.e2e.devices import servable
from tests.e2e.test_sealed_inputs import Wires, agent, for_devices
from tests.e2e.wiretap import TcpTap, middlebox
from tests.edge import bundles

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ISSUE = "/isthmus.v1.FleetService/IssueToken"
X = np.array([[0.2, 0.1, 0.0]], dtype=np.float32)


@dataclass(slots=True)
class Installation:
    """A site, its secrets by what they are, and what commands printed."""

    site: Site
    device: Path
    secrets: dict[str, bytes] = field(default_factory=dict)
    printed: list[tuple[str, bytes]] = field(default_factory=list)

    def run(self, *words: object, asked_for: bool = False) -> subprocess.CompletedProcess[bytes]:
        """Run a command; what it printed is searched, but for standard output that was asked to hold a secret."""
        done = subprocess.run(
            [*command(), *map(str, words)], capture_output=True, check=False, env=environment(), timeout=120
        )
        told = done.stderr if asked_for else done.stdout + done.stderr
        self.printed.append((" ".join(map(str, words[:3])), told))
        return done

    def operator(self) -> tuple[object, ...]:
        return tuple(self.site.operator())


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("secrets") / "here"
    folder.mkdir()
    site = Site(Shell(Console(quiet=True), folder), folder, "triage")
    told = Installation(site, folder / "device")
    wires = Wires()
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("ISTHMUS_LOG_LEVEL", "debug")
        stack.callback(wires.close)
        stack.callback(site.stop)
        workspace = folder / "site"
        told.run("keys", "init", workspace, "--host", "localhost", "--host", "127.0.0.1")
        told.run(
            *("token", "mint", "--home", workspace / "cloud", "--role", "operator", "--subject", "olga"),
            *("--output", site.token),
        )
        tap = TcpTap()
        wires.do(tap.start())
        stack.callback(lambda: wires.do(tap.cut()))
        patch.setenv("ISTHMUS_CLOUD_DEVICE_ADDRESS", tap.address)
        site.start_cloud()
        tap.target = for_devices(site)
        bundle = folder / "bundle"
        bundles.build_bundle(bundle)
        servable(bundle)
        told.run("model", "publish", bundle, *told.operator(), "--operator", workspace / "operator", "--json")
        code = enrol(told)
        use(told, wires, tap)
        give_a_client_a_key(told)
        misuse(told, code)
        for words in (("keys", "show", workspace), ("keys", "sealing", "show", workspace), ("device", "list")):
            told.run(*words, *(told.operator() if words[0] == "device" else ()))
        told.run("token", "inspect", site.token.read_text().strip())
        told.run("cloud", "status", *told.operator())
        site.stop()
        told.run("audit", "verify", "--home", workspace / "cloud")
        told.run("audit", "search", "--home", workspace / "cloud", "--json", "--limit", 10_000)
        note_keys(told)
        yield told


def enrol(told: Installation) -> str:
    invited = told.run("device", "invite", "press-1", *told.operator(), "--json", asked_for=True)
    code = str(json.loads(invited.stdout)["code"])
    told.secrets["enrolment code"] = code.encode()
    told.secrets["operator's token"] = told.site.token.read_bytes().strip()
    told.run(
        *("edge", "enrol", "--cloud", told.site.cloud_address, "--code", code),
        *("--trust", told.site.folder / "site" / "trust", "--home", told.device),
    )
    (told.device / "edge.toml").write_text('variant = "onnxruntime-fp32"\ncapture = true\ncapture_flush_s = 0.2\n')
    return code


def use(told: Installation, wires: Wires, tap: TcpTap) -> None:
    """Run the agent through somebody who reads tokens and assertions as they pass."""
    cloud, home = told.site.folder / "site" / "cloud", DeviceHome(told.device)
    stack = middlebox(
        for_devices(told.site), home.ca, (cloud / "server.key", cloud / "server.pem"), (home.key, home.certificate)
    )
    box, tap.target = wires.do(stack.__aenter__())
    try:
        with agent(told.site, told.device, "agent") as (_, listening):
            with grpc.insecure_channel(listening) as channel:
                stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)

                def escalates() -> bool:
                    answer = stub.ModelInfer(encode_request("triage", {"x": X}), timeout=20)
                    return bool(answer.parameters["isthmus.route"].string_param == "cloud")

                wait_until(escalates, "an escalation", 60)
            told.run("edge", "status", "--address", listening)
        for number, message in enumerate(box.messages(ISSUE)):
            is_request = number % 2 == 0
            kind = fleet_pb2.IssueTokenRequest if is_request else fleet_pb2.IssueTokenResponse
            parsed: Any = kind.FromString(message)
            secret = parsed.assertion if is_request else parsed.access_token
            told.secrets[f"{'assertion' if is_request else 'access token'} {number // 2}"] = secret.encode()
    finally:
        wires.do(stack.__aexit__(None, None, None))


def give_a_client_a_key(told: Installation) -> None:
    """Let a plain client in by API keys, the second of which came by a rotation."""
    workspace, admin = told.site.folder / "site", told.site.folder / "site" / "operator" / "admin.token"
    told.run(
        *("token", "mint", "--home", workspace / "cloud", "--role", "admin", "--subject", "ada", "--output", admin)
    )
    told.secrets["admin's token"] = admin.read_bytes().strip()
    where = ("--cloud", told.site.cloud_address, "--trust", workspace / "trust", "--token-file", admin)
    told.run("apikey", "create", "shop", "--output", workspace / "operator" / "shop.key.txt", *where)
    rotated = told.run("apikey", "rotate", "shop", "--overlap", "1h", "--json", *where, asked_for=True)
    told.secrets["API key 0"] = (workspace / "operator" / "shop.key.txt").read_bytes().strip()
    told.secrets["API key 1"] = json.loads(rotated.stdout)["key"].encode()
    credentials = channel_credentials(workspace / "trust" / "ca.pem")
    with grpc.secure_channel(told.site.cloud_address, credentials) as channel:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for number in range(2):
            bearer = told.secrets[f"API key {number}"].decode()
            metadata = (("authorization", f"Bearer {bearer}"),)
            stub.ModelInfer(encode_request("triage", {"x": X}), metadata=metadata, timeout=30)
            with pytest.raises(grpc.RpcError):
                stub.ModelInfer(encode_request(bearer, {"x": X}, request_id=bearer), metadata=metadata, timeout=30)
    told.run("apikey", "list", *where)
    told.run("apikey", "revoke", "shop", *where)


def misuse(told: Installation, code: str) -> None:
    """Put secrets where they do not belong: in names and ids, twice, and where they are refused."""
    token = told.secrets["access token 0"].decode()
    assertion = told.secrets["assertion 0"].decode()
    credentials = channel_credentials(told.site.folder / "site" / "trust" / "ca.pem")
    with grpc.secure_channel(told.site.cloud_address, credentials) as channel:
        fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)
        inference: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        operator = told.secrets["operator's token"].decode()
        calls: list[tuple[Any, Any, str]] = [
            (fleet.Enrol, fleet_pb2.EnrolRequest(code=code, csr_pem=b"none"), ""),
            (fleet.IssueToken, fleet_pb2.IssueTokenRequest(assertion=assertion), ""),
            (fleet.ListDevices, fleet_pb2.ListDevicesRequest(), token),
            (fleet.ListDevices, fleet_pb2.ListDevicesRequest(), token + "x"),
            (fleet.GetDevice, fleet_pb2.GetDeviceRequest(device_id=token), operator),
            (fleet.Pin, fleet_pb2.PinRequest(device_id="press-1", model=code, version=1), operator),
            (inference.ModelInfer, encode_request(token, {"x": X}, request_id=token), operator),
        ]
        for method, request, bearer in calls:
            metadata = [("x-request-id", token)] + ([("authorization", f"Bearer {bearer}")] if bearer else [])
            with pytest.raises(grpc.RpcError):
                method(request, metadata=metadata, timeout=30)
    told.run("token", "inspect", token + "x", "--home", told.site.folder / "site" / "cloud")
    told.run("edge", "enrol", "--cloud", told.site.cloud_address, "--code", code, "--trust", told.device / "trust",
             "--home", told.device.parent / "another")  # fmt: skip


def note_keys(told: Installation) -> None:
    for path in sorted(told.site.folder.rglob("*.key")):
        data = path.read_bytes()
        if path.name == "deferred.key":
            told.secrets[f"{path.name} raw"], told.secrets[f"{path.name} hex"] = data, data.hex().encode()
            continue
        key: Any = load_pem_private_key(data, None)
        der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        told.secrets[f"{path.name} PEM"] = data.splitlines()[1]
        told.secrets[f"{path.name} DER"] = der
        told.secrets[f"{path.name} hex"] = der.hex()[-64:].encode()
        told.secrets[f"{path.name} base64"] = base64.b64encode(der[-32:])


def test_every_kind_of_secret_was_used(used: Installation) -> None:
    kinds = {name.split(" ")[0] for name in used.secrets}
    assert kinds >= {
        "enrolment", "operator's", "assertion", "access", "ca.key", "server.key", "issuing-ca.key", "targets.key",
        "root.key", "snapshot.key", "timestamp.key", "audit.key", "device.key", "deferred.key", "admin's", "API",
    }  # fmt: skip
    assert all(len(secret) >= 32 for secret in used.secrets.values())


def test_no_secret_is_in_what_was_written(used: Installation) -> None:
    operator = used.site.token.parent
    own = {used.site.token, operator / "admin.token", operator / "shop.key.txt", *used.site.folder.rglob("*.key")}
    files = [path for path in used.site.folder.rglob("*") if path.is_file() and path not in own]
    names = {path.name for path in files}
    assert names >= {"cloud.log", "agent.log", "triton.log", "isthmus.db"}
    assert any(name.endswith(".jsonl") for name in names)
    assert found(used, ((str(path), path.read_bytes()) for path in files)) == []


def test_no_secret_is_in_what_was_printed(used: Installation) -> None:
    assert len(used.printed) > 12
    assert found(used, iter(used.printed)) == []


def found(used: Installation, places: Iterator[tuple[str, bytes]]) -> list[tuple[str, str]]:
    return [(where, name) for where, data in places for name, secret in used.secrets.items() if secret in data]


def test_what_was_misused_left_its_records_without_the_secrets(used: Installation) -> None:
    folder = used.site.folder / "site" / "cloud" / "state" / "audit"
    text = b"".join(path.read_bytes() for path in folder.glob("*.jsonl")).decode()
    assert "wrong-code" in text
    assert "missing-scope" in text
    assert "[redacted]" in text  # the request id, which was a token
    log = (used.site.folder / "cloud.log").read_text()
    assert len(log) > 1000
