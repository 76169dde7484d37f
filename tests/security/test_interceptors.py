"""Calls over a real TLS connection with real tokens: who gets in, who does not, and with what answer."""

import asyncio
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus.errors import IdentityError
from isthmus.status import REASON_KEY, StatusInterceptor
from security.audit.budget import Budget
from security.audit.interceptors import ActionAudit, RefusalAudit
from security.audit.writer import NoTrail
from security.guard import CallGuard
from security.interceptors import AuthInterceptor, current_claims
from security.limits import ListenerLimits
from security.tokens import TokenIssuer
from tests.security.echo import KINDS, METHOD_SCOPES, SERVICE, call, refused_status, with_server


@pytest.fixture
def auth(issuer: TokenIssuer) -> AuthInterceptor:
    return AuthInterceptor(issuer.verifier(), METHOD_SCOPES)


def _token(issuer: TokenIssuer, role: str = "client", subject: str = "ann", **more: Any) -> str:
    return issuer.mint(subject, role, ttl=timedelta(minutes=5), **more)[0]


def _refused(workspace: Path, auth: AuthInterceptor, kind: str, token: str | None, method: str = "") -> tuple[Any, str]:
    async def story(channel: grpc.aio.Channel, port: int) -> grpc.Call:
        return await asyncio.to_thread(refused_status, workspace / "trust" / "ca.pem", port, kind, token, method)

    status: Any = with_server(workspace, [auth], story)
    (reason,) = [str(value) for key, value in status.trailing_metadata() if key == REASON_KEY]
    return status.code(), reason


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_token_reaches_the_method_with_its_claims(
    workspace: Path, auth: AuthInterceptor, issuer: TokenIssuer, kind: str
) -> None:
    answers = with_server(workspace, [auth], lambda channel, _: call(channel, kind, _token(issuer)))
    assert len(answers) == (2 if kind.endswith("stream") else 1)
    for answer in answers:
        subject, version, group = answer.decode().split(" ")
        assert (subject, version) == ("ann", "TLSv1.3")
        assert group


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_is_refused(workspace: Path, auth: AuthInterceptor, kind: str) -> None:
    assert _refused(workspace, auth, kind, None) == (grpc.StatusCode.UNAUTHENTICATED, "missing-token")


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_token_is_refused(workspace: Path, auth: AuthInterceptor, kind: str) -> None:
    assert _refused(workspace, auth, kind, "abc.def") == (grpc.StatusCode.UNAUTHENTICATED, "malformed-token")


@pytest.mark.parametrize("kind", KINDS)
def test_a_forged_token_is_refused(workspace: Path, auth: AuthInterceptor, issuer: TokenIssuer, kind: str) -> None:
    good, other = _token(issuer).split("."), _token(issuer, subject="eve").split(".")
    forged = ".".join([good[0], good[1], other[2]])
    assert _refused(workspace, auth, kind, forged) == (grpc.StatusCode.UNAUTHENTICATED, "wrong-signature")


@pytest.mark.parametrize("kind", KINDS)
def test_an_expired_token_is_refused(workspace: Path, auth: AuthInterceptor, issuer: TokenIssuer, kind: str) -> None:
    token = _token(issuer, now=datetime.now(UTC) - timedelta(hours=1))
    assert _refused(workspace, auth, kind, token) == (grpc.StatusCode.UNAUTHENTICATED, "expired-token")


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_without_the_scope_is_refused(workspace: Path, issuer: TokenIssuer, kind: str) -> None:
    auth = AuthInterceptor(issuer.verifier(), {f"/{SERVICE}/{kind}": "fleet:admin"})
    assert _refused(workspace, auth, kind, _token(issuer)) == (grpc.StatusCode.PERMISSION_DENIED, "missing-scope")


def test_a_method_that_is_not_in_the_table_is_refused_even_to_operators(
    workspace: Path, auth: AuthInterceptor, issuer: TokenIssuer
) -> None:
    refusal = _refused(workspace, auth, "unary_unary", _token(issuer, "operator"), "unlisted")
    assert refusal == (grpc.StatusCode.PERMISSION_DENIED, "method-not-allowed")


def test_a_public_method_needs_no_token(workspace: Path, auth: AuthInterceptor) -> None:
    answers = with_server(workspace, [auth], lambda c, _: call(c, "unary_unary", None, method="public"))
    assert answers == [b"hello"]


def test_a_public_method_sees_no_claims(workspace: Path, issuer: TokenIssuer) -> None:
    auth = AuthInterceptor(issuer.verifier(), {f"/{SERVICE}/public_claims": "public"})
    refusal = _refused(workspace, auth, "unary_unary", _token(issuer), "public_claims")
    assert refusal == (grpc.StatusCode.UNAUTHENTICATED, "missing-token")


def test_any_valid_token_will_do_for_an_authenticated_method(
    workspace: Path, auth: AuthInterceptor, issuer: TokenIssuer
) -> None:
    story = lambda c, _: call(c, "unary_unary", _token(issuer), method="authenticated")  # noqa: E731
    assert with_server(workspace, [auth], story)[0].startswith(b"ann ")
    refusal = _refused(workspace, auth, "unary_unary", None, "authenticated")
    assert refusal == (grpc.StatusCode.UNAUTHENTICATED, "missing-token")


