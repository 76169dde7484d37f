"""One record of the audit log, as bytes: canonical form, hash, and the signed statement about a chain's newest record.

- A line is a JSON object with sorted keys, no spaces and ASCII only (control characters cannot forge a second line).
- `hash` is SHA-256 over a prefix and the canonical form of all other fields, `prev` among them: the hash of the record
  before it. So each hash speaks for everything up to its record.
- A head is (chain, sequence, hash, time) signed with Ed25519. It stands beside the chain for its newest record, and
  inside of it, as a checkpoint, for the record before the checkpoint.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519

from isthmus.errors import InputError, TrustError
from isthmus.logs import redact

GENESIS: Final = "0" * 64  # what the first record of a chain continues
CHECKPOINT: Final = "checkpoint"
EVENT: Final = "event"
MAX_LINE: Final = 16_384  # bytes
_MAX_TEXT: Final = 300  # characters of one value
_MAX_DETAILS: Final = 16
_RECORD_PREFIX: Final = b"isthmus-audit-record-v1\n"
_HEAD_PREFIX: Final = b"isthmus-audit-head-v1\n"
_HEAD_FIELDS: Final = ("at", "chain", "hash", "key", "seq")

Value = str | int


@dataclass(frozen=True, slots=True)
class Who:
    """The caller as the door saw it; empty where it is not known."""

    subject: str = ""
    tenant: str = ""
    token_id: str = ""
    thumbprint: str = ""
    peer: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    `decision` is allowed (about to run), done, failed or refused; `detail` says what the named fields do not.
    """

    action: str
    decision: str
    who: Who = Who()
    reason: str = ""
    model: str = ""
    version: int = 0
    device: str = ""
    rollout: str = ""
    request_id: str = ""
    detail: Mapping[str, Value] = field(default_factory=dict)

    def to_body(self) -> dict[str, Any]:
        """Return the fields of the record; what is empty is left out."""
        named: dict[str, Value] = {
            "action": self.action, "decision": self.decision, "reason": self.reason,
            "subject": self.who.subject, "tenant": self.who.tenant, "token_id": self.who.token_id,
            "thumbprint": self.who.thumbprint, "peer": self.who.peer,
            "model": self.model, "version": self.version, "device": self.device, "rollout": self.rollout,
            "request_id": self.request_id,
        }  # fmt: skip
        body: dict[str, Any] = {name: _safe(name, value) for name, value in named.items() if value}
        if self.detail:
            few = sorted(self.detail.items())[:_MAX_DETAILS]
            body["detail"] = {name[:64]: _safe(name, value) for name, value in few}
        return body | {"kind": EVENT}


@dataclass(frozen=True, slots=True)
class Link:
    """Where a chain ends: what the next record continues."""

    chain: str
    seq: int = -1  # of the newest record
    hash: str = GENESIS

    def extend(self, body: Mapping[str, Any], at: datetime) -> tuple[bytes, Link]:
        """Return the next record's line, without its end of line, and the chain's new end."""
        record = {**body, "at": moment(at), "chain": self.chain, "seq": self.seq + 1, "prev": self.hash}
        digest = hash_of(record)
        return canonical({**record, "hash": digest}), Link(self.chain, self.seq + 1, digest)


def moment(at: datetime) -> str:
    """Return a time as records and heads have it."""
    return at.astimezone(UTC).isoformat(timespec="microseconds")


