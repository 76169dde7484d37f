"""Tokens of an external issuer: who gets in, what is refused, and how its keys are kept."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from isthmus.errors import ConfigError, IdentityError, PermissionDeniedError, UnavailableError
from security.authenticator import Authenticator
from security.oidc import OidcConfig, OidcIssuer, OidcIssuers
from security.oidc_keys import BELIEVED_S, IssuerKeys, KeySource, parse_keys
from security.roles import AccessBook, Grant
from security.tokens import TokenIssuer
from tests.security.issuers import ALGORITHMS, Issuer, assemble, oidc_issuer

ALL = frozenset({"*"})


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with oidc_issuer(tmp_path_factory.mktemp("oidc"), algorithms=ALGORITHMS) as running:
        yield running


@pytest.fixture(autouse=True)
def good_mood(issuer: Issuer) -> Iterator[None]:
    keys = dict(issuer.keys)
    yield
    issuer.keys, issuer.answer = keys, None


def believed(issuer: Issuer, **values: Any) -> OidcIssuer:
    """Return what a cloud makes of the issuer, with its keys fetched."""
    made = OidcIssuer(issuer.config(**values))
    asyncio.run(made.keys.refresh())
    return made


def refusal(made: OidcIssuer, token: str, now_s: float | None = None) -> str:
    with pytest.raises((IdentityError, UnavailableError)) as raised:
        made.verify(token, time.time() if now_s is None else now_s)
    return raised.value.reason


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_good_token_names_its_subject_and_groups(issuer: Issuer, algorithm: str) -> None:
    kid = next(kid for kid, (known, _) in issuer.keys.items() if known == algorithm)
    identity = believed(issuer).verify(issuer.token(kid), time.time())
    assert identity.principals == ("oidc:corp:u-17", "group:corp:night shift", "group:corp:vision")
    several = issuer.token(kid, aud=["other", "isthmus"], groups="vision", jti=None)
    assert believed(issuer).verify(several, time.time()).principals[1:] == ("group:corp:vision",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"aud": "another"}, "wrong-audience"),
        ({"aud": ["a", "b"]}, "wrong-audience"),
        ({"aud": None}, "missing-claim"),
        ({"aud": "isthmus2"}, "wrong-audience"),
        ({"iss": "https://evil.example"}, "wrong-issuer"),
        ({"iss": None}, "missing-claim"),
        ({"sub": None}, "missing-claim"),
        ({"sub": ""}, "malformed-token"),
        ({"sub": "a\nb"}, "malformed-token"),
        ({"sub": "\x1b[31mroot"}, "malformed-token"),
        ({"sub": 7}, "malformed-token"),
        ({"sub": "x" * 300}, "malformed-token"),
        ({"exp": None}, "missing-claim"),
        ({"exp": 1}, "expired-token"),
        ({"exp": "soon"}, "malformed-token"),
        ({"exp": 1e99}, "malformed-token"),
        ({"iat": None}, "missing-claim"),
        ({"iat": int(time.time()) + 3600}, "not-yet-valid-token"),
        ({"nbf": int(time.time()) + 3600}, "not-yet-valid-token"),
        ({"groups": {"a": 1}}, "malformed-token"),
        ({"groups": ["x"] * 300}, "malformed-token"),
    ],
)
def test_a_token_that_says_something_else_is_refused(issuer: Issuer, changes: dict[str, Any], reason: str) -> None:
    assert refusal(believed(issuer), issuer.token(**changes)) == reason


def test_only_the_configured_algorithms_are_taken(issuer: Issuer) -> None:
    made = believed(issuer, algorithms=("ES256",))
    for kid, (algorithm, _) in issuer.keys.items():
        if algorithm != "ES256":
            assert refusal(made, issuer.token(kid)) == "wrong-algorithm"


@pytest.mark.parametrize("name", ["none", "None", "HS256", "RS512", "PS256", "", None, 1, ["RS256"]])
def test_no_other_algorithm_is_taken(issuer: Issuer, name: Any) -> None:
    token = assemble({"alg": name, "kid": next(iter(issuer.keys))}, issuer.claims())
    assert refusal(believed(issuer), token) in ("wrong-algorithm", "malformed-token")


def test_a_public_key_is_no_secret_of_an_hmac(issuer: Issuer) -> None:
    kid, (_, key) = next(iter(issuer.keys.items()))
    secret = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    unsigned = assemble({"alg": "HS256", "kid": kid}, issuer.claims()).rpartition(".")[0]
    forged = assemble(
        {"alg": "HS256", "kid": kid}, issuer.claims(), hmac.digest(secret, unsigned.encode(), hashlib.sha256)
    )
    assert refusal(believed(issuer), forged) == "wrong-algorithm"


def test_the_key_of_one_algorithm_verifies_no_other(issuer: Issuer) -> None:
    """A kid that exists, with another algorithm that is configured as well."""
    kid = next(kid for kid, (known, _) in issuer.keys.items() if known == "RS256")
    attacker = replace(issuer, keys={kid: ("ES256", ec.generate_private_key(ec.SECP256R1()))})
    assert refusal(believed(issuer), attacker.token(kid)) == "unknown-key"


def test_a_wrong_key_under_a_known_kid(issuer: Issuer) -> None:
    kid = next(kid for kid, (known, _) in issuer.keys.items() if known == "RS256")
    attacker = replace(issuer, keys={kid: ("RS256", rsa.generate_private_key(65537, 2048))})
    assert refusal(believed(issuer), attacker.token(kid)) == "wrong-signature"


@pytest.mark.parametrize("kid", ["unknown", "", "../../etc/passwd", None, 1, ["a"], {"a": 1}])
def test_an_unknown_kid(issuer: Issuer, kid: Any) -> None:
    token = assemble({"alg": "RS256", "kid": kid}, issuer.claims(), b"x" * 256)
    assert refusal(believed(issuer), token) in ("unknown-key", "malformed-token")


@pytest.mark.parametrize("name", ["jku", "jwk", "x5u", "crit", "b64", "zip"])
def test_a_header_that_brings_its_own_key_or_more(issuer: Issuer, name: str) -> None:
    value: Any = {"crit": ["b64"], "b64": True, "jwk": {"kty": "RSA"}}.get(name, "https://evil.example/keys")
    kid, (algorithm, _) = next(iter(issuer.keys.items()))
    token = assemble({"alg": algorithm, "kid": kid, name: value}, issuer.claims(), b"x")
    assert refusal(believed(issuer), token) == "malformed-token"


# -- what a caller may do ----------------------------------------------------------------------------------------------


def authenticator(tokens: TokenIssuer, made: OidcIssuer, *grants: Grant) -> Authenticator:
    issuers, book = OidcIssuers([made.config]), AccessBook()
    issuers.all[0].keys = made.keys
    book.replace(grants, ())
    return Authenticator(tokens.verifier(), book=book, issuers=issuers)


def test_a_token_is_worth_its_grants_by_subject_and_by_group(issuer: Issuer, tokens: TokenIssuer) -> None:
    made, token = believed(issuer), issuer.token()
    with pytest.raises(PermissionDeniedError) as raised:
        authenticator(tokens, made).verify(token)
    assert raised.value.reason == "no-grant"
    check = authenticator(
        tokens,
        made,
        Grant("acme", "oidc:corp:u-17", "client", frozenset({"acme.a"})),
        Grant("acme", "group:corp:vision", "auditor", ALL),
        Grant("acme", "group:other:vision", "admin", ALL),
        Grant("acme", "subject:u-17", "admin", ALL),
        Grant("acme", "oidc:corp:u-1", "admin", ALL),
    )
    claims = check.verify(token)
    assert (claims.subject, claims.tenant) == ("oidc:corp:u-17", "acme")
    assert claims.scopes == {"infer", "audit:read", "usage:read", "registry:read"}
    assert claims.narrowed_to("infer").models == {"acme.a"}
    assert claims.narrowed_to("registry:read").models == ALL


def test_what_a_token_says_of_scopes_roles_and_tenants_counts_for_nothing(issuer: Issuer, tokens: TokenIssuer) -> None:
    token = issuer.token(scope="access:admin", scp=["access:admin"], roles=["admin"], tenant="beta", models=["*"])
    claims = authenticator(tokens, believed(issuer), Grant("acme", "oidc:corp:u-17", "client", ALL)).verify(token)
    assert claims.scopes == {"infer"}
    assert claims.tenant == "acme"


def test_roles_in_several_tenants_are_used_one_at_a_time(issuer: Issuer, tokens: TokenIssuer) -> None:
    grants = [Grant("acme", "oidc:corp:u-17", "admin", ALL), Grant("beta", "group:corp:vision", "client", ALL)]
    check, token = authenticator(tokens, believed(issuer), *grants), issuer.token()
    with pytest.raises(PermissionDeniedError) as raised:
        check.verify(token)
    assert raised.value.reason == "which-tenant"
    assert "access:admin" in check.verify(token, "acme").scopes
    assert check.verify(token, "beta").scopes == {"infer"}
    with pytest.raises(PermissionDeniedError):
        check.verify(token, "gamma")


def test_a_change_of_grants_holds_for_tokens_that_are_known(issuer: Issuer, tokens: TokenIssuer) -> None:
    made, token, book = believed(issuer), issuer.token(), AccessBook()
    book.replace([Grant("acme", "oidc:corp:u-17", "admin", ALL)], ())
    issuers = OidcIssuers([made.config])
    issuers.all[0].keys = made.keys
    check = Authenticator(tokens.verifier(), book=book, issuers=issuers)
    assert "access:admin" in check.verify(token).scopes
    book.replace([Grant("acme", "oidc:corp:u-17", "client", ALL)], ())
    assert check.verify(token).scopes == {"infer"}
    book.replace([], ())
    with pytest.raises(PermissionDeniedError):
        check.verify(token)


def test_a_known_token_ends_with_its_time(issuer: Issuer, tokens: TokenIssuer) -> None:
    made, book, now = believed(issuer), AccessBook(), [time.time()]
    book.replace([Grant("acme", "oidc:corp:u-17", "client", ALL)], ())
    issuers = OidcIssuers([made.config])
    issuers.all[0].keys = made.keys
    check, token = Authenticator(tokens.verifier(), book=book, issuers=issuers, clock=lambda: now[0]), issuer.token()
    assert check.verify(token)
    now[0] += 700
    with pytest.raises(IdentityError) as raised:
        check.verify(token)
    assert raised.value.reason == "expired-token"


def test_a_token_of_ours_is_not_taken_for_an_external_one(issuer: Issuer, tokens: TokenIssuer) -> None:
    """Nor the other way round: each is verified with the keys of the issuer that it names, and of no other."""
    from datetime import timedelta

    check = authenticator(tokens, believed(issuer))
    ours, _ = tokens.mint("ann", "admin", ttl=timedelta(minutes=5))
    assert check.verify(ours).subject == "ann"
    forged = issuer.token(iss=tokens.issuer, aud=tokens.audience, scope="access:admin", models=["*"], nbf=1)
    with pytest.raises(IdentityError):
        check.verify(forged)


@pytest.fixture
def tokens(workspace: Path) -> TokenIssuer:
    return TokenIssuer.load(workspace / "cloud")


# -- keys --------------------------------------------------------------------------------------------------------------


def source(issuer: Issuer, **changes: Any) -> KeySource:
    return replace(KeySource(f"{issuer.url}/keys", None, issuer.ca), **changes)


def test_before_the_keys_are_there_nobody_is_let_in_and_nobody_waits(issuer: Issuer) -> None:
    started = time.monotonic()
    assert refusal(OidcIssuer(issuer.config()), issuer.token()) == "issuer-unavailable"
    assert time.monotonic() - started < 1.0


def test_a_new_key_is_found_by_itself_and_unknown_kids_cause_no_storm(issuer: Issuer) -> None:
    async def story() -> None:
        made = OidcIssuer(issuer.config())
        made.keys = IssuerKeys(source(issuer), "corp", least_s=0.2)
        running = asyncio.create_task(made.keys.run())
        before = issuer.fetched
        kid = issuer.add_key("ES256")
        token = issuer.token(kid)
        async with asyncio.timeout(20):
            while True:
                try:
                    made.verify(token, time.time())
                    break
                except (IdentityError, UnavailableError):
                    await asyncio.sleep(0.01)
        started, before = time.monotonic(), issuer.fetched
        for number in range(3000):
            with pytest.raises(IdentityError):
                made.verify(assemble({"alg": "RS256", "kid": f"guess-{number}"}, issuer.claims(), b"x"), time.time())
            if number % 100 == 0:
                await asyncio.sleep(0.005)
        assert issuer.fetched - before <= 2 + (time.monotonic() - started) / 0.2
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(story())


@pytest.mark.parametrize(
    "answer",
    [
        (500, {}, b"{}"),
        (404, {}, b""),
        (200, {}, b"not JSON"),
        (200, {}, b'{"keys": []}'),
        (200, {}, b'{"keys": 1}'),
        (200, {}, b'{"keys": [{"kty": "oct", "k": "AA", "kid": "x"}]}'),
        (200, {}, b"x" * (300 << 10)),
        (302, {"Location": "https://127.0.0.1:1/keys"}, b""),
        (302, {"Location": "file:///etc/passwd"}, b""),
        (200, {}, b"[" * 100_000),
        (0, {}, b"no HTTP at all\r\n\r\n"),
        (0, {}, b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n{}"),
        (0, {}, b"HTTP/1.1 200 OK\r\n" + b"a" * 100_000 + b": b\r\n\r\n{}"),
        (0, {}, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno length\r\n"),
        (0, {}, b""),
    ],
)
def test_a_bad_answer_changes_nothing(issuer: Issuer, answer: tuple[int, dict[str, str], bytes]) -> None:
    made = believed(issuer)
    issuer.answer = answer
    asyncio.run(made.keys.refresh())
    assert made.verify(issuer.token(), time.time())
    fresh = OidcIssuer(issuer.config())
    asyncio.run(fresh.keys.refresh())
    assert refusal(fresh, issuer.token()) == "issuer-unavailable"


def test_old_keys_are_believed_for_a_day_and_not_longer(issuer: Issuer) -> None:
    made, now = believed(issuer), time.time()
    token = issuer.token(exp=int(now + 3 * BELIEVED_S))
    assert made.verify(token, now + BELIEVED_S - 60)
    assert refusal(made, token, now + BELIEVED_S + 60) == "issuer-unavailable"


def test_a_key_that_was_taken_back_is_gone_with_the_next_fetch(issuer: Issuer) -> None:
    made = believed(issuer)
    kid, token = next(iter(issuer.keys)), issuer.token()
    del issuer.keys[kid]
    asyncio.run(made.keys.refresh())
    assert refusal(made, token) == "unknown-key"


def test_keys_come_over_a_connection_that_is_verified(issuer: Issuer, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError):
        source(issuer, ca_file=None).read()  # the system does not know this CA
    with oidc_issuer(tmp_path / "another") as another, pytest.raises(UnavailableError):
        source(issuer, ca_file=another.ca).read()
    with pytest.raises(UnavailableError):
        source(issuer, url=f"{issuer.url.replace('127.0.0.1', 'localhost')}/keys").read()  # not in its certificate


def test_keys_can_be_a_file(issuer: Issuer, tmp_path: Path) -> None:
    (tmp_path / "jwks.json").write_bytes(issuer.jwks())
    made = believed(issuer, jwks_url="", jwks_file=tmp_path / "jwks.json")
    assert made.verify(issuer.token(), time.time())


def test_unfit_keys_are_left_out(issuer: Issuer) -> None:
    entries = json.loads(issuer.jwks())["keys"]
    weak = replace(issuer, keys={"weak": ("RS256", rsa.generate_private_key(65537, 1024))})
    unfit = [
        *json.loads(weak.jwks())["keys"],
        entries[0] | {"use": "enc", "kid": "a"},
        entries[0] | {"alg": "RS512", "kid": "b"},
        {**entries[0], "kid": ""},
        {"kty": "oct", "k": "AAAA", "kid": "c"},
        {"kty": "EC", "crv": "P-521", "x": "AA", "y": "AA", "kid": "d"},
        "text",
    ]
    assert {kid for kid, _ in parse_keys(json.dumps({"keys": [*entries, *unfit]}).encode())} == set(issuer.keys)
    with pytest.raises(ConfigError):
        parse_keys(json.dumps({"keys": unfit}).encode())


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "Corp"},
        {"name": ""},
        {"name": "a:b"},
        {"issuer": ""},
        {"audience": ""},
        {"jwks_url": "http://idp.example/keys"},
        {"jwks_url": "file:///etc/passwd"},
        {"jwks_url": ""},
        {"jwks_file": Path("/etc/jwks.json")},
        {"algorithms": ()},
        {"algorithms": ("HS256",)},
        {"algorithms": ("none",)},
    ],
)
def test_what_no_issuer_can_be_is_refused_at_the_start(wrong: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "name": "corp", "issuer": "https://idp.example", "audience": "a", "jwks_url": "https://idp.example/keys",
    }  # fmt: skip
    OidcIssuer(OidcConfig(**good))
    with pytest.raises(ConfigError):
        OidcIssuer(OidcConfig(**good | wrong))
    with pytest.raises(ConfigError):
        OidcIssuers([OidcConfig(**good), OidcConfig(**good | {"name": "other"})])


def test_hostile_texts_are_no_tokens_of_anybody(issuer: Issuer) -> None:
    issuers = OidcIssuers([issuer.config()])
    hostile: list[str] = ["", ".", "..", "a.b.c", "é.é.é", "x" * 100_000, "." * 5000, f"a.{'W' * 5000}.c"]
    find: Callable[[str], Any] = issuers.of
    assert [find(text) for text in hostile] == [None] * len(hostile)
