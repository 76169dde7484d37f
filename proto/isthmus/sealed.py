"""Sealed inputs: tensors of a request that only the gateway can read, whatever lies between, caches and logs.

    sealed = seal_request(request, keys.current, Binding(tenant="default", subject="reader-7"), names=["text"])
    answer = stub.ModelInfer(sealed, ...)

A sealed input keeps its place and name in the request and becomes a BYTES tensor of one element, an envelope:

    "ISE1" | key id, 8 bytes | wrapped content key, 80 bytes | nonce, 12 bytes | AES-256-GCM ciphertext and tag

The content key is new for each request. It is wrapped for the gateway's X25519 key by HPKE (RFC 9180, base mode,
DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM). The ciphertext is bound to key id, tenant, caller, model and
request id, and to the tensor's name, datatype and shape: moved to another place it does not open. What the tensor is
stays readable in its parameters `isthmus.datatype` and `isthmus.shape`; the request's parameter `isthmus.sealed` says
that there are envelopes. Answers are not sealed, nor are inputs that are not named.

Public keys come as a document that the organisation's authority signs (`parse_keys`), so that nobody between, not even
one with a certificate for the cloud's name, can offer a key of its own.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import secrets
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from isthmus.errors import InputError, TrustError
from isthmus.oip import set_parameter
from isthmus.tensors import CONTENTS_OF, DTYPES

SEALED: Final = "isthmus.sealed"
VERSION: Final = "1"
DATATYPE: Final = "isthmus.datatype"
SHAPE: Final = "isthmus.shape"
EVERYTHING: Final = "*"
KEYS_FILE: Final = "sealing.json"
KEYS_PREFIX: Final = b"isthmus-sealing-keys-v1\n"
_MAGIC: Final = b"ISE1"
_KEY_ID: Final = 8
_WRAPPED: Final = 80  # encapsulated key, 32 bytes of key, tag
_NONCE: Final = 12
_OVERHEAD: Final = len(_MAGIC) + _KEY_ID + _WRAPPED + _NONCE + 16
_LENGTH: Final = struct.Struct("<I")  # before each element of a BYTES tensor
_MAX_AXES: Final = 16
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


@dataclass(frozen=True, slots=True)
class Binding:
    """Who sends: the tenant and the subject of the access token. Nobody else can have the request answered."""

    tenant: str
    subject: str


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
    return KEYS_PREFIX + json.dumps(told, sort_keys=True, separators=(",", ":")).encode()


def is_sealed(request: Any) -> bool:
    """Return whether a ModelInferRequest says that it has sealed inputs."""
    return SEALED in request.parameters


def seal_request(request: Any, key: SealingKey, binding: Binding, names: Collection[str] = (EVERYTHING,)) -> Any:
    """Return a copy of a ModelInferRequest with some inputs sealed; it gets an id if it has none.

    Args:
        request: The request; its model's name and its id must stay as they are afterwards.
        key: The gateway's.
        binding: The caller's tenant and subject: what its access token says.
        names: Inputs to seal; "*" for all.

    Raises:
        InputError: An input of that name is not in the request, or its contents do not fit its datatype.
    """
    sealed = type(request)()
    sealed.CopyFrom(request)
    sealed.id = request.id or secrets.token_hex(16)
    present = [tensor.name for tensor in request.inputs]
    for name in names:
        if name != EVERYTHING and name not in present:
            raise InputError(f"cannot seal {name[:80]!r}: the inputs are {', '.join(present)}")
    contents = _raw_contents(request)
    content_key = secrets.token_bytes(32)
    wrapped = _wrap(content_key, key)
    for place, tensor in enumerate(sealed.inputs):
        tensor.ClearField("contents")
        if EVERYTHING not in names and tensor.name not in names:
            continue
        context = _context(key.id, binding, sealed, tensor.name, tensor.datatype, tensor.shape)
        envelope = _envelope(contents[place], content_key, wrapped, key, context)
        set_parameter(tensor, DATATYPE, tensor.datatype)
        set_parameter(tensor, SHAPE, ",".join(map(str, tensor.shape)))
        tensor.datatype = "BYTES"
        tensor.ClearField("shape")
        tensor.shape.append(1)
        contents[place] = _LENGTH.pack(len(envelope)) + envelope
    sealed.ClearField("raw_input_contents")
    sealed.raw_input_contents.extend(contents)
    set_parameter(sealed, SEALED, VERSION)
    return sealed


def open_request(request: Any, keys: Mapping[str, x25519.X25519PrivateKey], binding: Binding) -> Any:
    """Return a copy of a ModelInferRequest with its sealed inputs opened.

    Args:
        request: As it came.
        keys: The gateway's private keys, by id.
        binding: The caller's tenant and subject, from its verified token.

    Raises:
        InputError: An envelope is malformed, is for another key, or was not made for this request of this caller.
    """
    if request.parameters[SEALED].string_param != VERSION:
        raise InputError(f"{SEALED}: expected version {VERSION} of sealed inputs", reason="sealed-malformed")
    if len(request.raw_input_contents) != len(request.inputs):
        raise InputError("a request with sealed inputs needs raw_input_contents", reason="sealed-malformed")
    opened = type(request)()
    opened.CopyFrom(request)
    unwrapped: dict[bytes, bytes] = {}
    for place, tensor in enumerate(opened.inputs):
        if DATATYPE not in tensor.parameters:
            continue
        datatype, shape = _declared(tensor)
        envelope = _single_element(opened.raw_input_contents[place], tensor)
        key_id = envelope[len(_MAGIC) : len(_MAGIC) + _KEY_ID].hex()
        context = _context(key_id, binding, opened, tensor.name, datatype, shape)
        opened.raw_input_contents[place] = _open(envelope, keys, context, unwrapped)
        tensor.datatype = datatype
        tensor.ClearField("shape")
        tensor.shape.extend(shape)
        del tensor.parameters[DATATYPE], tensor.parameters[SHAPE]
    if not unwrapped:
        raise InputError(f"{SEALED} is set and no input is sealed", reason="sealed-malformed")
    del opened.parameters[SEALED]
    return opened


def seal_bytes(data: bytes, key: SealingKey, context: Sequence[str]) -> bytes:
    """Return an envelope of any bytes, which opens for the gateway's key, in this context only."""
    content_key = secrets.token_bytes(32)
    return _envelope(data, content_key, _wrap(content_key, key), key, _joined((key.id, *context)))