def canonical(record: Mapping[str, Any]) -> bytes:
    """Return the one form in which this record may lie on the disk."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def hash_of(record: Mapping[str, Any]) -> str:
    """Return the hash of a record, its own field `hash` left out."""
    rest = {name: value for name, value in record.items() if name != "hash"}
    return hashlib.sha256(_RECORD_PREFIX + canonical(rest)).hexdigest()


def parse_line(line: bytes) -> dict[str, Any]:
    """Return a record.

    Raises:
        InputError: The line is not the canonical form of one, or its hash is not that of its fields.
    """
    try:
        record = json.loads(line) if len(line) <= MAX_LINE else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or canonical(record) != line:
        raise InputError("not the canonical form of a record", reason="malformed")
    if not isinstance(record.get("seq"), int) or not all(isinstance(record.get(n), str) for n in ("chain", "prev")):
        raise InputError("a record without chain, sequence or predecessor", reason="malformed")
    if record.get("hash") != hash_of(record):
        raise InputError("the record's hash is not that of its fields", reason="wrong-hash")
    return record


@dataclass(frozen=True, slots=True)
class Head:
    """A signed statement: at this time, the chain's record `seq` had this hash."""

    chain: str
    seq: int
    hash: str
    at: str
    key: str
    signature: str

    @property
    def link(self) -> Link:
        """Return what it speaks of."""
        return Link(self.chain, self.seq, self.hash)

    def to_json(self) -> bytes:
        """Return it as a file has it."""
        return canonical({name: getattr(self, name) for name in (*_HEAD_FIELDS, "signature")}) + b"\n"

    def to_body(self) -> dict[str, Any]:
        """Return it as the fields of a checkpoint, which continues the record that it speaks of."""
        return {"kind": CHECKPOINT, "key": self.key, "signature": self.signature, "signed_at": self.at}


def sign_head(link: Link, key: ed25519.Ed25519PrivateKey, at: datetime) -> Head:
    """Sign where a chain ends."""
    key_id = key_id_of(key.public_key())
    head = Head(link.chain, link.seq, link.hash, moment(at), key_id, "")
    signature = base64.b64encode(key.sign(_statement(head))).decode()
    return Head(head.chain, head.seq, head.hash, head.at, head.key, signature)


def head_of_checkpoint(record: Mapping[str, Any]) -> Head:
    """Return the statement in a checkpoint: it is about the record before."""
    return Head(
        str(record["chain"]),
        int(record["seq"]) - 1,
        str(record["prev"]),
        str(record.get("signed_at", "")),
        str(record.get("key", "")),
        str(record.get("signature", "")),
    )


def parse_head(data: bytes) -> Head:
    """Return the head in a file.

    Raises:
        TrustError: It holds none.
    """
    try:
        told = json.loads(data)
        texts = {name: told[name] for name in ("chain", "hash", "at", "key", "signature")}
        if not all(isinstance(value, str) for value in texts.values()) or type(told["seq"]) is not int:
            raise TypeError
        return Head(seq=told["seq"], **texts)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrustError("not the head of an audit chain", reason="forged-head") from error


def check_head(head: Head, keys: Mapping[str, ed25519.Ed25519PublicKey]) -> None:
    """Check a head's signature.

    Raises:
        TrustError: No trusted key made it.
    """
    key = keys.get(head.key)
    if key is None:
        raise TrustError(f"signed with the unknown key {head.key[:32]!r}", reason="unknown-key")
    try:
        key.verify(base64.b64decode(head.signature, validate=True), _statement(head))
    except (InvalidSignature, binascii.Error, ValueError) as error:
        raise TrustError("the signature does not fit", reason="wrong-signature") from error


def key_id_of(key: ed25519.Ed25519PublicKey) -> str:
    """Return how a public key is called in checkpoints."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def _statement(head: Head) -> bytes:
    return _HEAD_PREFIX + canonical({name: getattr(head, name) for name in _HEAD_FIELDS})


def _safe(name: str, value: Value) -> Value:
    """Return a value without secrets: a caller may call a request, or a device, by its own token."""
    if name == "token_id" or isinstance(value, int):  # ids of foreign issuers may look like anything
        return _bounded(value)
    return _bounded(redact(value))


def _bounded(value: Value) -> Value:
    """Return a value as a record may hold it: of bounded size, on one line in any tool."""
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)
    return "".join(character if character.isprintable() else " " for character in value[:_MAX_TEXT])
