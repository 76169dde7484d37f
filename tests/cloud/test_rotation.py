r"""Certificates and token keys are rotated under load at a cloud process, and no request fails.

For as long as one likes: python -c "import tests.conftest; from tests.cloud.test_rotation import *; \
    print(rotate_under_load(Path(FOLDER), 300))"
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import jwt
import numpy as np
import pytest

from edge.access import AccessToken
from edge.identity import DeviceHome, enrol
from isthmus.oip import service_pb2_grpc
from isthmus.tensors import encode_request
from security.tls import channel_credentials
from tests.cloud.test_serve import IMPATIENT, cloud_process, isthmus
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace

pytestmark = pytest.mark.slow

PER_S = 100
_FRESH_EVERY = 20  # of the requests, one comes on a connection of its own, which sees the certificate of its time
_LEAD = "2s"
REQUEST = encode_request("triage", {"x": np.array([[1, 2, 3, 4]], dtype=np.float32)})


@dataclass(slots=True)
class Tally:
    """What became of the requests."""

    sent: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    kids: set[str] = field(default_factory=set)  # that signed the tokens of the requests
    serials: set[bytes] = field(default_factory=set)  # of the certificates that were served
    rotations: int = 0


class Load:
    """Devices and clients that call one cloud, evenly, until they are stopped."""

    def __init__(self, workspace: Workspace, address: str, home: DeviceHome) -> None:
        self.tally = Tally()
        self._workspace, self._address, self._home = workspace, address, home
        self._client_token = self._first_token = workspace.token("client")

    async def run(self, seconds: float) -> None:
        """Send for this long; rotate everything every few seconds meanwhile."""
        device_channel = self._home.connect()
        token = AccessToken(self._home, self._home.enrolment(), device_channel)
        work = [asyncio.create_task(each) for each in (token.keep(), self._renew_client_token())]
        await token.wait()
        rotating = asyncio.create_task(self._rotate(seconds))
        async with device_channel, self._client_channel() as client_channel:
            calls: list[asyncio.Task[None]] = []
            begun = time.monotonic()
            while (at_s := time.monotonic() - begun) < seconds or not rotating.done():
                number = len(calls)
                if number % _FRESH_EVERY == 0:
                    call = self._on_a_fresh_connection()
                elif number % 2:
                    call = self._infer(device_channel, token.current() or "")
                else:
                    call = self._infer(client_channel, self._client_token if number % 4 else self._first_token)
                calls.append(asyncio.create_task(call))
                await asyncio.sleep(max(0.0, (number + 1) / PER_S - at_s))
            await asyncio.gather(*calls)
        await rotating
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)

    def _client_channel(self) -> grpc.aio.Channel:
        credentials = channel_credentials(self._workspace.trust / "ca.pem")
        options = (("grpc.use_local_subchannel_pool", 1),)
        return grpc.aio.secure_channel(self._address, credentials, options=options)

    async def _infer(self, channel: grpc.aio.Channel, token: str) -> None:
        self.tally.sent += 1
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            await stub.ModelInfer(REQUEST, metadata=(("authorization", f"Bearer {token}"),), timeout=20)
        except grpc.aio.AioRpcError as error:
            self.tally.failed[f"{error.code().name}: {error.details()}"] += 1
        self.tally.kids.add(jwt.get_unverified_header(token)["kid"])

    async def _on_a_fresh_connection(self) -> None:
        self.tally.serials.add(await asyncio.to_thread(_served, self._address, self._workspace.trust / "ca.pem"))
        async with self._client_channel() as channel:
            await self._infer(channel, self._client_token)

    async def _renew_client_token(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self._client_token = await asyncio.to_thread(self._workspace.token, "client")

    async def _rotate(self, seconds: float) -> None:
        begun = time.monotonic()
        server = ("keys", "rotate-server", self._workspace.home, "--dir", self._workspace.operator)
        issuing = ("keys", "rotate-issuing", self._workspace.home, "--dir", self._workspace.operator)
        tokens = ("keys", "rotate-tokens", self._workspace.home, "--lead", _LEAD)
        while True:
            for command in (server, issuing, tokens):
                done = await asyncio.to_thread(isthmus, *command)
                assert done.returncode == 0, done.stderr
            self.tally.rotations += 1
            await asyncio.sleep(max(4.0, seconds / 24))  # more than the lead: the new key signs
            if self.tally.rotations > 1 and time.monotonic() - begun > seconds - 6.0:
                return


def _served(address: str, ca: Path) -> bytes:
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        return secure.getpeercert(binary_form=True) or b""


def rotate_under_load(folder: Path, seconds: float) -> Tally:
    """Return what became of the requests to a cloud whose certificate and token keys are rotated all the while."""
    workspace = make_workspace(folder / "workspace")
    with cloud_process(workspace, **IMPATIENT, ISTHMUS_CLOUD_TOKEN_TTL_S="60") as (_, ready):
        address = str(ready["address"])
        token = workspace.token_file()
        where = ("--cloud", address, "--trust", workspace.trust, "--token-file", token)
        bundle = make_bundle(folder / "bundle", 1)
        published = isthmus("model", "publish", bundle, *where, "--operator", workspace.operator)
        assert published.returncode == 0, published.stderr
        code = json.loads(isthmus("device", "invite", "camera-1", *where, "--json").stdout)["code"]
        home = DeviceHome(folder / "device")

        async def run() -> Tally:
            await enrol(home, cloud=address, code=code, trust=workspace.trust)
            load = Load(workspace, address, home)
            await load.run(seconds)
            return load.tally

        return asyncio.run(run())


def test_no_request_fails_while_certificate_and_token_keys_are_rotated(tmp_path: Path) -> None:
    tally = rotate_under_load(tmp_path, 12.0)
    assert not tally.failed
    assert tally.sent > 500
    assert tally.rotations >= 2
    assert len(tally.serials) >= 2, "new certificates were served"
    assert len(tally.kids) >= 2, "new keys signed, and tokens of the first one stayed good"
