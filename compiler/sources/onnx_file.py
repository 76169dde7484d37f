"""ONNX files: opset 11 and newer, weights inside or beside the file.

`load` is the only way to read one. Its steps:
 (1) survey: how much the file holds, before it is parsed (see `wire`);
 (2) weights in other files lie in the model's folder, in plain files, and every piece lies within its file;
 (3) parse, and read those weights in;
 (4) every tensor has as many bytes as its shape and datatype say, and a sparse one is small when it is unfolded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from compiler.sources import Exported, SourceOptions
from compiler.sources.wire import MAX_MODEL_BYTES, External, Survey, survey
from isthmus.errors import InputError

_BITS: Final[Mapping[int, int]] = {  # of one element, by TensorProto.DataType; strings have no size
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
_STRING: Final = 8
_MAX_AXES: Final = 16
_MAX_UNFOLDED: Final = 1 << 28  # elements of a sparse tensor, the zeros too


class OnnxFile:
    """A file that is ONNX already."""

    def files(self, source: str, options: SourceOptions) -> Mapping[str, Path]:
        """Return the model's file and those that hold its weights."""
        refuse(source, options, "an ONNX file", ("task", "adapter", "factory"))
        path = Path(source)
        weights = {location: _inside(path, location) for location in survey(path).locations}
        return {path.name: path, **weights}

    def to_onnx(self, source: str, options: SourceOptions, folder: Path) -> Exported:  # noqa: ARG002  # nothing to write
        """Return the file itself."""
        refuse(source, options, "an ONNX file", ("task", "adapter", "factory"))
        return Exported(Path(source))


def refuse(source: str, options: SourceOptions, what: str, fields: tuple[str, ...]) -> None:
    """Check that none of the fields is given.

    Raises:
        InputError: One is, although `what` has no use for it.
    """
    for name in fields:
        if getattr(options, name):
            raise InputError(f"{source}: {what} takes no {name!r}", hint=f"leave out {name}")


def load(path: Path) -> Any:
    """Return the ONNX model in the file, with all its weights in memory.

    Raises:
        InputError: It breaks one of the rules above; the message names the file and the tensor.
    """
    from google.protobuf.message import DecodeError
    from onnx import ModelProto

    # (1)
    found = survey(path)
    # (2)
    total = path.stat().st_size + sum(_piece(path, one)[2] for one in found.external)
    if total > MAX_MODEL_BYTES:
        raise InputError(f"{path}: expected a model of at most {MAX_MODEL_BYTES} bytes with its weights, got {total}")
    # (3)
    try:
        model = ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise InputError(f"{path}: not an ONNX file", hint="torch.onnx.export writes one") from error
    if not model.graph.node:
        raise InputError(f"{path}: not an ONNX model, or one without a single operator")
    _read_in(model, path, found)
    # (4)
    for tensor in tensors_of(model):
        _check_size(tensor, path)
    for sparse in _sparse_tensors(model):
        count = math.prod(sparse.dims)
        if not 0 <= count <= _MAX_UNFOLDED:
            name = sparse.values.name[:200]
            raise InputError(f"{path}: sparse tensor {name!r}: expected at most {_MAX_UNFOLDED} elements, got {count}")
    return model


def graphs_of(model: Any) -> Iterator[Any]:
    """Yield the model's graph, its functions, and every graph inside an operator of those."""
    waiting = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
                waiting.extend(attribute.graphs)


def tensors_of(model: Any) -> Iterator[Any]:
    """Yield every tensor of the model, those in operators' attributes and nested graphs too."""
    for graph in graphs_of(model):
        yield from getattr(graph, "initializer", ())
        for node in graph.node:
            for attribute in node.attribute:
                yield from attribute.tensors
                if attribute.HasField("t"):
                    yield attribute.t
    for sparse in _sparse_tensors(model):
        yield from (sparse.values, sparse.indices)


