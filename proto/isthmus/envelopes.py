"""Envelopes: bytes that only the holder of one of the gateway's X25519 keys can read; and those keys as a document.

    "ISE1" | key id, 8 bytes | wrapped content key, 80 bytes | nonce, 12 bytes | AES-256-GCM ciphertext and tag

A content key is wrapped for the gateway's key by HPKE (RFC 9180, base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256,
AES-256-GCM). The ciphertext is bound to a context, a list of texts: in another context it does not open.

Public keys come as a document that the organisation's authority signs (`parse_keys`), so that nobody between, not even
one with a certificate for the cloud's name, can offer a key of its own. isthmus.sealed puts envelopes into requests.
"""

from __future__ import annotations

import base64
import json
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from isthmus.errors import InputError, TrustError

KEYS_FILE: Final = "sealing.json"
_KEYS_PREFIX: Final = b"isthmus-sealing-keys-v1\n"
_MAGIC: Final = b"ISE1"
_KEY_ID: Final = 8
_WRAPPED: Final = 80  # encapsulated key, 32 bytes of key, tag
_NONCE: Final = 12
_OVERHEAD: Final = len(_MAGIC) + _KEY_ID + _WRAPPED + _NONCE + 16
_CONTEXT: Final = b"isthmus-sealed-input-v1"
_INFO: Final = b"isthmus-sealed-key-v1"
_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


@dataclass(frozen=True, slots=True)
class SealingKey:
    """A public key of the gateway."""

    id: str  # 16 hexadecimal digits
    public: x25519.X25519PublicKey


@dataclass(frozen=True, slots=True)
class SealingKeys:
    """The gateway's public keys, as the authority signed them."""

    number: int  # grows with every change: older documents are not taken again
    keys: tuple[SealingKey, ...]  # the one to use first

    @property
    def current(self) -> SealingKey:
        """Return the key to seal with."""
        return self.keys[0]


def parse_keys(data: bytes, ca_pem: bytes) -> SealingKeys:
    """Return the public keys in a signed document.

    Args:
        data: The document, `sealing.json`.
        ca_pem: The authority's certificate, `ca.pem`.

    Raises:
        TrustError: It is no such document, or the authority did not sign it.
    """
    try:
        told = json.loads(data)
        signature = base64.b64decode(told.pop("signature"), validate=True)
        authority = x509.load_pem_x509_certificate(ca_pem).public_key()
        if not isinstance(authority, ec.EllipticCurvePublicKey):
            raise TypeError
        authority.verify(signature, keys_statement(told), ec.ECDSA(SHA256()))
        keys = tuple(
            SealingKey(str(key["id"]), x25519.X25519PublicKey.from_public_bytes(base64.b64decode(key["x25519"])))
            for key in told["keys"]
        )
        number = int(told["number"])
    except (ValueError, KeyError, TypeError, AttributeError, InvalidSignature, RecursionError) as error:
        raise TrustError(
            "the sealing keys were not signed by the authority in ca.pem",
            hint="isthmus keys sealing show says what the workspace has",
            reason="untrusted-sealing-keys",
        ) from error
    if not keys:
        raise TrustError("there is no sealing key", hint="isthmus keys sealing rotate DIR makes one")
    return SealingKeys(number, keys)


def keys_statement(told: Mapping[str, Any]) -> bytes:
    """Return the bytes that the authority signs: all of the document but the signature."""
    return _KEYS_PREFIX + json.dumps(told, sort_keys=True, separators=(",", ":")).encode()


class ContentKey:
    """A new key for what belongs together, such as the tensors of one request, wrapped for the gateway once.

    Args:
        key: The gateway's.
    """

    def __init__(self, key: SealingKey) -> None:
        content_key = secrets.token_bytes(32)
        self._key_id, self._aead = key.id, AESGCM(content_key)
        self._wrapped = _SUITE.encrypt(content_key, key.public, info=_INFO)

    def seal(self, data: bytes, context: Sequence[str]) -> bytes:
        """Return an envelope that opens in this context only."""
        nonce = secrets.token_bytes(_NONCE)
        sealed = self._aead.encrypt(nonce, data, _joined((self._key_id, *context)))
        return b"".join((_MAGIC, bytes.fromhex(self._key_id), self._wrapped, nonce, sealed))


class Opener:
    """Opens envelopes that belong together: each wrapped key is unwrapped once.

    Args:
        keys: The gateway's private keys, by id.
    """

    def __init__(self, keys: Mapping[str, x25519.X25519PrivateKey]) -> None:
        self._keys = keys
        self._unwrapped: dict[bytes, AESGCM] = {}

    def open(self, envelope: bytes, context: Sequence[str]) -> bytes:
        """Return what was sealed.

        Raises:
            InputError: It is malformed, for another key, or was altered or made for another context.
        """
        if len(envelope) < _OVERHEAD or not envelope.startswith(_MAGIC):
            raise InputError("a sealed input is not an envelope, or was cut short", reason="sealed-malformed")
        start = len(_MAGIC) + _KEY_ID
        nonce_at, sealed_at = start + _WRAPPED, start + _WRAPPED + _NONCE
        key_id = envelope[len(_MAGIC) : start].hex()
        private = self._keys.get(key_id)
        if private is None:
            raise InputError(
                f"a sealed input is for the key {key_id}, which this gateway does not have",
                hint="fetch the current sealing keys and seal it again",
                reason="sealed-unknown-key",
            )
        try:
            aead = self._unwrap(envelope[start:nonce_at], private)
            return aead.decrypt(envelope[nonce_at:sealed_at], envelope[sealed_at:], _joined((key_id, *context)))
        except (InvalidTag, ValueError) as error:
            raise InputError(
                "a sealed input does not open: it was altered, or made for another request, model or caller",
                hint="the request's id, model, tensor and the token's subject are those that it was sealed for",
                reason="sealed-not-openable",
            ) from error

    def _unwrap(self, wrapped: bytes, private: x25519.X25519PrivateKey) -> AESGCM:
        if wrapped not in self._unwrapped:
            self._unwrapped[wrapped] = AESGCM(_SUITE.decrypt(wrapped, private, info=_INFO))
        return self._unwrapped[wrapped]


def _joined(parts: Sequence[str]) -> bytes:
    """Return texts as bytes from which they can be told apart."""
    encoded = [part.encode() for part in parts]
    return _CONTEXT + b"".join(struct.pack(">I", len(part)) + part for part in encoded)
