"""The public keys that verify access tokens, as a JSON Web Key Set (RFC 7517, RFC 8037).

Keys rotate with overlap: a new key is added to the set before the first token is signed with it, and an old one is
removed after its last token expired. A key's id is the start of its RFC 7638 thumbprint, so no two keys share one.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from isthmus.errors import ConfigError, IdentityError

ALGORITHM: Final = "EdDSA"
_MAX_KEYS: Final = 32


class KeySet:
    """Ed25519 public keys by their ids.

    Raises:
        ConfigError: The JSON is no key set, or holds a key of another kind or a private one.
    """

    def __init__(self, jwks: bytes) -> None:
        self._keys = dict(_parse(entry) for entry in _entries(jwks))

    def key(self, kid: object) -> ed25519.Ed25519PublicKey:
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


def public_jwk(key: ed25519.Ed25519PublicKey) -> dict[str, str]:
    """Return the key as an entry of a key set."""
    raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    x = base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
    return {"kty": "OKP", "crv": "Ed25519", "x": x, "use": "sig", "alg": ALGORITHM, "kid": key_id(x)}


def key_id(x: str) -> str:
    """Return the id of an Ed25519 key: the first 16 hexadecimal digits of its RFC 7638 thumbprint."""
    members = json.dumps({"crv": "Ed25519", "kty": "OKP", "x": x}, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(members.encode()).hexdigest()[:16]


def _entries(jwks: bytes) -> list[Mapping[str, Any]]:
    try:
        entries = json.loads(jwks)["keys"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError("expected a JSON Web Key Set with a list of keys") from error
    if not isinstance(entries, list) or not 0 < len(entries) <= _MAX_KEYS:
        raise ConfigError(f"expected a JSON Web Key Set of 1 to {_MAX_KEYS} keys")
    return entries


def _parse(entry: Mapping[str, Any]) -> tuple[str, ed25519.Ed25519PublicKey]:
    try:
        kid, private = entry["kid"], "d" in entry
        key = jwt.PyJWK(dict(entry), algorithm=ALGORITHM).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError) as error:
        raise ConfigError("expected Ed25519 public keys with a kid in the key set") from error
    if private or not isinstance(kid, str) or not isinstance(key, ed25519.Ed25519PublicKey):
        raise ConfigError("expected Ed25519 public keys with a kid in the key set")
    return kid, key
