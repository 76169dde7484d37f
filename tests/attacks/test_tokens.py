"""Forged, stolen and stretched tokens. Each starts from the claims of a good one and changes one thing."""

import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from isthmus.errors import IdentityError
from security.assertions import TYPE as ASSERTION_TYPE
from security.enrolment import make_csr, new_device_key, public_key_of
from security.keyfiles import load_ec_key, load_ed25519_key
from security.keyset import public_jwk
from security.tokens import TokenIssuer, create_token_issuer, make_assertion, read_assertion_subject, verify_assertion

NOW = datetime(2030, 1, 1, 12, 0, 0, tzinfo=UTC)
SECONDS = int(NOW.timestamp())
CLAIMS = ("iss", "aud", "sub", "exp", "nbf", "iat", "jti", "scope", "models")


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cloud")
    create_token_issuer(folder / "tokens", issuer="isthmus://acme/tokens", audience="isthmus://acme/cloud")
    return folder


@pytest.fixture(scope="module")
def issuer(cloud: Path) -> TokenIssuer:
    return TokenIssuer.load(cloud)


@pytest.fixture(scope="module")
def key(cloud: Path, issuer: TokenIssuer) -> ed25519.Ed25519PrivateKey:
    """The real signing key: what only the issuer can make must be refused, too, when it is not what it should be."""
    return load_ed25519_key(cloud / "tokens" / f"{issuer.kid}.key")


@pytest.fixture
def good(issuer: TokenIssuer) -> dict[str, Any]:
    token, _ = issuer.mint("ann", "client", models=["triage"], ttl=timedelta(hours=1), now=NOW)
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims


@pytest.fixture
def header(issuer: TokenIssuer) -> dict[str, Any]:
    return {"alg": "EdDSA", "kid": issuer.kid, "typ": "at+jwt"}


def _refusal(issuer: TokenIssuer, token: str) -> str:
    with pytest.raises(IdentityError) as refusal:
        issuer.verifier(clock=NOW.timestamp).verify(token)
    assert len(token) < 20 or token[-20:] not in refusal.value.message
    return refusal.value.reason


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _assemble(header: dict[str, Any], claims: Any, sign: Any = lambda _: b"") -> str:
    """Put a token together by hand, with libraries that would refuse to out of the way."""
    text = f"{_b64(json.dumps(header).encode())}.{_b64(json.dumps(claims).encode())}"
    return f"{text}.{_b64(sign(text.encode()))}"


def test_the_hand_made_token_is_good_when_nothing_is_changed(
    issuer: TokenIssuer, header: dict[str, Any], good: dict[str, Any], key: ed25519.Ed25519PrivateKey
) -> None:
    """Without this, every refusal below could be for the wrong reason."""
    assert issuer.verifier(clock=NOW.timestamp).verify(_assemble(header, good, key.sign)).subject == "ann"


@pytest.mark.parametrize("name", ["none", "None", "NONE", "nOnE", "", None])
def test_alg_none(issuer: TokenIssuer, header: dict[str, Any], good: dict[str, Any], name: str | None) -> None:
    assert _refusal(issuer, _assemble(header | {"alg": name}, good)) == "wrong-algorithm"


def test_no_signature(issuer: TokenIssuer, header: dict[str, Any], good: dict[str, Any]) -> None:
    assert _refusal(issuer, _assemble(header, good)) == "wrong-signature"


@pytest.mark.parametrize("form", ["raw", "pem", "jwk"])
def test_hs256_with_the_public_key_as_secret(
    issuer: TokenIssuer, header: dict[str, Any], good: dict[str, Any], key: ed25519.Ed25519PrivateKey, form: str
) -> None:
    public = key.public_key()
    secret = {
        "raw": public.public_bytes(Encoding.Raw, PublicFormat.Raw),
        "pem": public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "jwk": json.dumps(public_jwk(public)).encode(),
    }[form]
    token = _assemble(header | {"alg": "HS256"}, good, lambda text: hmac.digest(secret, text, hashlib.sha256))
    assert _refusal(issuer, token) == "wrong-algorithm"


def test_another_algorithm_with_a_key_of_ones_own(
    issuer: TokenIssuer, header: dict[str, Any], good: dict[str, Any]
) -> None:
    token = jwt.encode(good, ec.generate_private_key(ec.SECP256R1()), "ES256", headers=header | {"alg": "ES256"})
    assert _refusal(issuer, token) == "wrong-algorithm"


def test_a_wrong_key_under_a_known_kid(issuer: TokenIssuer, header: dict[str, Any], good: dict[str, Any]) -> None:
    forged = _assemble(header, good, ed25519.Ed25519PrivateKey.generate().sign)
    assert _refusal(issuer, forged) == "wrong-signature"


@pytest.mark.parametrize("kid", ["0123456789abcdef", "", "../../../dev/null", None, 1, ["x"], {"a": 1}])
def test_an_unknown_kid(issuer: TokenIssuer, header: dict[str, Any], good: dict[str, Any], kid: Any) -> None:
    own = ed25519.Ed25519PrivateKey.generate()
    reason = _refusal(issuer, _assemble(header | {"kid": kid}, good, own.sign))
    assert reason in {"unknown-key", "malformed-token"}


