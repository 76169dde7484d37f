"""Access tokens and assertions that are what they should be; tests/attacks/test_tokens.py has the others."""

import base64
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from isthmus.errors import ConfigError, IdentityError, InputError
from security.enrolment import make_csr, new_device_key, public_key_of
from security.keyset import KeySet, public_jwk
from security.scopes import SCOPES_OF_ROLE
from security.tokens import (
    TokenIssuer,
    TokenVerifier,
    create_token_issuer,
    describe_token,
    make_assertion,
    read_assertion_subject,
    verify_assertion,
)
from tests.security.conftest import NOW

HOUR = timedelta(hours=1)


class Clock:
    """Time that a test moves by hand."""

    def __init__(self) -> None:
        self.seconds = NOW.timestamp()

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize("role", SCOPES_OF_ROLE)
def test_a_token_says_who_may_do_what(issuer: TokenIssuer, clock: Clock, role: str) -> None:
    token, expires_at = issuer.mint("ann", role, models=["triage", "meter"], ttl=HOUR, now=NOW)
    claims = issuer.verifier(clock=clock).verify(token)
    assert claims.subject == "ann"
    assert claims.scopes == SCOPES_OF_ROLE[role]
    assert claims.expires_at == expires_at == NOW + HOUR
    assert claims.may_use("triage")
    assert not claims.may_use("other")


def test_a_token_for_all_models(issuer: TokenIssuer, clock: Clock) -> None:
    claims = issuer.verifier(clock=clock).verify(issuer.mint("ann", "client", ttl=HOUR, now=NOW)[0])
    assert claims.may_use("anything")


def test_two_tokens_are_never_the_same(issuer: TokenIssuer) -> None:
    assert issuer.mint("ann", "client", ttl=HOUR, now=NOW) != issuer.mint("ann", "client", ttl=HOUR, now=NOW)


def test_a_remembered_token_expires_like_any_other(issuer: TokenIssuer, clock: Clock) -> None:
    verifier = issuer.verifier(clock=clock)
    token, expires_at = issuer.mint("ann", "client", ttl=HOUR, now=NOW)
    first = verifier.verify(token)
    clock.seconds = expires_at.timestamp() + 4.9  # within the leeway
    assert verifier.verify(token) is first
    clock.seconds = expires_at.timestamp() + 5
    with pytest.raises(IdentityError) as refusal:
        verifier.verify(token)
    assert refusal.value.reason == "expired-token"


def test_a_signer_whose_clock_is_a_little_ahead_is_accepted(issuer: TokenIssuer, clock: Clock) -> None:
    token, _ = issuer.mint("ann", "client", ttl=HOUR, now=NOW + timedelta(seconds=30))
    assert issuer.verifier(clock=clock).verify(token).subject == "ann"


def test_the_memory_of_tokens_is_bounded(issuer: TokenIssuer, clock: Clock) -> None:
    verifier = TokenVerifier(issuer.jwks, issuer.issuer, issuer.audience, clock=clock, remembered=3)
    tokens = [issuer.mint(f"user-{n}", "client", ttl=HOUR, now=NOW)[0] for n in range(4)]
    first = [verifier.verify(token) for token in tokens]
    assert verifier.verify(tokens[0]) is not first[0]  # forgotten: the one unused for longest
    assert verifier.verify(tokens[3]) is first[3]
    assert verifier.verify(tokens[0]) == first[0]  # and verified again


def test_refusals_are_not_remembered_as_good(issuer: TokenIssuer, clock: Clock) -> None:
    verifier = issuer.verifier(clock=clock)
    token, _ = issuer.mint("ann", "client", ttl=HOUR, now=NOW + timedelta(minutes=2))
    with pytest.raises(IdentityError):
        verifier.verify(token)
    clock.seconds += 120
    assert verifier.verify(token).subject == "ann"


def test_keys_rotate_with_overlap(tmp_path: Path, clock: Clock) -> None:
    """While both keys are in the set, tokens of both are accepted; without the old key, only the new one's."""
    issuers = []
    for name in ("old", "new"):
        create_token_issuer(tmp_path / name / "tokens", issuer="i", audience="a")
        issuers.append(TokenIssuer.load(tmp_path / name))
    keys = [json.loads(issuer.jwks)["keys"][0] for issuer in issuers]
    tokens = [issuer.mint("ann", "client", ttl=HOUR, now=NOW)[0] for issuer in issuers]
    both = TokenVerifier(json.dumps({"keys": keys}).encode(), "i", "a", clock=clock)
    assert [both.verify(token).subject for token in tokens] == ["ann", "ann"]
    only_new = TokenVerifier(json.dumps({"keys": keys[1:]}).encode(), "i", "a", clock=clock)
    assert only_new.verify(tokens[1]).subject == "ann"
    with pytest.raises(IdentityError) as refusal:
        only_new.verify(tokens[0])
    assert refusal.value.reason == "unknown-key"


