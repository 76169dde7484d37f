"""API keys, for plain clients that cannot renew a token: `isk_PREFIX_SECRET`, sent as a bearer token.

A key is made once and shown once; what is kept is its SHA-256. A slow password hash would add nothing: the secret is
256 random bits, so nobody finds it by trying, and a fast hash keeps the check of a request within a microsecond.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import Final

SCHEME: Final = "isk_"
_ALPHABET: Final = "abcdefghijkmnpqrstuvwxyz23456789"  # of prefixes, which people read to each other
_PREFIX_LENGTH: Final = 10
_KEY: Final = re.compile(r"isk_[a-km-np-z2-9]{10}_[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key; `prefix` names it in lists and logs."""

    prefix: str
    digest: bytes
    tenant: str
    name: str
    expires_at: float  # Unix seconds


def new_api_key() -> tuple[str, str]:
    """Return a new key and its prefix."""
    prefix = "".join(secrets.choice(_ALPHABET) for _ in range(_PREFIX_LENGTH))
    return f"{SCHEME}{prefix}_{secrets.token_urlsafe(32)}", prefix


def is_api_key(text: str) -> bool:
    """Return whether this has the form of a key."""
    return _KEY.fullmatch(text) is not None


def prefix_of(key: str) -> str:
    """Return the prefix of a text that has the form of a key."""
    return key.removeprefix(SCHEME)[:_PREFIX_LENGTH]


def key_digest(key: str) -> bytes:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
