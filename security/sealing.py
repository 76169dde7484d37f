"""The gateway's keys for sealed inputs: made and signed in the workspace, used by the cloud, known to devices.

    cloud/sealing/ID.key         X25519 private keys; the cloud opens with any of them
    cloud/sealing/sealing.json   the public keys, newest first, signed with the authority's key
    trust/sealing.json           the same, to start from

Only the operator's machine, which has the authority's key, can make a key known. A rotation puts a new key first and
keeps the others: what was sealed for them, and waits on a device, still opens. Dropping them ends that: the cloud opens
with the keys that its document lists, whatever other files lie there. The operator's machine need not have the older
private keys, which are on the cloud's.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from isthmus.envelopes import KEYS_FILE, SealingKeys, keys_statement, parse_keys
from isthmus.errors import ConfigError
from security.keyfiles import create_secret, load_ec_key, make_private_folder, read_file, replace_file

FOLDER: Final = "sealing"
_HINT: Final = "isthmus keys sealing rotate DIR makes a key, on the machine with the workspace's operator folder"


@dataclass(frozen=True, slots=True)
class GatewayKeys:
    """What a gateway has: the signed document that it hands out, and the private keys by id."""

    document: bytes
    private: Mapping[str, x25519.X25519PrivateKey]


def rotate_sealing_keys(
    root: Path, now: datetime, *, drop_older: bool = False, authority_key: Path | None = None
) -> SealingKeys:
    """Make a key in a workspace and put it first.

    Args:
        root: The workspace, with operator/ and trust/; cloud/ is made when it has been moved away.
        now: The time.
        drop_older: Whether older keys end: what was sealed for them does not open any more.
        authority_key: Key of the authority in trust/ca.pem, where that is not the workspace's own.

    Raises:
        ConfigError: The workspace lacks the authority's key.
        TrustError: The key is not the one of trust/ca.pem, or the keys there are not signed by it.
    """
    authority = load_ec_key(authority_key or root / "operator" / "ca.key")
    folder, ca = root / "cloud" / FOLDER, read_file(root / "trust" / "ca.pem")
    known = root / "trust" / KEYS_FILE
    before = parse_keys(known.read_bytes(), ca) if known.exists() else None
    make_private_folder(root / "cloud")
    make_private_folder(folder)
    key_id, key = secrets.token_hex(8), x25519.X25519PrivateKey.generate()
    rows = [(key_id, key.public_key())]
    if before is not None and not drop_older:
        rows += [(old.id, old.public) for old in before.keys]
    document = _signed(1 if before is None else before.number + 1, rows, now, authority)
    keys = parse_keys(document, ca)
    create_secret(folder / f"{key_id}.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    replace_file(folder / KEYS_FILE, document)
    replace_file(root / "trust" / KEYS_FILE, document)
    kept = {row[0] for row in rows}
    for path in folder.glob("*.key"):
        if path.stem not in kept:
            path.unlink()
    return keys


def load_gateway_keys(home: Path) -> GatewayKeys | None:
    """Return the keys in a cloud's folder; None where the workspace has none, so that nothing can be sealed for it.

    Raises:
        ConfigError: A key is damaged.
    """
    folder = home / FOLDER
    if not (folder / KEYS_FILE).exists():
        return None
    document = read_file(folder / KEYS_FILE, hint=_HINT)
    private: dict[str, x25519.X25519PrivateKey] = {}
    for path in sorted(folder.glob("*.key")):
        if path.stem not in _listed(document):
            continue
        try:
            key = load_pem_private_key(read_file(path, hint=_HINT), None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{path}: expected an X25519 private key", hint=_HINT) from error
        if not isinstance(key, x25519.X25519PrivateKey):
            raise ConfigError(f"{path}: expected an X25519 private key", hint=_HINT)
        private[path.stem] = key
    return GatewayKeys(document, private)


def _listed(document: bytes) -> set[str]:
    """Return the ids of the keys in a document; whoever seals checks its signature, the cloud has it from the operator.

    Raises:
        ConfigError: It is no such document.
    """
    try:
        return {str(key["id"]) for key in json.loads(document)["keys"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{KEYS_FILE}: expected the signed sealing keys", hint=_HINT) from error


def _signed(
    number: int,
    rows: Sequence[tuple[str, x25519.X25519PublicKey]],
    now: datetime,
    authority: ec.EllipticCurvePrivateKey,
) -> bytes:
    told = {
        "number": number,
        "signed_at": now.isoformat(timespec="seconds"),
        "keys": [
            {"id": key_id, "x25519": base64.b64encode(public.public_bytes_raw()).decode()} for key_id, public in rows
        ],
    }
    signature = authority.sign(keys_statement(told), ec.ECDSA(SHA256()))
    return json.dumps(told | {"signature": base64.b64encode(signature).decode()}, indent=2).encode() + b"\n"
