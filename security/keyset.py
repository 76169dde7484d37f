"""The public keys that verify access tokens, as a JSON Web Key Set (RFC 7517, RFC 7518, RFC 8037).

Keys rotate with overlap: a new key is added to the set before the first token is signed with it, and an old one is
removed after its last token expired. A key's id is the start of its RFC 7638 thumbprint, so no two keys share one.
All keys of a set are of one algorithm, and so the set, which is configuration, says which one tokens are signed with.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from isthmus.errors import ConfigError, IdentityError
from security.jws import PublicKey
from security.signer import ALGORITHMS, EDDSA, ES256

MAX_KEYS: Final = 32
_EXPECTED: Final = "expected Ed25519 or P-256 public keys with alg and kid in the key set"


class KeySet:
    """Public keys of one algorithm, by their ids.

    Raises:
        ConfigError: The JSON is no key set, or holds a key of another kind or a private one.
    """

    def __init__(self, jwks: bytes) -> None:
        parsed = [_parse(entry) for entry in _entries(jwks)]
        self._keys = {kid: key for kid, _, key in parsed}
        algorithms = {algorithm for _, algorithm, _ in parsed}
        if len(algorithms) != 1:
            raise ConfigError("expected keys of one algorithm in the key set")
        self.algorithm = algorithms.pop()

    def key(self, kid: object) -> PublicKey:
        """Return the key with this id.

        Raises:
            IdentityError: There is none.
        """
        key = self._keys.get(kid) if isinstance(kid, str) else None
        if key is None:
            raise IdentityError(
                "the token is signed with a key that is not known here",
                reason="unknown-key",
                hint="mint one with this cloud's own folder: isthmus token mint --home DIR/cloud",
            )
        return key


def public_jwk(key: PublicKey) -> dict[str, str]:
    """Return the key as an entry of a key set."""
    if isinstance(key, ed25519.Ed25519PublicKey):
        members = {"crv": "Ed25519", "kty": "OKP", "x": _b64(key.public_bytes(Encoding.Raw, PublicFormat.Raw))}
        algorithm = EDDSA
    else:
        point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
        half = len(point) // 2
        members = {"crv": "P-256", "kty": "EC", "x": _b64(point[:half]), "y": _b64(point[half:])}
        algorithm = ES256
    return {**members, "use": "sig", "alg": algorithm, "kid": _key_id(members)}


def _key_id(members: Mapping[str, str]) -> str:
    """Return the first 16 hexadecimal digits of the RFC 7638 thumbprint."""
    text = json.dumps(members, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _entries(jwks: bytes) -> list[Mapping[str, Any]]:
    try:
        entries = json.loads(jwks)["keys"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError("expected a JSON Web Key Set with a list of keys") from error
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_KEYS:
        raise ConfigError(f"expected a JSON Web Key Set of 1 to {MAX_KEYS} keys")
    return entries


def _parse(entry: Mapping[str, Any]) -> tuple[str, str, PublicKey]:
    try:
        kid, algorithm, private = entry["kid"], entry.get("alg", EDDSA), "d" in entry
        if algorithm not in ALGORITHMS:
            raise ConfigError(_EXPECTED)
        key = jwt.PyJWK(dict(entry), algorithm=algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(_EXPECTED) from error
    is_p256 = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    fits = isinstance(key, ed25519.Ed25519PublicKey) if algorithm == EDDSA else is_p256
    if private or not isinstance(kid, str) or not fits:
        raise ConfigError(_EXPECTED)
    return kid, algorithm, key
