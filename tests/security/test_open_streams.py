"""Streams that are open when their caller loses what let it in: over real TLS, behind all that stands before them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus.status import StatusInterceptor
from security import binding
from security.apikeys import ApiKey, key_digest, new_api_key
from security.authenticator import Authenticator
from security.guard import CallGuard
from security.interceptors import AuthInterceptor, current_claims
from security.limits import ListenerLimits
from security.oidc import OidcIssuer, OidcIssuers
from security.roles import AccessBook, Grant
from security.rotation import rotate_token_keys
from security.tls import channel_credentials, server_credentials
from security.tokens import TokenIssuer
from tests.security.issuers import Issuer, oidc_issuer

ALL = frozenset({"*"})
SOME = frozenset({"triage", "sorting"})
METHODS = {
    "unary_unary": "/isthmus.v1.FleetService/WhoAmI",
    "unary_stream": "/isthmus.v1.RegistryService/FetchMetadata",
    "stream_unary": "/isthmus.v1.RegistryService/UploadBlob",
    "stream_stream": "/inference.GRPCInferenceService/ModelStreamInfer",
}
STREAMS = ("unary_stream", "stream_unary", "stream_stream")
UNKNOWN_KEY = (grpc.StatusCode.UNAUTHENTICATED, "unknown-api-key")
Refused = tuple[grpc.StatusCode, str]


class Waiting:
    """A server whose methods begin and wait until `finish` is set; and what it judges callers by."""

    def __init__(self, workspace: Path, issuers: OidcIssuers | None = None) -> None:
        self.workspace, self.issuer = workspace, TokenIssuer.load(workspace / "cloud")
        self.book, self.tokens = AccessBook(), self.issuer.verifier()
        self.clock_s = 0.0
        self.authenticator = Authenticator(
            self.tokens, book=self.book, issuers=issuers, clock=lambda: time.time() + self.clock_s
        )
        self.finish, self.seen = asyncio.Event(), asyncio.Queue[str]()

    async def _wait(self, _request: Any, _context: Any) -> bytes:
        self.seen.put_nowait(current_claims().subject)
        await self.finish.wait()
        return b"done"

    async def _wait_stream(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        yield await self._wait(request, context)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[grpc.aio.Channel]:
        home = self.workspace / "cloud"
        access = AuthInterceptor(self.authenticator)
        server = grpc.aio.server(interceptors=(StatusInterceptor(), access, CallGuard(ListenerLimits())))
        for kind, path in METHODS.items():
            _, service, method = path.split("/")
            behaviour = self._wait_stream if kind.endswith("stream") else self._wait
            handler = getattr(grpc, f"{kind}_rpc_method_handler")(behaviour)
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        port = server.add_secure_port("127.0.0.1:0", server_credentials(home / "server.key", home / "server.pem"))
        await server.start()
        try:
            trust = channel_credentials(self.workspace / "trust" / "ca.pem")
            async with grpc.aio.secure_channel(f"localhost:{port}", trust) as channel:
                yield channel
        finally:
            await server.stop(0)

    async def begin(self, channel: grpc.aio.Channel, kind: str, credential: str) -> asyncio.Task[Any]:
        """Return a call that has begun: it gives what it was refused with, or None when it was answered."""
        stub: Any = getattr(channel, kind)(METHODS[kind])
        argument = iter([b""]) if kind.startswith("stream") else b""
        call = stub(argument, metadata=(("authorization", f"Bearer {credential}"),), timeout=60)
        running = asyncio.ensure_future(outcome(call, kind))
        seen = asyncio.ensure_future(self.seen.get())
        await asyncio.wait((running, seen), return_when=asyncio.FIRST_COMPLETED, timeout=30)
        assert seen.done(), running.result() if running.done() else "the call has not begun"
        return running

    def grant(self, role: str = "admin", models: frozenset[str] = ALL, principal: str = "apikey:shop") -> Grant:
        return Grant("default", principal, role, models)

    def key(self, name: str = "shop", life_s: float = 3600.0) -> tuple[str, ApiKey]:
        text, prefix = new_api_key()
        return text, ApiKey(prefix, key_digest(text), "default", name, time.time() + life_s)


async def outcome(call: Any, kind: str) -> Refused | None:
    try:
        if kind.endswith("unary"):
            await call
        else:
            async for _ in call:
                pass
    except grpc.aio.AioRpcError as error:
        return error.code(), str(dict(error.trailing_metadata() or ()).get("isthmus-reason", ""))
    return None


async def ended(running: Iterable[asyncio.Task[Any]]) -> list[Any]:
    async with asyncio.timeout(30):
        return await asyncio.gather(*running)


def play(waiting: Callable[[], Waiting], story: Callable[[Waiting, grpc.aio.Channel], Awaitable[None]]) -> None:
    async def run() -> None:
        server = waiting()
        async with server.serving() as channel:
            await story(server, channel)

    asyncio.run(run())


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_of_a_revoked_key_ends_and_no_other(workspace: Path, kind: str) -> None:
    async def story(server: Waiting, channel: grpc.aio.Channel) -> None:
        (mine, my_key), (other, other_key) = server.key(), server.key("other")
        grants = (server.grant(), server.grant(principal="apikey:other"))
        server.book.replace(grants, (my_key, other_key))
        running = [await server.begin(channel, kind, credential) for credential in (mine, other)]
        server.book.replace(grants, (other_key,))
        assert await ended(running[:1]) == [UNKNOWN_KEY]
        server.finish.set()
        assert await ended(running[1:]) == [None]

    play(lambda: Waiting(workspace), story)


def test_an_answer_that_is_being_worked_out_is_still_given(workspace: Path) -> None:
    """An admin may revoke what it calls with, and wants to hear that this was done."""

    async def story(server: Waiting, channel: grpc.aio.Channel) -> None:
        credential, key = server.key()
        server.book.replace((server.grant(),), (key,))
        running = [await server.begin(channel, "unary_unary", credential)]
        server.book.replace((), ())
        server.finish.set()
        assert await ended(running) == [None]

    play(lambda: Waiting(workspace), story)


@pytest.mark.parametrize(
    ("grants", "refused"),
    [
        ([], (grpc.StatusCode.PERMISSION_DENIED, "no-grant")),
        ([("auditor", ALL)], (grpc.StatusCode.PERMISSION_DENIED, "missing-scope")),
        ([("client", frozenset({"triage"}))], (grpc.StatusCode.PERMISSION_DENIED, "access-changed")),
        ([("client", frozenset({"triage"})), ("client", frozenset({"sorting"}))], None),
        ([("client", SOME | {"more"}), ("auditor", ALL)], None),
        ([("client", ALL)], None),
    ],
)
@pytest.mark.parametrize("by", ["apikey:shop", "subject:ann", "oidc:corp:u-17", "group:corp:vision"])
def test_a_stream_lasts_as_long_as_its_callers_roles(
    workspace: Path, corp: Issuer, by: str, grants: list[tuple[str, frozenset[str]]], refused: Refused | None
) -> None:
    issuers = OidcIssuers([corp.config()])
    issuers.all[0].keys.load()

    async def story(server: Waiting, channel: grpc.aio.Channel) -> None:
        text, key = server.key()
        granted = server.issuer.mint("ann", "granted", ttl=timedelta(hours=1))[0]
        credential = {"apikey": text, "subject": granted}.get(by.partition(":")[0]) or corp.token()
        server.book.replace((server.grant("client", SOME, by),), (key,))
        running = [await server.begin(channel, "stream_stream", credential)]
        server.book.replace([server.grant(role, models, by) for role, models in grants], (key,))
        if refused is None:
            server.finish.set()
        assert await ended(running) == [refused]

    play(lambda: Waiting(workspace, issuers), story)


def test_a_role_that_moves_to_another_tenant_ends_the_stream(workspace: Path, corp: Issuer) -> None:
    issuers = OidcIssuers([corp.config()])
    issuers.all[0].keys.load()

    async def story(server: Waiting, channel: grpc.aio.Channel) -> None:
        server.book.replace((Grant("acme", "oidc:corp:u-17", "client", ALL),), ())
        running = [await server.begin(channel, "stream_stream", corp.token())]
        server.book.replace((Grant("beta", "oidc:corp:u-17", "client", ALL),), ())
        assert await ended(running) == [(grpc.StatusCode.PERMISSION_DENIED, "access-changed")]

    play(lambda: Waiting(workspace, issuers), story)


def test_a_stream_ends_when_the_external_issuer_takes_its_key_back(workspace: Path, corp: Issuer) -> None:
    issuers = OidcIssuers([corp.config()])
    issuers.all[0].keys.load()
    stays = corp.add_key("ES256")

    async def story(server: Waiting, channel: grpc.aio.Channel) -> None:
        issuer: OidcIssuer = issuers.all[0]
        await issuer.keys.refresh()
        server.book.replace((server.grant("client", ALL, "oidc:corp:u-17"),), ())
        gone = next(kid for kid in corp.keys if kid != stays)
        running = [await server.begin(channel, "stream_stream", corp.token(kid)) for kid in (gone, stays)]
        keys = dict(corp.keys)
        del corp.keys[gone]
        await issuer.keys.refresh()
        assert await ended(running[:1]) == [(grpc.StatusCode.UNAUTHENTICATED, "unknown-key")]
        server.finish.set()
        assert await ended(running[1:]) == [None]
        corp.keys = keys

    play(lambda: Waiting(workspace, issuers), story)


def test_a_stream_ends_with_the_key_that_signed_its_token(own_workspace: Path) -> None:
    async def story(server: Waiting, channel: grpc.aio.Channel) -> None:
        token = server.issuer.mint("ann", "admin", ttl=timedelta(hours=1))[0]
        running = [await server.begin(channel, kind, token) for kind in STREAMS]
        rotate_token_keys(own_workspace / "cloud" / "tokens", datetime.now(UTC))
        server.issuer.refresh()
        server.tokens.use_keys(server.issuer.jwks)  # beside the new key, until the last token has ended
        assert not any(call.done() for call in running)
        rotate_token_keys(own_workspace / "cloud" / "tokens", datetime.now(UTC), stolen=True)
        server.issuer.refresh()
        server.tokens.use_keys(server.issuer.jwks)
        assert set(await ended(running)) == {(grpc.StatusCode.UNAUTHENTICATED, "unknown-key")}

    play(lambda: Waiting(own_workspace), story)


def test_a_stream_without_an_end_ends_with_its_credential(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "EXPIRY_LEEWAY_S", 0)  # keys have none

    async def story(server: Waiting, channel: grpc.aio.Channel) -> None:
        text, key = server.key(life_s=5)
        server.book.replace((server.grant(),), (key,))
        transfer, endless = [await server.begin(channel, kind, text) for kind in ("stream_unary", "stream_stream")]
        assert await ended([endless]) == [UNKNOWN_KEY]
        assert time.time() >= key.expires_at
        server.finish.set()
        assert await ended([transfer]) == [None]

    play(lambda: Waiting(workspace), story)


def test_a_transfer_may_outlast_its_token_whatever_others_are_granted(workspace: Path) -> None:
    async def story(server: Waiting, channel: grpc.aio.Channel) -> None:
        text, key = server.key(life_s=600)
        server.book.replace((server.grant(),), (key,))
        token = server.issuer.mint("ann", "admin", ttl=timedelta(minutes=10))[0]
        running = [await server.begin(channel, "stream_unary", credential) for credential in (text, token)]
        server.clock_s = 3600.0
        server.book.replace((server.grant(), server.grant(principal="subject:eve")), (key,))
        server.finish.set()
        assert await ended(running) == [None, None]

    play(lambda: Waiting(workspace), story)


@pytest.fixture(scope="module")
def corp(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with oidc_issuer(tmp_path_factory.mktemp("issuer")) as issuer:
        issuer.add_key("EdDSA")
        yield issuer