@pytest.mark.parametrize("name", ["jku", "jwk", "x5u", "x5c", "x5t#S256", "crit", "b64", "zip", "cty"])
@pytest.mark.parametrize("signed_by", ["attacker", "issuer"])
def test_a_header_that_brings_its_own_key_or_more(
    issuer: TokenIssuer,
    header: dict[str, Any],
    good: dict[str, Any],
    key: ed25519.Ed25519PrivateKey,
    name: str,
    signed_by: str,
) -> None:
    own = ed25519.Ed25519PrivateKey.generate()
    values: dict[str, Any] = {
        "jku": "https://attacker.example/jwks.json",
        "x5u": "https://attacker.example/chain.pem",
        "jwk": public_jwk(own.public_key()),
        "crit": ["b64"],
        "b64": False,
    }
    token = _assemble(header | {name: values.get(name, "x")}, good, (own if signed_by == "attacker" else key).sign)
    assert _refusal(issuer, token) == "malformed-token"


def test_a_header_without_kid(
    issuer: TokenIssuer, header: dict[str, Any], good: dict[str, Any], key: ed25519.Ed25519PrivateKey
) -> None:
    del header["kid"]
    assert _refusal(issuer, _assemble(header, good, key.sign)) == "malformed-token"


@pytest.mark.parametrize("kind", ["JWT", ASSERTION_TYPE, "", None])
def test_a_token_of_another_type(
    issuer: TokenIssuer,
    header: dict[str, Any],
    good: dict[str, Any],
    key: ed25519.Ed25519PrivateKey,
    kind: str | None,
) -> None:
    assert _refusal(issuer, _assemble(header | {"typ": kind}, good, key.sign)) == "malformed-token"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"exp": SECONDS - 5}, "expired-token"),
        ({"exp": 0}, "expired-token"),
        ({"nbf": SECONDS + 31}, "not-yet-valid-token"),
        ({"iat": SECONDS + 31}, "not-yet-valid-token"),
        ({"aud": "isthmus://eve/cloud"}, "wrong-audience"),
        ({"aud": ["isthmus://acme/cloud", "isthmus://eve/cloud"]}, "wrong-audience"),
        ({"aud": "isthmus://acme/cloud "}, "wrong-audience"),
        ({"iss": "isthmus://eve/tokens"}, "wrong-issuer"),
        ({"iss": ["isthmus://acme/tokens"]}, "wrong-issuer"),
        ({"exp": "9999999999"}, "malformed-token"),
        ({"exp": 9999999999.5}, "malformed-token"),
        ({"exp": True}, "malformed-token"),
        ({"exp": 10**30}, "malformed-token"),
        ({"exp": float("inf")}, "malformed-token"),
        ({"nbf": -1}, "malformed-token"),
        ({"sub": ""}, "malformed-token"),
        ({"sub": 3}, "malformed-token"),
        ({"sub": "a" * 257}, "malformed-token"),
        ({"jti": ""}, "malformed-token"),
        ({"jti": 3}, "malformed-token"),
        ({"scope": ["fleet:admin"]}, "malformed-token"),
        ({"scope": ""}, "malformed-token"),
        ({"models": "*"}, "malformed-token"),
        ({"models": [1]}, "malformed-token"),
        ({"models": {"*": True}}, "malformed-token"),
    ],
)
def test_a_wrong_claim_even_when_the_issuer_signed_it(
    issuer: TokenIssuer,
    header: dict[str, Any],
    good: dict[str, Any],
    key: ed25519.Ed25519PrivateKey,
    change: dict[str, Any],
    reason: str,
) -> None:
    assert _refusal(issuer, _assemble(header, good | change, key.sign)) == reason


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("how", ["left out", "null"])
def test_a_missing_claim(
    issuer: TokenIssuer,
    header: dict[str, Any],
    good: dict[str, Any],
    key: ed25519.Ed25519PrivateKey,
    claim: str,
    how: str,
) -> None:
    if how == "null":
        good[claim] = None
    else:
        del good[claim]
    assert _refusal(issuer, _assemble(header, good, key.sign)) == "missing-claim"


@pytest.mark.parametrize(
    "change",
    [{"scope": "infer fleet:admin registry:publish"}, {"models": ["*"]}, {"sub": "root"}, {"exp": SECONDS + 10**6}],
)
def test_a_stretched_claim_under_the_old_signature(
    issuer: TokenIssuer, good: dict[str, Any], header: dict[str, Any], key: ed25519.Ed25519PrivateKey, change: Any
) -> None:
    signature = _assemble(header, good, key.sign).split(".")[2]
    text = _assemble(header, good | change).rsplit(".", 1)[0]
    assert _refusal(issuer, f"{text}.{signature}") == "wrong-signature"