def open_bytes(envelope: bytes, keys: Mapping[str, x25519.X25519PrivateKey], context: Sequence[str]) -> bytes:
    """Return what was sealed.

    Raises:
        InputError: It is malformed, for another key, or of another context.
    """
    key_id = envelope[len(_MAGIC) : len(_MAGIC) + _KEY_ID].hex()
    return _open(envelope, keys, _joined((key_id, *context)), {})


def _envelope(data: bytes, content_key: bytes, wrapped: bytes, key: SealingKey, context: bytes) -> bytes:
    nonce = secrets.token_bytes(_NONCE)
    sealed = AESGCM(content_key).encrypt(nonce, data, context)
    return b"".join((_MAGIC, bytes.fromhex(key.id), wrapped, nonce, sealed))


def _open(
    envelope: bytes, keys: Mapping[str, x25519.X25519PrivateKey], context: bytes, unwrapped: dict[bytes, bytes]
) -> bytes:
    if len(envelope) < _OVERHEAD or not envelope.startswith(_MAGIC):
        raise InputError("a sealed input is not an envelope, or was cut short", reason="sealed-malformed")
    start = len(_MAGIC) + _KEY_ID
    key_id, wrapped = envelope[len(_MAGIC) : start].hex(), envelope[start : start + _WRAPPED]
    private = keys.get(key_id)
    if private is None:
        raise InputError(
            f"a sealed input is for the key {key_id}, which this gateway does not have",
            hint="fetch the current sealing keys and seal it again",
            reason="sealed-unknown-key",
        )
    nonce_end = start + _WRAPPED + _NONCE
    try:
        content_key = unwrapped.get(wrapped)
        if content_key is None:
            content_key = unwrapped[wrapped] = _SUITE.decrypt(wrapped, private, info=_INFO)
        return AESGCM(content_key).decrypt(envelope[start + _WRAPPED : nonce_end], envelope[nonce_end:], context)
    except (InvalidTag, ValueError) as error:
        raise InputError(
            "a sealed input does not open: it was altered, or made for another request, model or caller",
            hint="the request's id, model, tensor and the token's subject are those that it was sealed for",
            reason="sealed-not-openable",
        ) from error


