"""Finds the tensors in the files that a bundle holds; only the maker of a delta needs to know.

A layout is a help and no claim: tensors that lie outside of the file, overlap, or whose file cannot be parsed are
left out, and their bytes are coded in another way.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from isthmus.delta.elements import Kind

_SAFETENSORS: Final = {
    "I8": Kind.INT8, "U8": Kind.INT8, "F8_E4M3": Kind.INT8, "F8_E5M2": Kind.INT8, "BOOL": Kind.INT8,
    "I16": Kind.INT16, "U16": Kind.INT16, "I32": Kind.INT32, "U32": Kind.INT32,
    "F16": Kind.FLOAT16, "BF16": Kind.BFLOAT16, "F32": Kind.FLOAT32,
}  # fmt: skip
_OPENVINO: Final = {
    "i8": Kind.INT8, "u8": Kind.INT8, "i16": Kind.INT16, "u16": Kind.INT16, "i32": Kind.INT32, "u32": Kind.INT32,
    "f16": Kind.FLOAT16, "bf16": Kind.BFLOAT16, "f32": Kind.FLOAT32, "i4": Kind.INT4, "u4": Kind.INT4,
}  # fmt: skip
_ONNX: Final = {
    1: Kind.FLOAT32, 2: Kind.INT8, 3: Kind.INT8, 4: Kind.INT16, 5: Kind.INT16, 6: Kind.INT32, 12: Kind.INT32,
    10: Kind.FLOAT16, 16: Kind.BFLOAT16, 21: Kind.INT4, 22: Kind.INT4,
}  # fmt: skip
_MAX_HEADER: Final = 1 << 26
_MAX_TENSORS: Final = 1 << 20
_SMALLEST: Final = 64  # bytes: what is shorter is not worth a segment


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where the elements of one tensor lie; `kind` is None where only the place is known."""

    name: str
    offset: int
    length: int  # bytes
    kind: Kind | None
    row: int  # elements of a row


def find_tensors(data: memoryview, hint: Path | None = None) -> list[Tensor]:
    """Return the tensors of a file in the order of their bytes; none when nothing is known about it.

    Args:
        data: The file.
        hint: The OpenVINO description that belongs to a weight file.
    """
    found: list[Tensor] = []
    for parser in (_safetensors, _onnx, _elf):
        try:
            found = list(parser(data))
        except (ValueError, KeyError, TypeError, IndexError, struct.error, RecursionError, OverflowError):
            continue
        if found:
            break
    if not found and hint is not None:
        try:
            found = list(_openvino(hint))
        except (OSError, ValueError, KeyError, TypeError, ElementTree.ParseError):
            found = []
    return _in_order(found, len(data))


def _in_order(tensors: list[Tensor], size: int) -> list[Tensor]:
    kept: list[Tensor] = []
    end = 0
    for tensor in sorted(tensors, key=lambda t: (t.offset, -t.length)):
        if tensor.offset >= end and tensor.length >= _SMALLEST and tensor.offset + tensor.length <= size:
            kept.append(tensor)
            end = tensor.offset + tensor.length
    return kept


def _row(shape: list[int]) -> int:
    row = 1
    for extent in shape[1:] if len(shape) > 1 else shape:
        row *= extent
    return row


def _safetensors(data: memoryview) -> Iterator[Tensor]:
    (size,) = struct.unpack_from("<Q", data)
    if size > min(len(data) - 8, _MAX_HEADER) or bytes(data[8:9]) != b"{":
        return
    header = json.loads(bytes(data[8 : 8 + size]))
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in _SAFETENSORS:
            begin, end = (int(at) for at in entry["data_offsets"])
            shape = [int(extent) for extent in entry["shape"]]
            if 0 <= begin <= end:
                yield Tensor(name, 8 + size + begin, end - begin, _SAFETENSORS[entry["dtype"]], _row(shape))