def test_claims_given_twice_do_not_get_around_the_signature(
    issuer: TokenIssuer, good: dict[str, Any], header: dict[str, Any], key: ed25519.Ed25519PrivateKey
) -> None:
    honest = _assemble(header, good, key.sign).split(".")
    twice = json.dumps(good)[:-1] + ', "scope": "fleet:admin"}'
    assert _refusal(issuer, f"{honest[0]}.{_b64(twice.encode())}.{honest[2]}") == "wrong-signature"


def test_any_flipped_bit_of_a_token_is_noticed(issuer: TokenIssuer) -> None:
    token, _ = issuer.mint("ann", "client", ttl=timedelta(hours=1), now=NOW)
    verifier = issuer.verifier(clock=NOW.timestamp)
    verifier.verify(token)  # remembered: a neighbour must not profit from it
    for position in range(len(token)):
        changed = token[:position] + chr(ord(token[position]) ^ 1) + token[position + 1 :]
        with pytest.raises(IdentityError):
            verifier.verify(changed)


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("", "missing-token"),
        ("a", "malformed-token"),
        ("a.b", "malformed-token"),
        ("..", "malformed-token"),
        ("a.b.c.d", "malformed-token"),
        ("é.é.é", "malformed-token"),
        ("A" * 8193, "malformed-token"),
        ("e30.e30.e30", "wrong-algorithm"),
        ("W10.W10.W10", "malformed-token"),
        (f"{_b64(b'[' * 3000)}.e30.e30", "malformed-token"),
        (f"{_b64(bytes([0xFF, 0xFE]))}.e30.e30", "malformed-token"),
    ],
)
def test_garbage(issuer: TokenIssuer, token: str, reason: str) -> None:
    assert _refusal(issuer, token) == reason


def test_a_token_over_8_kib_even_when_signed(
    issuer: TokenIssuer, header: dict[str, Any], good: dict[str, Any], key: ed25519.Ed25519PrivateKey
) -> None:
    assert _refusal(issuer, _assemble(header, good | {"models": ["m" * 6200]}, key.sign)) == "malformed-token"


@pytest.mark.parametrize("payload", [[], "text", 3, None])
def test_a_payload_that_is_no_object(
    issuer: TokenIssuer, header: dict[str, Any], key: ed25519.Ed25519PrivateKey, payload: Any
) -> None:
    assert _refusal(issuer, _assemble(header, payload, key.sign)) == "malformed-token"


@pytest.fixture
def device_key(tmp_path: Path) -> Path:
    new_device_key(tmp_path / "device.key")
    return tmp_path / "device.key"


def _refused_assertion(assertion: str, device_key: Path) -> str:
    public = public_key_of(make_csr(load_ec_key(device_key), "", []))
    with pytest.raises(IdentityError) as refusal:
        verify_assertion(assertion, public, "cloud", NOW)
    return refusal.value.reason


def test_an_assertion_is_no_access_token(issuer: TokenIssuer, device_key: Path) -> None:
    assert _refusal(issuer, make_assertion(device_key, "cam-1", issuer.audience, NOW)) == "wrong-algorithm"


def test_an_access_token_is_no_assertion(issuer: TokenIssuer, device_key: Path) -> None:
    token, _ = issuer.mint("cam-1", "device", ttl=timedelta(hours=1), now=NOW)
    assert _refused_assertion(token, device_key) == "wrong-algorithm"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"exp": SECONDS + 3600}, "malformed-token"),  # would be replayable for an hour
        ({"iss": "cam-2"}, "wrong-issuer"),
        ({"sub": ""}, "malformed-token"),
        ({"jti": "j" * 129}, "malformed-token"),
        ({"jti": None}, "missing-claim"),
        ({"exp": None}, "missing-claim"),
        ({"aud": ["cloud"]}, "wrong-audience"),
    ],
)
def test_an_assertion_with_a_wrong_claim(device_key: Path, change: dict[str, Any], reason: str) -> None:
    claims = {"iss": "cam-1", "sub": "cam-1", "aud": "cloud", "iat": SECONDS, "nbf": SECONDS, "exp": SECONDS + 60}
    token = jwt.encode(
        claims | {"jti": "j"} | change, load_ec_key(device_key), "ES256", headers={"typ": ASSERTION_TYPE}
    )
    assert _refused_assertion(token, device_key) == reason


def test_an_assertion_with_alg_none_or_a_key_of_its_own(device_key: Path) -> None:
    claims = {"iss": "cam-1", "sub": "cam-1", "aud": "cloud"}
    unsigned = _assemble({"alg": "none", "typ": ASSERTION_TYPE}, claims)
    assert _refused_assertion(unsigned, device_key) == "wrong-algorithm"
    own = ec.generate_private_key(ec.SECP256R1())
    brings = jwt.encode(claims, own, "ES256", headers={"typ": ASSERTION_TYPE, "jwk": {"kty": "EC"}})
    assert _refused_assertion(brings, device_key) == "malformed-token"


@pytest.mark.parametrize("assertion", ["", "a.b.c", "A" * 9000])
def test_garbage_as_assertion(assertion: str) -> None:
    with pytest.raises(IdentityError):
        read_assertion_subject(assertion)
