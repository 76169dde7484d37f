"""Assertions: how a device proves who it is when it asks for an access token (RFC 7523).

A device signs a JWT with the key of its certificate (ES256): `iss` and `sub` are the device, `aud` is the cloud, it
lives for a minute, and its `jti` lets the cloud accept it once. The cloud reads the subject without trust, to look up
the device's public key, and then verifies everything.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from isthmus.errors import ConfigError
from security.jws import assemble, check_times, instant, read_header, refuse, text_claim, verified_claims, whole_seconds
from security.signer import ES256 as ALGORITHM
from security.signer import FileSigner

TYPE: Final = "isthmus-assertion+jwt"
LIFETIME: Final = timedelta(seconds=60)
_REQUIRED: Final = ("iss", "sub", "aud", "exp", "nbf", "iat", "jti")


@dataclass(frozen=True, slots=True)
class Assertion:
    """What a verified assertion says; its `jti` must not be accepted again before `expires_at`."""

    subject: str
    jti: str
    expires_at: datetime


def make_assertion(key_path: Path, device_id: str, audience: str, now: datetime) -> str:
    """Return an assertion signed with the device's key.

    Raises:
        ConfigError: The key file does not hold an ECDSA P-256 key.
    """
    issued = int(now.timestamp())
    claims = {
        "iss": device_id,
        "sub": device_id,
        "aud": audience,
        "iat": issued,
        "nbf": issued,
        "exp": issued + int(LIFETIME.total_seconds()),
        "jti": uuid.uuid4().hex,
    }
    signer = FileSigner(key_path)
    if signer.algorithm != ALGORITHM:
        raise ConfigError(f"{key_path}: expected an ECDSA P-256 private key")
    return assemble({"alg": ALGORITHM, "typ": TYPE}, claims, signer.sign)


def read_assertion_subject(assertion: str) -> str:
    """Return whom the assertion claims to be from, NOT verified: only to look up the key for `verify_assertion`.

    Raises:
        IdentityError: It is no assertion.
    """
    read_header(assertion, algorithm=ALGORITHM, kind=TYPE, names=("alg", "typ"))
    try:
        claims = jwt.decode(assertion, options={"verify_signature": False})
    except jwt.PyJWTError as error:
        raise refuse("the assertion is malformed", "malformed-token") from error
    if "sub" not in claims:
        raise refuse("the assertion lacks the claim sub", "missing-claim")
    return text_claim(claims, "sub")


def verify_assertion(assertion: str, public_key_pem: bytes, audience: str, now: datetime) -> Assertion:
    """Return what the assertion says when the device's key signed it, for us, within the last minute.

    Args:
        assertion: The assertion as it came.
        public_key_pem: The public key of the device that `read_assertion_subject` named.
        audience: Whom the assertion must be for.
        now: The time.

    Raises:
        IdentityError: Anything about it is wrong.
        ConfigError: The public key is not ECDSA P-256.
    """
    read_header(assertion, algorithm=ALGORITHM, kind=TYPE, names=("alg", "typ"))
    subject = read_assertion_subject(assertion)
    claims = verified_claims(
        assertion,
        _load_public_key(public_key_pem),
        algorithm=ALGORITHM,
        issuer=subject,
        audience=audience,
        required=_REQUIRED,
    )
    check_times(claims, now.timestamp())
    if whole_seconds(claims, "exp") - whole_seconds(claims, "iat") > LIFETIME.total_seconds():
        raise refuse(f"an assertion lives at most {LIFETIME.total_seconds():.0f} s", "malformed-token")
    return Assertion(subject, text_claim(claims, "jti", longest=128), instant(whole_seconds(claims, "exp")))


def _load_public_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = load_pem_public_key(pem)
    except ValueError as error:
        raise ConfigError("expected a PEM public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError("expected an ECDSA P-256 public key")
    return key