def _openvino(xml: Path) -> Iterator[Tensor]:
    for layer in ElementTree.parse(xml).iterfind(".//layer[@type='Const']/data/.."):  # noqa: S314 - our own bundle
        data = layer.find("data")
        if data is None:
            continue
        kind = _OPENVINO.get(data.get("element_type", ""))
        shape = [int(extent) for extent in re.findall(r"\d+", data.get("shape", ""))]
        offset, size = int(data.get("offset", "-1")), int(data.get("size", "0"))
        if kind is not None and offset >= 0:
            yield Tensor(layer.get("name", ""), offset, size, kind, _row(shape))


def _fields(data: memoryview, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field number, wire type, begin of the value or the number, end) of a protobuf message."""
    at = begin
    while at < end:
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at, end)
            yield number, wire, value, at
        elif wire == 2:
            size, at = _varint(data, at, end)
            if at + size > end:
                raise ValueError("a field ends outside of its message")
            yield number, wire, at, at + size
            at += size
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            yield number, wire, at, at + size
            at += size
        else:
            raise ValueError("not a protobuf message")


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= end:
            raise ValueError("a number ends outside of its message")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number is too long")


def _onnx(data: memoryview) -> Iterator[Tensor]:
    for number, wire, begin, end in _fields(data, 0, len(data)):
        if (number, wire) == (7, 2):  # ModelProto.graph
            yield from _onnx_graph(data, begin, end)


def _onnx_graph(data: memoryview, begin: int, end: int) -> Iterator[Tensor]:
    for number, wire, at, stop in _fields(data, begin, end):
        if (number, wire) == (5, 2):  # GraphProto.initializer
            yield from _onnx_tensor(data, at, stop, "")
        elif (number, wire) == (1, 2) and stop - at > _SMALLEST:  # GraphProto.node
            output = ""
            for field, kind, first, last in _fields(data, at, stop):
                if (field, kind) == (2, 2):
                    output = bytes(data[first:last]).decode(errors="replace")
                elif (field, kind) == (5, 2) and last - first > _SMALLEST:  # NodeProto.attribute
                    for inner, typed, left, right in _fields(data, first, last):
                        if (inner, typed) == (5, 2):  # AttributeProto.t
                            yield from _onnx_tensor(data, left, right, output)
                        elif (inner, typed) == (6, 2):  # AttributeProto.g
                            yield from _onnx_graph(data, left, right)


def _onnx_tensor(data: memoryview, begin: int, end: int, name: str) -> Iterator[Tensor]:
    shape: list[int] = []
    element, place = 0, None
    for number, wire, at, stop in _fields(data, begin, end):
        if number == 1 and wire == 0:
            shape.append(at)
        elif number == 1 and wire == 2:
            while at < stop:
                extent, at = _varint(data, at, stop)
                shape.append(extent)
        elif number == 2 and wire == 0:
            element = at
        elif number == 8 and wire == 2:
            name = bytes(data[at:stop]).decode(errors="replace")
        elif number == 9 and wire == 2:
            place = at, stop - at
        elif number == 4 and wire == 2 and element in (0, 1):  # float_data, packed
            place = at, stop - at
            element = 1
    if place is not None and element in _ONNX:
        yield Tensor(name, *place, _ONNX[element], _row(shape))


def _elf(data: memoryview) -> Iterator[Tensor]:
    """Yield the sections of a 64-bit little-endian ELF file: a compiled model's weights are constants in one."""
    if bytes(data[:6]) != b"\x7fELF\x02\x01":
        return
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, number, names = struct.unpack_from("<HHH", data, 0x3A)
    (strings,) = struct.unpack_from("<Q", data, table + names * size + 0x18)
    for index in range(number):
        at = table + index * size
        name, kind = struct.unpack_from("<II", data, at)
        offset, length = struct.unpack_from("<QQ", data, at + 0x18)
        if kind == 1:  # SHT_PROGBITS
            text = bytes(data[strings + name : strings + name + 64]).split(b"\0")[0]
            yield Tensor(text.decode(errors="replace"), offset, length, None, 0)