def _wrap(content_key: bytes, key: SealingKey) -> bytes:
    return _SUITE.encrypt(content_key, key.public, info=_INFO)


def _context(key_id: str, binding: Binding, request: Any, name: str, datatype: str, shape: Sequence[int]) -> bytes:
    extent = ",".join(map(str, shape))
    return _joined((key_id, binding.tenant, binding.subject, request.model_name, request.id, name, datatype, extent))


def _joined(parts: Sequence[str]) -> bytes:
    """Return texts as bytes from which they can be told apart."""
    encoded = [part.encode() for part in parts]
    return _CONTEXT + b"".join(struct.pack(">I", len(part)) + part for part in encoded)


def _declared(tensor: Any) -> tuple[str, list[int]]:
    """Return datatype and shape that a sealed input says it has."""
    datatype, text = tensor.parameters[DATATYPE].string_param, tensor.parameters[SHAPE].string_param
    axes = text.split(",") if text else []
    known = datatype in DTYPES or datatype == "BYTES"
    if not known or len(axes) > _MAX_AXES or not all(a.isascii() and a.isdecimal() and len(a) < 16 for a in axes):
        raise InputError(f"sealed input {tensor.name[:80]!r}: no datatype and shape", reason="sealed-malformed")
    return datatype, [int(axis) for axis in axes]


def _single_element(data: bytes, tensor: Any) -> bytes:
    if tensor.datatype != "BYTES" or list(tensor.shape) != [1] or len(data) < _LENGTH.size:
        raise InputError(f"sealed input {tensor.name[:80]!r}: expected BYTES [1]", reason="sealed-malformed")
    if _LENGTH.unpack_from(data)[0] != len(data) - _LENGTH.size:
        raise InputError(f"sealed input {tensor.name[:80]!r}: cut short", reason="sealed-malformed")
    return data[_LENGTH.size :]


def _raw_contents(request: Any) -> list[bytes]:
    """Return the contents of all inputs as raw bytes, whichever way they came."""
    if request.raw_input_contents:
        if len(request.raw_input_contents) != len(request.inputs):
            raise InputError(f"expected {len(request.inputs)} raw_input_contents, one for each input")
        return [bytes(data) for data in request.raw_input_contents]
    return [_raw(tensor) for tensor in request.inputs]


def _raw(tensor: Any) -> bytes:
    if tensor.datatype == "BYTES":
        return b"".join(_LENGTH.pack(len(item)) + item for item in tensor.contents.bytes_contents)
    field = CONTENTS_OF.get(tensor.datatype)
    if field is None:
        raise InputError(f"input {tensor.name[:80]!r}: datatype {tensor.datatype} must be sent as raw_input_contents")
    values = getattr(tensor.contents, field)
    if len(values) != math.prod(tensor.shape):
        raise InputError(f"input {tensor.name[:80]!r}: expected {math.prod(tensor.shape)} values, got {len(values)}")
    try:
        return np.asarray(values).astype(DTYPES[tensor.datatype], casting="unsafe").tobytes()
    except (OverflowError, ValueError) as error:
        raise InputError(f"input {tensor.name[:80]!r}: values do not fit {tensor.datatype}") from error


def binding_of_token(token: str) -> Binding:
    """Return tenant and subject that an access token of ours says, for whoever holds it; it is not verified.

    Raises:
        InputError: It is not a JWT; the holder of another kind of key asks the cloud (SealingService).
    """
    try:
        payload = token.split(".")[1]
        told = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return Binding(str(told.get("tenant", "default")), str(told["sub"]))
    except (IndexError, ValueError, KeyError, AttributeError, binascii.Error) as error:
        raise InputError("not a JWT", hint="SealingService.GetSealingKeys says tenant and subject, too") from error
