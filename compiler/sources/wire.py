"""A look at an ONNX file before a parser that believes it: how much is in it, how deep, and which files it points to.

Parsed protocol buffers take up to a hundred times the bytes of the file, and weights may lie in other files. This walk
over the wire format (protobuf.dev/programming-guides/encoding) allocates nothing for what it reads, skips the weights,
and stops at the first count that no honest model has. It needs no library, so that a digest needs none either.
"""

from __future__ import annotations

import mmap
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from isthmus.errors import InputError

MAX_MODEL_BYTES: Final = (1 << 31) - (1 << 20)  # protocol buffers hold less than 2 GiB
MAX_FIELDS: Final = 1_500_000  # of all messages: a model of 50,000 nodes has about one million
MAX_NODES: Final = 50_000
MAX_GRAPH_DEPTH: Final = 8  # graphs inside operators of graphs
MAX_ATTRIBUTE_BYTES: Final = 64 << 20  # of one attribute that is neither a tensor nor a graph
MAX_PACKED_BYTES: Final = 256 << 20  # numbers of one to ten bytes here, up to eight times that in memory
MAX_NAME_BYTES: Final = 64 << 10  # of one name, text or entry of metadata

# What is walked into: message -> number of the field -> message inside. All else is skipped as a whole.
_INSIDE: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 8: "opset", 14: "entry", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph", 3: "entry", 4: "entry"},
    "function": {7: "node", 9: "opset", 11: "attribute", 12: "value", 14: "entry"},
    "graph": {1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value", 14: "entry", 15: "sparse", 16: "entry"},
    "node": {5: "attribute", 9: "entry"},
    "attribute": {
        5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 14: "type", 15: "type", 22: "sparse", 23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external", 16: "entry"},
    "value": {2: "type", 4: "entry"},
    "type": {1: "type_tensor", 4: "type_list", 5: "type_map", 8: "type_tensor", 9: "type_list"},
    "type_list": {1: "type"},
    "type_map": {2: "type"},
    "type_tensor": {2: "shape"},
    "shape": {1: "dim"},
    "opset": {}, "entry": {}, "external": {}, "dim": {},
}  # fmt: skip
_PAYLOADS: Final = {("tensor", 4), ("tensor", 6), ("tensor", 9), ("tensor", 10)}  # as long as the numbers they hold
_PACKED: Final = {("tensor", 5), ("tensor", 7), ("tensor", 11)}
_LISTS: Final = {("attribute", 4), ("attribute", 7), ("attribute", 8), ("attribute", 9)}
_MAX_DEPTH: Final = 6 * MAX_GRAPH_DEPTH  # messages in messages; protocol buffers' own parsers stop at 100
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT: Final = 10  # bytes


@dataclass(slots=True)
class External:
    """Where a tensor's bytes are, as the file says: unchecked."""

    location: str = ""
    offset: str = ""
    length: str = ""


@dataclass(slots=True)
class Survey:
    """What one ONNX file holds."""

    nodes: int = 0
    fields: int = 0
    packed: int = 0  # bytes
    external: list[External] = field(default_factory=list)

    @property
    def locations(self) -> list[str]:
        """Return the names of the files that hold weights, each once, as the model spells them."""
        return list(dict.fromkeys(one.location for one in self.external))


class _MalformedError(Exception):
    """The bytes are no protocol buffer of this kind."""


def survey(path: Path) -> Survey:
    """Return what the ONNX file holds, in time and memory that its limits bound.

    Raises:
        InputError: It cannot be read, is no ONNX file, or holds more than any model needs; the message says of what.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: not an ONNX file: expected a regular file")
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size > MAX_MODEL_BYTES:
                raise InputError(f"{path}: expected a model of at most {MAX_MODEL_BYTES} bytes, got {size}")
            if size == 0:
                raise InputError(f"{path}: not an ONNX file: it is empty", hint="torch.onnx.export writes one")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Walk(data, path).run()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="name an ONNX file that is there") from error
    except _MalformedError as error:
        raise InputError(f"{path}: not an ONNX file: {error}", hint="torch.onnx.export writes one") from error


class _Walk:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.found = Survey()

    def run(self) -> Survey:
        # Messages still to walk: kind, first byte, byte after the last, messages around it, graphs around it.
        waiting: list[tuple[str, int, int, int, int]] = [("model", 0, len(self.data), 0, 0)]
        while waiting:
            kind, start, end, depth, graphs = waiting.pop()
            inside = _INSIDE[kind]
            entry: dict[int, bytes] = {}
            for number, wire_type, first, last in self._fields(start, end):
                if wire_type != _BYTES:
                    continue
                child = inside.get(number)
                if child is None:
                    self._check_bytes(kind, number, last - first)
                    if kind == "external":
                        entry[number] = self.data[first:last]
                    continue
                if depth == _MAX_DEPTH:
                    raise InputError(f"{self.path}: nested too deeply for a model")
                self._count(kind, child, graphs)
                waiting.append((child, first, last, depth + 1, graphs + (child == "graph")))
            if kind == "external":
                self._note(entry)
            elif kind == "tensor":
                self.found.external.append(External())  # its entries come next, for the last in is the first out
        self.found.external = [one for one in self.found.external if one != External()]
        return self.found

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield number, wire type, first byte and byte after the last of each field of the message."""
        position = start
        while position < end:
            self.found.fields += 1
            if self.found.fields > MAX_FIELDS:
                raise InputError(f"{self.path}: expected at most {MAX_FIELDS} fields in a model")
            tag, position = self._varint(position, end)
            wire_type = tag & 7
            first = position
            if wire_type == _BYTES:
                length, first = self._varint(position, end)
                position = first + length
            elif wire_type == _VARINT:
                _, position = self._varint(position, end)
            elif wire_type in (_FIXED32, _FIXED64):
                position += 4 if wire_type == _FIXED32 else 8
            else:
                raise _MalformedError(f"a field of the unknown wire type {wire_type} at byte {position}")
            if position > end or tag < 8:
                raise _MalformedError(f"a field at byte {first} reaches beyond its message; is the file cut short?")
            yield tag >> 3, wire_type, first, position

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        data, value = self.data, 0
        for shift in range(0, 7 * _LONGEST_VARINT, 7):
            if position >= end:
                raise _MalformedError(f"a number at byte {position} is cut short")
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
        raise _MalformedError(f"a number at byte {position} has no end")

    def _check_bytes(self, kind: str, number: int, length: int) -> None:
        place = (kind, number)
        if place in _PAYLOADS:
            return
        if place in _PACKED:
            self.found.packed += length
            if self.found.packed > MAX_PACKED_BYTES:
                raise InputError(f"{self.path}: expected at most {MAX_PACKED_BYTES} bytes of packed integers")
            return
        limit = MAX_ATTRIBUTE_BYTES if place in _LISTS else MAX_NAME_BYTES
        if length > limit and not _is_text(kind, number):
            raise InputError(f"{self.path}: expected at most {limit} bytes in one field of {kind}, got {length}")

    def _count(self, kind: str, child: str, graphs: int) -> None:
        if child == "node":
            self.found.nodes += 1
            if self.found.nodes > MAX_NODES:
                raise InputError(f"{self.path}: expected at most {MAX_NODES} operators")
        if child == "graph" and kind == "attribute" and graphs > MAX_GRAPH_DEPTH:
            raise InputError(f"{self.path}: expected graphs at most {MAX_GRAPH_DEPTH} levels deep in operators")

    def _note(self, entry: dict[int, bytes]) -> None:
        key, value = (entry.get(number, b"").decode("utf-8", "replace") for number in (1, 2))
        if key in ("location", "offset", "length"):
            setattr(self.found.external[-1], key, value)


def _is_text(kind: str, number: int) -> bool:
    """Return whether it is a doc string or metadata, which may be long and is thrown away."""
    return (kind, number) in {("model", 6), ("graph", 10), ("node", 6), ("attribute", 13), ("tensor", 12), ("entry", 2)}
