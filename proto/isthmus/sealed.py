"""Sealed inputs: tensors of a request that only the gateway can read, whatever lies between, caches and logs.

    sealed = seal_request(request, keys.current, Binding(tenant="default", subject="reader-7"), names=["text"])
    answer = stub.ModelInfer(sealed, ...)

A sealed input keeps its place and name in the request and becomes a BYTES tensor of one element, an envelope
(isthmus.envelopes). It is bound to tenant, caller, model and request id, and to the tensor's name, datatype and shape:
moved to another place it does not open. What the tensor is stays readable in its parameters `isthmus.datatype` and
`isthmus.shape`; the request's parameter `isthmus.sealed` says that there are envelopes. Answers are not sealed, nor are
inputs that are not named.
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
from cryptography.hazmat.primitives.asymmetric import x25519

from isthmus.envelopes import ContentKey, Opener, SealingKey, SealingKeys, parse_keys
from isthmus.errors import InputError
from isthmus.oip import set_parameter
from isthmus.tensors import CONTENTS_OF, DTYPES

__all__ = [
    "Binding",
    "SealingKey",
    "SealingKeys",
    "binding_of_token",
    "is_sealed",
    "open_request",
    "parse_keys",
    "seal_request",
]

SEALED: Final = "isthmus.sealed"
VERSION: Final = "1"
DATATYPE: Final = "isthmus.datatype"
SHAPE: Final = "isthmus.shape"
EVERYTHING: Final = "*"
_LENGTH: Final = struct.Struct("<I")  # before each element of a BYTES tensor
_MAX_AXES: Final = 16


@dataclass(frozen=True, slots=True)
class Binding:
    """Who sends: the tenant and the subject of the access token. Nobody else can have the request answered."""

    tenant: str
    subject: str


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
    content_key = ContentKey(key)
    for place, tensor in enumerate(sealed.inputs):
        tensor.ClearField("contents")
        if EVERYTHING not in names and tensor.name not in names:
            continue
        context = _context(binding, sealed, tensor.name, tensor.datatype, tensor.shape)
        envelope = content_key.seal(contents[place], context)
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
    opener, found = Opener(keys), False
    for place, tensor in enumerate(opened.inputs):
        if DATATYPE not in tensor.parameters:
            continue
        datatype, shape = _declared(tensor)
        envelope = _single_element(opened.raw_input_contents[place], tensor)
        context = _context(binding, opened, tensor.name, datatype, shape)
        opened.raw_input_contents[place], found = opener.open(envelope, context), True
        tensor.datatype = datatype
        tensor.ClearField("shape")
        tensor.shape.extend(shape)
        del tensor.parameters[DATATYPE], tensor.parameters[SHAPE]
    if not found:
        raise InputError(f"{SEALED} is set and no input is sealed", reason="sealed-malformed")
    del opened.parameters[SEALED]
    return opened


def _context(binding: Binding, request: Any, name: str, datatype: str, shape: Sequence[int]) -> tuple[str, ...]:
    extent = ",".join(map(str, shape))
    return binding.tenant, binding.subject, request.model_name, request.id, name, datatype, extent


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