@pytest.mark.parametrize(
    "wrong",
    [
        {"role": "root"},
        {"tenant": "Acme"},
        {"tenant": ".."},
        {"subject": ""},
        {"subject": "a\nb"},
        {"subject": "a" * 129},
        {"ttl": timedelta(0)},
        {"ttl": timedelta(days=31)},
        {"models": []},
        {"models": [""]},
    ],
)
def test_minting_refuses_what_no_token_should_say(issuer: TokenIssuer, wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"subject": "ann", "role": "client", "ttl": HOUR} | wrong
    with pytest.raises(InputError):
        issuer.mint(arguments.pop("subject"), arguments.pop("role"), **arguments)


def test_a_description_has_no_signature(issuer: TokenIssuer) -> None:
    token, _ = issuer.mint("ann", "client", ttl=HOUR, now=NOW)
    record = describe_token(token)
    assert record["sub"] == "ann"
    assert record["exp"] == (NOW + HOUR).isoformat()
    assert token.split(".")[2] not in json.dumps(record)


def _jwk(**changes: Any) -> dict[str, Any]:
    return public_jwk(ed25519.Ed25519PrivateKey.generate().public_key()) | changes


@pytest.mark.parametrize(
    "jwks",
    [
        b"",
        b"[]",
        b"{}",
        b'{"keys": []}',
        b'{"keys": 3}',
        b'{"keys": [3]}',
        json.dumps({"keys": [_jwk(kid=3)]}).encode(),
        json.dumps({"keys": [_jwk(crv="X25519")]}).encode(),
        json.dumps({"keys": [_jwk(x="AA")]}).encode(),
        json.dumps({"keys": [_jwk(d="A" * 43)]}).encode(),
        json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "a"}]}).encode(),
        json.dumps({"keys": [_jwk()] * 33}).encode(),
    ],
)
def test_a_key_set_with_anything_but_ed25519_public_keys_is_refused(jwks: bytes) -> None:
    with pytest.raises(ConfigError):
        KeySet(jwks)


def test_a_key_set_with_a_private_key_is_refused() -> None:
    """Somebody put the signing key where it would be published."""
    key = ed25519.Ed25519PrivateKey.generate()
    secret = base64.urlsafe_b64encode(key.private_bytes_raw()).rstrip(b"=").decode()
    with pytest.raises(ConfigError):
        KeySet(json.dumps({"keys": [public_jwk(key.public_key()) | {"d": secret}]}).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": "HS256"},
        {"algorithm": "ES256"},
        {"keys": [{"kid": "../../x"}]},
        {"keys": [{"kid": 3}]},
        {"keys": [{"kid": "0123456789abcdef"}]},
        {"keys": [], "kid": "../../x"},
        {"issuer": None},
    ],
)
def test_an_issuer_file_that_was_changed_is_refused(own_workspace: Path, change: dict[str, Any]) -> None:
    path = own_workspace / "cloud" / "tokens" / "issuer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError):
        TokenIssuer.load(own_workspace / "cloud")


@pytest.fixture
def device(tmp_path: Path) -> tuple[Path, bytes]:
    path = tmp_path / "device.key"
    return path, public_key_of(make_csr(new_device_key(path), "cam-1", []))


def test_an_assertion_proves_the_device(device: tuple[Path, bytes]) -> None:
    path, public = device
    assertion = make_assertion(path, "cam-1", "cloud", NOW)
    assert read_assertion_subject(assertion) == "cam-1"
    verified = verify_assertion(assertion, public, "cloud", NOW + timedelta(seconds=59))
    assert verified.subject == "cam-1"
    assert verified.expires_at == NOW + timedelta(seconds=60)
    assert verified.jti != verify_assertion(make_assertion(path, "cam-1", "cloud", NOW), public, "cloud", NOW).jti


@pytest.mark.parametrize(
    ("audience", "later_s", "reason"),
    [("other", 0, "wrong-audience"), ("cloud", 66, "expired-token"), ("cloud", -31, "not-yet-valid-token")],
)
def test_an_assertion_at_the_wrong_place_or_time_is_refused(
    device: tuple[Path, bytes], audience: str, later_s: int, reason: str
) -> None:
    path, public = device
    assertion = make_assertion(path, "cam-1", "cloud", NOW)
    with pytest.raises(IdentityError) as refusal:
        verify_assertion(assertion, public, audience, NOW + timedelta(seconds=later_s))
    assert refusal.value.reason == reason


def test_an_assertion_of_another_device_is_refused(device: tuple[Path, bytes], tmp_path: Path) -> None:
    new_device_key(tmp_path / "eve.key")
    forged = make_assertion(tmp_path / "eve.key", "cam-1", "cloud", NOW)
    with pytest.raises(IdentityError) as refusal:
        verify_assertion(forged, device[1], "cloud", NOW)
    assert refusal.value.reason == "wrong-signature"


def test_an_assertion_needs_a_p256_key(device: tuple[Path, bytes]) -> None:
    other = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for wrong in (pem, b"nonsense"):
        with pytest.raises(ConfigError):
            verify_assertion(make_assertion(device[0], "cam-1", "cloud", NOW), wrong, "cloud", NOW)