def test_calls_at_the_same_time_keep_their_own_claims(
    workspace: Path, auth: AuthInterceptor, issuer: TokenIssuer
) -> None:
    names = [f"user-{number}" for number in range(20)]

    async def story(channel: grpc.aio.Channel, port: int) -> list[list[bytes]]:
        return await asyncio.gather(
            *(call(channel, KINDS[i % 4], _token(issuer, subject=name)) for i, name in enumerate(names))
        )

    for name, answers in zip(names, with_server(workspace, [auth], story), strict=True):
        assert {answer.decode().split(" ")[0] for answer in answers} == {name}


@pytest.mark.parametrize(
    "metadata",
    [
        (("authorization", "Basic YTpi"),),
        (("authorization", "Bearer one"), ("authorization", "Bearer two")),
        (("authorization", ""),),
    ],
)
def test_only_one_bearer_header_is_accepted(workspace: Path, auth: AuthInterceptor, metadata: Any) -> None:
    async def story(channel: grpc.aio.Channel, port: int) -> None:
        stub: Any = channel.unary_unary(f"/{SERVICE}/unary_unary")
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub(b"", metadata=metadata, timeout=20)
        assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED

    with_server(workspace, [auth], story)


def test_a_refused_call_is_answered_before_its_request_came(workspace: Path, auth: AuthInterceptor) -> None:
    async def story(channel: grpc.aio.Channel, port: int) -> None:
        # Nothing is ever sent: were the server waiting for the request, this would end at its deadline.
        stub: Any = channel.stream_unary(f"/{SERVICE}/stream_unary")
        assert await stub(timeout=20).code() is grpc.StatusCode.UNAUTHENTICATED

    with_server(workspace, [auth], story)


def test_a_method_that_writes_its_answers_itself_works(
    workspace: Path, auth: AuthInterceptor, issuer: TokenIssuer
) -> None:
    """As grpc_health's Watch does."""

    async def story(channel: grpc.aio.Channel, port: int) -> bytes:
        stub: Any = channel.unary_stream(f"/{SERVICE}/writes")
        async for answer in stub(b"", metadata=(("authorization", f"Bearer {_token(issuer)}"),), timeout=20):
            return bytes(answer)
        return b""

    assert with_server(workspace, [auth], story).startswith(b"ann ")


def test_a_listener_of_one_tenant_refuses_the_others(workspace: Path, issuer: TokenIssuer) -> None:
    """As an agent does, whose device belongs to a tenant."""
    auth = AuthInterceptor(issuer.verifier(), METHOD_SCOPES, tenant="acme")
    answers = with_server(workspace, [auth], lambda c, _: call(c, "unary_unary", _token(issuer, tenant="acme")))
    assert answers[0].startswith(b"ann ")
    for tenant in ("default", "beta"):
        refusal = _refused(workspace, auth, "unary_unary", _token(issuer, tenant=tenant))
        assert refusal == (grpc.StatusCode.PERMISSION_DENIED, "wrong-tenant")


def test_a_token_of_grants_opens_nothing_where_there_are_none(workspace: Path, issuer: TokenIssuer) -> None:
    refusal = _refused(
        workspace, AuthInterceptor(issuer.verifier(), METHOD_SCOPES), "unary_unary", _token(issuer, "granted")
    )
    assert refusal == (grpc.StatusCode.PERMISSION_DENIED, "no-grant")


def test_outside_a_call_there_are_no_claims() -> None:
    with pytest.raises(IdentityError):
        current_claims()


class _Details(grpc.HandlerCallDetails):
    def __init__(self, method: str, metadata: Any) -> None:
        self.method, self.invocation_metadata = method, metadata


def test_callers_of_a_method_share_the_handlers_that_interceptors_make(issuer: TokenIssuer) -> None:
    async def behaviour(request: bytes, context: Any) -> bytes:
        return request

    handler: Any = grpc.unary_unary_rpc_method_handler(behaviour)
    interceptors = (
        StatusInterceptor(),
        RefusalAudit(NoTrail(), Budget()),
        AuthInterceptor(issuer.verifier(), METHOD_SCOPES),
        CallGuard(ListenerLimits(), METHOD_SCOPES),
        ActionAudit(NoTrail()),
    )

    async def intercepted(number: int, details: grpc.HandlerCallDetails) -> Any:
        if number == len(interceptors):
            return handler
        return await interceptors[number].intercept_service(partial(intercepted, number + 1), details)

    def made_for(token: str) -> Any:
        metadata = (("authorization", f"Bearer {token}"),)
        return asyncio.run(intercepted(0, _Details(f"/{SERVICE}/unary_unary", metadata)))

    first = made_for(_token(issuer, subject="ann"))
    assert made_for(_token(issuer, subject="bob")) is first
    assert made_for("abc.def") is not first
    assert made_for(_token(issuer, subject="ann")) is not handler
