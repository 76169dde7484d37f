"""Sealed boxes: what this device wrote, unreadable without its key, and noticed when it was altered.

AES-256-GCM with a random nonce for each box (NIST SP 800-38D, 8.2.2: good for 2^32 boxes of one key). A box is bound
to a context, such as the name of its file, and opens in no other. The key is 32 random bytes in a file of mode 0600,
made on the device once; the two keys that are used come from it by HKDF.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Final

import structlog
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edge.store import write_atomically
from isthmus.errors import ConfigError, TrustError

KEY_BYTES: Final = 32
OVERHEAD: Final = 28  # bytes that a box is longer than what it holds: nonce and tag
_NONCE_BYTES: Final = 12

log = structlog.get_logger(__name__)


class Sealer:
    """Seals and opens boxes.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(_derive(key, b"seal"))
        self._tag_key = _derive(key, b"tag")

    def seal(self, data: bytes, context: bytes) -> bytes:
        """Return a box that opens in this context only."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, data, context)

    def open(self, box: bytes, context: bytes) -> bytes:
        """Return what was sealed.

        Raises:
            TrustError: It was sealed with another key or for another context, or was altered.
        """
        if len(box) < OVERHEAD:
            raise TrustError(f"sealed box: expected at least {OVERHEAD} bytes, got {len(box)}", reason="damaged")
        try:
            return self._aead.decrypt(box[:_NONCE_BYTES], box[_NONCE_BYTES:], context)
        except InvalidTag as error:
            raise TrustError("sealed box: altered, or sealed with another key", reason="damaged") from error

    def tag(self, data: bytes) -> bytes:
        """Return 16 bytes that only this key makes of `data`, always the same."""
        return hmac.new(self._tag_key, data, hashlib.sha256).digest()[:16]


def load_key(path: Path) -> bytes:
    """Return the key in the file; make it when there is none.

    A file that holds no key is moved aside, since serving comes first; what the lost key sealed cannot be read again.

    Raises:
        ConfigError: The file cannot be read or written.
    """
    try:
        if path.exists():
            key = path.read_bytes()
            if len(key) == KEY_BYTES:
                return key
            log.error("key of deferred requests is damaged; a new one is made", file=str(path), length=len(key))
            path.replace(path.with_name(f"{path.name}.damaged"))
        key = secrets.token_bytes(KEY_BYTES)
        write_atomically(path, key, mode=0o600)
    except OSError as error:
        raise ConfigError(
            f"defer_key: cannot use {path}: {error.strerror}", hint="expected a file in a folder that can be written"
        ) from error
    return key


def _derive(key: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=b"isthmus deferred: " + purpose).derive(key)