def _sparse_tensors(model: Any) -> Iterator[Any]:
    for graph in graphs_of(model):
        yield from getattr(graph, "sparse_initializer", ())
        for node in graph.node:
            for attribute in node.attribute:
                yield from attribute.sparse_tensors
                if attribute.HasField("sparse_tensor"):
                    yield attribute.sparse_tensor


def _inside(source: Path, location: str) -> Path:
    """Return the file with this name in the model's folder, which must be a plain one and no link."""
    folder = source.resolve().parent
    path = folder / location
    plain = bool(location) and "\0" not in location and not Path(location).is_absolute()
    try:
        usable = plain and path.resolve() == path.absolute() and path.is_relative_to(folder) and path.is_file()
    except (OSError, RuntimeError):
        usable = False
    if not usable or ".." in Path(location).parts:
        raise InputError(
            f"{source}: weights: expected a file in the model's folder, got {location[:200]!r}",
            hint="keep the files of one model in one folder",
        )
    return path


def _piece(source: Path, external: External) -> tuple[Path, int, int]:
    """Return file, first byte and length of the weights; the length is what the file has when none is given."""
    path = _inside(source, external.location)
    size = path.stat().st_size
    numbers = []
    for name, text, default in (("offset", external.offset, 0), ("length", external.length, -1)):
        if text and not (text.isascii() and text.isdigit() and len(text) < 20):
            raise InputError(
                f"{source}: weights in {external.location!r}: expected a number as {name}, got {text[:40]!r}"
            )
        numbers.append(int(text) if text else default)
    offset, length = numbers
    length = max(0, size - offset) if length < 0 else length
    if offset + length > size:
        raise InputError(
            f"{source}: weights in {external.location!r}: bytes {offset} to {offset + length} lie beyond its {size}"
        )
    return path, offset, length


def _read_in(model: Any, source: Path, found: Survey) -> None:
    """Read the weights that lie in other files into the model; the survey has seen and bounded every one of them."""
    from onnx import TensorProto

    for tensor in tensors_of(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            tensor.ClearField("external_data")
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        external = External(entries.get("location", ""), entries.get("offset", ""), entries.get("length", ""))
        if external not in found.external and external != External():
            raise InputError(f"{source}: weights of {tensor.name[:200]!r}: contradictory entries of external data")
        path, offset, length = _piece(source, external)
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise InputError(f"{source}: weights in {external.location!r}: the file became shorter while it was read")
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = data


def _check_size(tensor: Any, source: Path) -> None:
    name = tensor.name[:200]
    dims = list(tensor.dims)
    if len(dims) > _MAX_AXES or any(size < 0 for size in dims):
        raise InputError(f"{source}: tensor {name!r}: expected at most {_MAX_AXES} axes of at least 0, got {dims[:20]}")
    count = math.prod(dims)
    bits = _BITS.get(tensor.data_type)
    if bits is None and tensor.data_type != _STRING:
        raise InputError(f"{source}: tensor {name!r}: unknown datatype {tensor.data_type}")
    if tensor.HasField("raw_data"):
        expected, got, unit = -(-count * (bits or 0) // 8), len(tensor.raw_data), "bytes"
    else:
        expected, got, unit = _typed_count(tensor, count, bits)
    if expected != got:
        raise InputError(f"{source}: tensor {name!r}: shape {dims} takes {expected} {unit}, got {got}")


def _typed_count(tensor: Any, count: int, bits: int | None) -> tuple[int, int, str]:
    """Return how many numbers the typed fields must hold, and how many they do."""
    got = sum(
        len(values)
        for values in (
            tensor.float_data, tensor.int32_data, tensor.string_data,
            tensor.int64_data, tensor.double_data, tensor.uint64_data,
        )
    )  # fmt: skip
    if tensor.data_type in (14, 15):  # complex: two numbers each
        return 2 * count, got, "values"
    if bits is not None and bits < 8:  # several in one int32
        return -(-count * bits // 8), got, "values"
    return count, got, "values"
