"""Where tensors lie in a file: what coders that know of tensors are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

_SAFETENSORS: Final = {"F32": "f32", "F16": "f16", "I8": "i8", "U8": "u8", "I32": "i32", "I64": "i64"}
_ONNX: Final = {1: "f32", 2: "u8", 3: "i8", 6: "i32", 7: "i64", 10: "f16"}
_OPENVINO: Final = {"f32", "f16", "i8", "u8", "i32", "i64"}


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes of one tensor."""

    name: str
    dtype: str
    offset: int
    size: int


def spans(path: Path) -> list[Span]:
    """Return the tensors of a safetensors or ONNX file, or of an OpenVINO IR's weights."""
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    return _of_onnx(path) if path.suffix == ".onnx" else _of_openvino(path)


def aligned(old: Path, new: Path) -> list[tuple[str, int, int, int]]:
    """Return (type, offset in old, offset in new, bytes) of every tensor that both files have."""
    before = {span.name: span for span in spans(old)}
    found = []
    for span in spans(new):
        match = before.get(span.name)
        if match is not None and (match.dtype, match.size) == (span.dtype, span.size):
            found.append((span.dtype, match.offset, span.offset, span.size))
    return found


def _of_safetensors(path: Path) -> list[Span]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return [
        Span(name, _SAFETENSORS[entry["dtype"]], 8 + length + entry["data_offsets"][0],
             entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in tensors.items()
        if entry["dtype"] in _SAFETENSORS
    ]  # fmt: skip


def _of_onnx(path: Path) -> list[Span]:
    import onnx

    data = path.read_bytes()
    found, at = [], 0
    for name, tensor in _tensors(onnx.load_model_from_string(data).graph, ""):
        raw = tensor.raw_data
        if len(raw) < 64 or tensor.data_type not in _ONNX:  # short ones could be found where they are not
            continue
        place = data.find(raw, at)
        if place < 0:
            continue
        found.append(Span(name, _ONNX[tensor.data_type], place, len(raw)))
        at = place + len(raw)
    return found


def _tensors(graph: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield all constants by name, in the order of the file: nodes, with graphs inside of them, and initializers."""
    for node in graph.node:
        for attribute in node.attribute:
            name = f"{prefix}{node.output[0] if node.output else node.name}.{attribute.name}"
            if attribute.HasField("t"):
                yield name, attribute.t
            if attribute.HasField("g"):
                yield from _tensors(attribute.g, f"{name}/")
    for tensor in graph.initializer:
        yield f"{prefix}{tensor.name}", tensor


def _of_openvino(path: Path) -> list[Span]:
    found: dict[int, Span] = {}
    layers = ET.parse(path.with_suffix(".xml")).getroot().iterfind("layers/layer[@type='Const']")  # noqa: S314 - ours
    for layer in layers:
        entry = layer.find("data")
        if entry is None or entry.attrib["element_type"] not in _OPENVINO:
            continue
        offset, size = int(entry.attrib["offset"]), int(entry.attrib["size"])
        found.setdefault(offset, Span(layer.attrib["name"], entry.attrib["element_type"], offset, size))
    return sorted(found.values(), key=lambda span: span.offset)
