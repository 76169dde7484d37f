"""What must be refused, tried for real against running servers (acceptance of the whole path)."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from edge.access import AccessToken
from edge.identity import DeviceHome
from examples.quickstart.programs import wait_until
from examples.quickstart.site import DEVICE, VARIANT, Site
from isthmus.bundle import open_bundle
from isthmus.oip import MODEL_INFER, service_pb2
from isthmus.tensors import encode_request
from security.tls import channel_credentials
from security.tokens import TokenIssuer
from tests.e2e.live import running_site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, bundles: tuple[Path, Path]) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("attacked") / "here", bundles[0]) as running:
        yield running


def handshake(address: str, ca: Path, version: str) -> subprocess.CompletedProcess[str]:
    command = ["openssl", "s_client", "-connect", address, f"-{version}", "-alpn", "h2", "-CAfile", str(ca)]
    return subprocess.run(
        command, input="", capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=30
    )


def test_the_gateway_speaks_tls13_only(site: Site) -> None:
    ca = site.folder / "site" / "trust" / "ca.pem"
    old, new = handshake(site.cloud_address, ca, "tls1_2"), handshake(site.cloud_address, ca, "tls1_3")
    assert old.returncode != 0
    assert "Cipher is (NONE)" in old.stdout
    assert "TLSv1.3" in new.stdout
    assert "Verify return code: 0 (ok)" in new.stdout


def test_an_agent_beyond_loopback_speaks_tls13_only_and_wants_a_token(site: Site, tmp_path: Path) -> None:
    home = shutil.copytree(site.device, tmp_path / "device")  # one agent on one folder
    server = site.shell.start(
        *("open-agent", "edge", "run", "--home", home, "--model", "tiny", "--listen", "0.0.0.0:0")
    )
    try:
        port = str(server.wait_ready()["address"]).rsplit(":", 1)[1]
        ca = site.folder / "site" / "trust" / "ca.pem"
        old, new = handshake(f"127.0.0.1:{port}", ca, "tls1_2"), handshake(f"127.0.0.1:{port}", ca, "tls1_3")
        assert old.returncode != 0
        assert "Cipher is (NONE)" in old.stdout
        assert "TLSv1.3" in new.stdout
        status = infer(f"localhost:{port}", ca, None)
        assert status.code() is grpc.StatusCode.UNAUTHENTICATED
    finally:
        server.stop()


def infer(address: str, ca: Path, token: str | None) -> Any:
    """Return the error of one inference, or None when it is answered."""
    raw = encode_request("tiny", {"point": np.zeros((1, 16), np.float32)}, version="1").SerializeToString()
    metadata = [("authorization", f"Bearer {token}")] if token is not None else []
    with grpc.secure_channel(address, channel_credentials(ca)) as channel:
        call: Any = channel.unary_unary(MODEL_INFER, response_deserializer=service_pb2.ModelInferResponse.FromString)
        try:
            call(raw, metadata=metadata, timeout=20)
        except grpc.RpcError as error:
            return error
    return None


@pytest.mark.parametrize("kind", ["none", "garbage", "expired", "another cloud's"])
def test_without_a_good_token_the_gateway_answers_unauthenticated(site: Site, kind: str, tmp_path: Path) -> None:
    home, ca = site.folder / "site" / "cloud", site.folder / "site" / "trust" / "ca.pem"
    assert infer(site.cloud_address, ca, mint(home)) is None
    if kind == "another cloud's":
        site.shell.run("keys", "init", tmp_path / "other", "--host", "localhost")
        home = tmp_path / "other" / "cloud"
    tokens = {
        "none": None,
        "garbage": "not.a.token",
        "expired": mint(home, datetime.now(UTC) - timedelta(hours=2)),
        "another cloud's": mint(home),
    }
    error = infer(site.cloud_address, ca, tokens[kind])
    assert error is not None
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED


def mint(home: Path, now: datetime | None = None) -> str:
    token, _ = TokenIssuer.load(home).mint("probe", "client", models=("*",), ttl=timedelta(minutes=5), now=now)
    return token


def test_a_tampered_bundle_file_is_refused_and_the_old_version_serves_on(
    site: Site, bundles: tuple[Path, Path]
) -> None:
    flags = ("--cloud", site.cloud_address, "--token-file", site.token, "--trust", site.folder / "site" / "trust")
    operator = site.folder / "site" / "operator"
    site.shell.run("model", "publish", bundles[1], *flags, "--operator", operator, "--no-release")
    state = site.folder / "site" / "cloud" / "state"
    digest = open_bundle(bundles[1]).files[f"variants/{VARIANT}/model.bin"].sha256
    touched = [path for path in state.rglob(f"*{digest}*") if path.is_file()]
    assert len(touched) == 2  # the blob itself, and the delta that makes it
    for path in touched:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x10
        path.write_bytes(bytes(data))
    site.shell.run("model", "release", "tiny@2", *flags)
    wait_until(lambda: last_update(site)["outcome"] == "refused", "the refusal", 30)
    refusal = last_update(site)
    assert refusal["to_version"] == 2
    assert refusal["reason"] == "digest-mismatch"
    assert "model.bin" in refusal["detail"]
    assert serving_version(site) == "1"
    rows = site.shell.run_json("device", "list", *flags)
    assert [row["reason"] for row in rows if row["device"] == DEVICE] == ["digest-mismatch"]


def last_update(site: Site) -> dict[str, Any]:
    found: dict[str, Any] = site.agent_status()["models"][0]["last_update"] or {"outcome": ""}
    return found


def serving_version(site: Site) -> str:
    with triton.InferenceServerClient(site.agent_address) as client:
        tensor = triton.InferInput("point", [1, 16], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 16), np.float32))
        return str(client.infer("tiny", [tensor]).get_response().model_version)


def test_a_devices_token_is_nothing_without_its_certificate(site: Site) -> None:
    home, ca = DeviceHome(site.device), site.folder / "site" / "trust" / "ca.pem"

    async def token_of_the_device() -> str:
        async with home.connect() as channel:
            token = AccessToken(home, home.enrolment(), channel)
            keeping = asyncio.create_task(token.keep())
            try:
                return await asyncio.wait_for(token.wait(), 30)
            finally:
                keeping.cancel()

    error = infer(site.cloud_address, ca, asyncio.run(token_of_the_device()))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert dict(error.trailing_metadata())["isthmus-reason"] == "certificate-required"


def test_a_revoked_device_gets_nothing_from_the_cloud_within_seconds_and_serves_on(site: Site) -> None:
    assert route(site, asked="cloud") == "cloud"
    admin = site.folder / "admin.token"
    site.shell.run(
        *("token", "mint", "--home", site.folder / "site" / "cloud", "--role", "admin"),
        *("--subject", "root", "--output", admin),
    )
    where = ("--cloud", site.cloud_address, "--token-file", admin, "--trust", site.folder / "site" / "trust")
    site.shell.run("device", "revoke", DEVICE, "--reason", "stolen", *where)
    with pytest.raises(triton.InferenceServerException, match="UNAVAILABLE"):
        route(site, asked="cloud")
    assert route(site, asked="edge") == "edge"
    assert site.shell.run_json("device", "show", DEVICE, *where)["revoked_reason"] == "stolen"


def route(site: Site, *, asked: str) -> str:
    """Return which way a request went."""
    with triton.InferenceServerClient(site.agent_address) as client:
        tensor = triton.InferInput("point", [1, 16], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 16), np.float32))
        answer = client.infer("tiny", [tensor], parameters={"isthmus.route": asked}).get_response()
        return str(answer.parameters["isthmus.route"].string_param)
