"""The port behind which private keys sign tokens and assertions, and the one that keeps them in files.

Whoever signs asks for a signature and never sees a key, so a TPM or a PKCS#11 token can take the file's place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from security.jws import PublicKey
from security.keyfiles import PrivateKey, load_private_key

EDDSA: Final = "EdDSA"  # over Ed25519
ES256: Final = "ES256"  # ECDSA over P-256 with SHA-256
ALGORITHMS: Final = (EDDSA, ES256)
_COORDINATE_BYTES: Final = 32  # of P-256


class Signer(Protocol):
    """Something that holds a private key and signs with it."""

    @property
    def algorithm(self) -> str:
        """Return what it signs with, as a token's header names it (RFC 7518, RFC 8037)."""
        ...

    @property
    def public_key(self) -> PublicKey:
        """Return the public half."""
        ...

    def sign(self, data: bytes) -> bytes:
        """Return the signature as it stands in a token."""
        ...


class FileSigner:
    """Signs with a private key in a file.

    Args:
        path: PKCS#8 PEM; Ed25519 signs EdDSA, ECDSA P-256 signs ES256.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._key = load_private_key(path)

    @property
    def algorithm(self) -> str:
        """Return what the kind of key is for."""
        return EDDSA if isinstance(self._key, ed25519.Ed25519PrivateKey) else ES256

    @property
    def public_key(self) -> PublicKey:
        """Return the public half."""
        return self._key.public_key()

    def sign(self, data: bytes) -> bytes:
        """Return the signature as it stands in a token."""
        if isinstance(self._key, ed25519.Ed25519PrivateKey):
            return self._key.sign(data)
        r, s = decode_dss_signature(self._key.sign(data, ec.ECDSA(SHA256())))
        return r.to_bytes(_COORDINATE_BYTES, "big") + s.to_bytes(_COORDINATE_BYTES, "big")  # RFC 7518 section 3.4


def new_key(algorithm: str) -> PrivateKey:
    """Return a new private key for one of `ALGORITHMS`."""
    if algorithm == ES256:
        return ec.generate_private_key(ec.SECP256R1())
    return ed25519.Ed25519PrivateKey.generate()
