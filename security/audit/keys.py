"""The Ed25519 key that signs checkpoints, and the public halves of all keys that ever did.

    audit.key   in the cloud's folder; signs
    audit.pub   public keys, PEM, the newest last; copy it to whoever verifies

It signs nothing else, and nothing else signs checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from isthmus.errors import ConfigError
from security.audit.records import key_id_of
from security.keyfiles import load_ed25519_key, read_file, replace_file, save_private_key

KEY: Final = "audit.key"
PUBLIC: Final = "audit.pub"
_BLOCK: Final = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)
_HINT: Final = "the cloud makes it when it starts; copy audit.pub from the cloud's folder to verify elsewhere"


def create_audit_key(home: Path) -> None:
    """Make the key of a cloud's folder.

    Raises:
        ConflictError: It has one.
    """
    key = ed25519.Ed25519PrivateKey.generate()
    save_private_key(home / KEY, key)
    _publish(home, key)


def load_audit_key(home: Path) -> ed25519.Ed25519PrivateKey:
    """Return the key; a folder of an older release, which has none, gets one.

    Raises:
        ConfigError: It cannot be read.
    """
    if not (home / KEY).exists():
        create_audit_key(home)
    key = load_ed25519_key(home / KEY)
    known = load_public_keys(home / PUBLIC) if (home / PUBLIC).exists() else {}
    if key_id_of(key.public_key()) not in known:  # a crash between the two files, or a key that was brought along
        _publish(home, key)
    return key


def rotate_audit_key(home: Path) -> str:
    """Replace the key; a cloud signs with the new one once it is restarted. Return the new key's id.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    old = load_ed25519_key(home / KEY)
    _publish(home, old)
    new = ed25519.Ed25519PrivateKey.generate()
    _publish(home, new)  # first: a key that signs is always known to whoever verifies
    beside = home / f"{KEY}.new"
    beside.unlink(missing_ok=True)
    save_private_key(beside, new)
    beside.replace(home / KEY)
    return key_id_of(new.public_key())


def load_public_keys(file: Path) -> Mapping[str, ed25519.Ed25519PublicKey]:
    """Return public keys by id.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    keys: dict[str, ed25519.Ed25519PublicKey] = {}
    for block in _BLOCK.findall(read_file(file, hint=_HINT)):
        try:
            key = load_pem_public_key(block)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{file}: expected PEM public keys", hint=_HINT) from error
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise ConfigError(f"{file}: expected Ed25519 public keys", hint=_HINT)
        keys[key_id_of(key)] = key
    if not keys:
        raise ConfigError(f"{file}: expected PEM public keys, found none", hint=_HINT)
    return keys


def _publish(home: Path, key: ed25519.Ed25519PrivateKey) -> None:
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    before = (home / PUBLIC).read_bytes() if (home / PUBLIC).exists() else b""
    if pem not in before:
        replace_file(home / PUBLIC, before + pem)
