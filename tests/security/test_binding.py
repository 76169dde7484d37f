"""Bound tokens and revocation for all four kinds of methods, over real mutual TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from isthmus.status import StatusInterceptor
from security.binding import Guard, Revoked, key_digest, thumbprint_of
from security.enrolment import IssuingCa, make_csr, new_device_key
from security.interceptors import AuthInterceptor
from security.tls import channel_credentials, server_credentials
from security.tokens import TokenIssuer

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
Story = Callable[["Bound"], Awaitable[None]]


class Bound:
    """A server that answers forever, and a device on a connection to it."""

    def __init__(self, workspace: Path, folder: Path) -> None:
        self.cloud, self.ca = workspace / "cloud", workspace / "trust" / "ca.pem"
        self.key, self.chain = folder / "device.key", folder / "device.pem"
        self.issuer, self.guard = TokenIssuer.load(self.cloud), Guard()
        csr = make_csr(new_device_key(self.key), "", [])
        self.chain.write_bytes(IssuingCa.load(self.cloud).sign(csr, "camera-1", datetime.now(UTC)))
        self.certificate = x509.load_pem_x509_certificate(self.chain.read_bytes())
        self.begun, self.ended = asyncio.Event(), asyncio.Event()

    def token(self, thumbprint: str) -> str:
        return self.issuer.mint("camera-1", "device", ttl=timedelta(hours=1), thumbprint=thumbprint)[0]

    def call(self, channel: grpc.aio.Channel, kind: str, method: str, thumbprint: str = "") -> Any:
        token = self.token(thumbprint or thumbprint_of(self.certificate))
        stub: Any = getattr(channel, kind)(f"/test.Bound/{method}")
        argument = iter([b"x"]) if kind.startswith("stream") else b"x"
        return stub(argument, metadata=(("authorization", f"Bearer {token}"),), timeout=30)

    async def wait(self, request: Any, context: Any) -> bytes:
        """Answer never."""
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()
        return b""

    async def wait_stream(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        await self.wait(request, context)

    async def flood(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        """Send more than any window holds."""
        try:
            while True:
                yield b"x" * 65536
        finally:
            self.ended.set()

    def _handlers(self) -> grpc.GenericRpcHandler:
        make = {kind: getattr(grpc, f"{kind}_rpc_method_handler") for kind in KINDS}
        methods = {kind: make[kind](self.wait_stream if kind.endswith("stream") else self.wait) for kind in KINDS}
        return grpc.method_handlers_generic_handler("test.Bound", methods | {"flood": make["unary_stream"](self.flood)})

    async def serve(self, story: Story) -> None:
        scopes = {f"/test.Bound/{method}": "infer" for method in (*KINDS, "flood")}
        access = AuthInterceptor(self.issuer.verifier(), scopes, guard=self.guard)
        server = grpc.aio.server(interceptors=(StatusInterceptor(), access))
        server.add_generic_rpc_handlers((self._handlers(),))
        credentials = server_credentials(
            self.cloud / "server.key", self.cloud / "server.pem", self.cloud / "issuing-ca.pem"
        )
        self.port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        try:
            await story(self)
        finally:
            await server.stop(0)

    def channel(self) -> grpc.aio.Channel:
        credentials = channel_credentials(self.ca, self.key, self.chain)
        return grpc.aio.secure_channel(f"localhost:{self.port}", credentials)


def play(workspace: Path, tmp_path: Path, story: Story) -> None:
    async def run() -> None:
        await Bound(workspace, tmp_path).serve(story)

    asyncio.run(run())


async def outcome(call: Any, kind: str) -> tuple[grpc.StatusCode, str]:
    try:
        if kind.endswith("unary"):
            await call
        else:
            async for _ in call:
                pass
    except grpc.aio.AioRpcError as error:
        return error.code(), str(dict(error.trailing_metadata() or ()).get("isthmus-reason", ""))
    raise AssertionError("it was answered")


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_another_certificate_is_refused(workspace: Path, tmp_path: Path, kind: str) -> None:
    async def story(bound: Bound) -> None:
        async with bound.channel() as channel:
            code, reason = await outcome(bound.call(channel, kind, kind, "A" * 43), kind)
        assert reason == "certificate-mismatch" or (kind.startswith("stream") and code is not grpc.StatusCode.OK)
        assert not bound.begun.is_set()

    play(workspace, tmp_path, story)


@pytest.mark.parametrize("by", ["device", "key"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_running_call_of_a_revoked_device_ends(workspace: Path, tmp_path: Path, kind: str, by: str) -> None:
    async def story(bound: Bound) -> None:
        revoked = (
            Revoked(devices=frozenset({"camera-1"}))
            if by == "device"
            else Revoked(keys=frozenset({key_digest(bound.certificate)}))
        )
        async with bound.channel() as channel:
            running = asyncio.ensure_future(outcome(bound.call(channel, kind, kind), kind))
            await asyncio.wait_for(bound.begun.wait(), 20)
            bound.guard.replace(Revoked(devices=frozenset({"camera-2"}), keys=frozenset({"0" * 64})))
            assert not bound.ended.is_set()
            bound.guard.replace(revoked)
            assert await asyncio.wait_for(running, 20) == (grpc.StatusCode.UNAUTHENTICATED, "revoked")
            assert bound.ended.is_set()

    play(workspace, tmp_path, story)


async def _read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize("reads_on", [True, False])
def test_a_stream_that_nobody_reads_ends_as_well(workspace: Path, tmp_path: Path, reads_on: bool) -> None:
    async def story(bound: Bound) -> None:
        async with bound.channel() as channel:
            call = bound.call(channel, "unary_stream", "flood")
            await call.read()  # and no more: the server soon waits for the window
            await asyncio.sleep(0.2)
            bound.guard.replace(Revoked(devices=frozenset({"camera-1"})))
            if reads_on:
                with pytest.raises(grpc.aio.AioRpcError) as told:
                    await _read_all(call)
                assert told.value.code() is grpc.StatusCode.UNAUTHENTICATED
            await asyncio.wait_for(bound.ended.wait(), 20)

    play(workspace, tmp_path, story)


def test_a_caller_who_goes_away_is_no_revocation(workspace: Path, tmp_path: Path) -> None:
    async def story(bound: Bound) -> None:
        async with bound.channel() as channel:
            call = bound.call(channel, "unary_unary", "unary_unary")
            await asyncio.wait_for(bound.begun.wait(), 20)
            call.cancel()
            await asyncio.wait_for(bound.ended.wait(), 20)

    play(workspace, tmp_path, story)
