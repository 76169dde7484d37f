"""Keeping the INT8 grid of an OpenVINO IR.

The files of the version before are taken as they are, model.xml byte for byte, and only the contents of constants in
model.bin are replaced, each at its place. So the result has the same operators, activation ranges, length and layout,
and no samples are needed. The steps of `keep_grid`:
 (1) read the version before, and where each of its constants lies in model.bin;
 (2) walk the new full-precision graph: each operator must be in the old graph under the same name, with the same
     attributes, fed by the same operators; what quantization inserted between them is looked through;
 (3) full-precision constants (biases, normalisation, tables): take the new ones; integer weights: compiler.grid puts
     them on the old scales, and gives channels that those do not suit new ones;
 (4) refuse when constants that share their bytes in the file need different ones now.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

import numpy as np

from compiler.grid import GridError, PreviousGrid, Quantized, TensorGrid, regrid_all
from compiler.targets.openvino import read_ir
from isthmus.tensors import Array

_SMOOTH: Final = "/nncf_smooth_quant"
_NAMED: Final = 3  # operators that an error names


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class _Weight:
    """Integers, and what turns them into weights: (integers - zero_point) * scale."""

    integers: Any  # constants of the graph
    scale: Any
    zero_point: Array | None


@dataclass(slots=True)
class _Contents:
    """What each place in model.bin has to hold, collected from every constant that lies there."""

    places: dict[str, _Place]
    wanted: dict[str, bytes] = field(default_factory=dict)  # by name of the constant
    weights: dict[str, tuple[_Weight, Quantized]] = field(default_factory=dict)  # by name of the integers

    def quantize(self, weight: _Weight, array: Array) -> None:
        name = weight.integers.get_friendly_name()
        tensor = Quantized(name, array, np.asarray(weight.integers.data), _number(weight.scale), weight.zero_point)
        if name in self.weights and not np.array_equal(self.weights[name][1].weights, array):
            raise GridError(f"constant {name!r} has several users that need different values now")
        self.weights[name] = weight, tensor

    def settle(self, share: float) -> list[TensorGrid]:
        """Put all weights on the old grid as far as that suits them."""
        settled = regrid_all({name: tensor for name, (_, tensor) in self.weights.items()}, share)
        for name, (weight, tensor) in self.weights.items():
            self.want(weight.integers, settled[name].integers)
            stored = np.asarray(weight.scale.data)
            renewed = settled[name].scale != tensor.scale
            self.want(weight.scale, np.where(renewed, settled[name].scale, stored).astype(stored.dtype))
        return [settled[name].tensor for name in settled]

    def want(self, constant: Any, array: Array) -> None:
        name, data = constant.get_friendly_name(), np.ascontiguousarray(array).tobytes()
        if self.wanted.setdefault(name, data) != data:
            raise GridError(f"constant {name!r} has several users that need different values now")

    def patch(self, weights: bytes) -> bytes:
        """Return `weights` with every wanted constant in its place."""
        patched = bytearray(weights)
        settled: dict[_Place, bytes] = {}
        for name, place in self.places.items():
            data = self.wanted.get(name, weights[place.offset : place.offset + place.size])
            if len(data) != place.size:
                raise GridError(f"constant {name!r} takes {len(data)} bytes now and took {place.size}")
            if settled.setdefault(place, data) != data:
                raise GridError(f"constant {name!r} shares its bytes with others and differs from them now")
            patched[place.offset : place.offset + place.size] = data
        return bytes(patched)


def keep_grid(previous: PreviousGrid, graph: Any, destination: Path) -> list[TensorGrid]:
    """Write `graph`, a new version in full precision, on the grid of an INT8 IR.

    Args:
        previous: model.xml of the version before; model.bin lies beside it.
        graph: The new version, converted as the version before was.
        destination: model.xml to write; model.bin is written beside it.

    Returns:
        How each quantized tensor came out.

    Raises:
        GridError: It does not fit; nothing is written.
    """
    # (1)
    old_graph = read_ir(previous.entry)
    contents = _Contents(_places(previous.entry))
    old = {op.get_friendly_name(): op for op in old_graph.get_ordered_ops()}
    # (2)
    operators = [op for op in graph.get_ordered_ops() if op.get_type_name() != "Constant"]
    _check_same(operators, old)
    for op in operators:
        for port in range(op.get_input_size()):
            _take_input(op, old[op.get_friendly_name()], port, contents)
    # (3) and (4)
    tensors = contents.settle(previous.share)
    weights = contents.patch(previous.entry.with_suffix(".bin").read_bytes())
    destination.write_bytes(previous.entry.read_bytes())
    destination.with_suffix(".bin").write_bytes(weights)
    return tensors


def _check_same(operators: list[Any], old: dict[str, Any]) -> None:
    """Refuse another architecture: an operator that is missing, or has other attributes or shapes of weights."""
    different = [
        name
        for op in operators
        if (name := op.get_friendly_name()) not in old or _signature(old[name]) != _signature(op)
    ]
    if different:
        named = ", ".join(repr(name) for name in different[:_NAMED])
        more = f" and {len(different) - _NAMED} more" if len(different) > _NAMED else ""
        raise GridError(f"the version before has no operator like {named}{more}: its architecture was another")


def _places(path: Path) -> dict[str, _Place]:
    """Return where each constant lies in model.bin, by name."""
    data = path.read_bytes()
    if b"<!" in data:  # no document type, hence no entities that expand without end
        raise GridError("the version before has a document type declaration in model.xml")
    try:
        layers = ET.fromstring(data).iterfind("layers/layer[@type='Const']")  # noqa: S314  # see above
        found = [(layer.attrib["name"], layer.find("data")) for layer in layers]
        places = {
            name: _Place(int(entry.attrib["offset"]), int(entry.attrib["size"]))
            for name, entry in found
            if entry is not None
        }
    except (ET.ParseError, KeyError, ValueError) as error:
        raise GridError(f"model.xml of the version before is malformed: {error}") from error
    if len(places) != len(found):
        raise GridError("constants of the version before do not have names of their own")
    return places


def _signature(op: Any) -> tuple[object, ...]:
    attributes = {name: value for name, value in op.get_attributes().items() if name != "friendly_name"}
    return op.get_type_name(), op.get_input_size(), op.get_output_size(), repr(sorted(attributes.items()))


def _take_input(op: Any, old: Any, port: int, contents: _Contents) -> None:
    """Check that both operators are fed alike, and take over a constant."""
    ours, theirs = _source(op, port), _source(old, port)
    if ours.get_type_name() != "Constant":
        origin = _look_through(theirs)
        same = origin.get_friendly_name() == ours.get_friendly_name() and (
            origin.get_output_size() == 1 or _source_index(op, port) == _source_index(old, port)
        )
        if not same:
            raise GridError(f"operator {op.get_friendly_name()!r} is fed by another one than in the version before")
        return
    array = np.asarray(ours.data)
    if theirs.get_type_name() == "Constant":
        _check_constant(op, array, np.asarray(theirs.data))
        contents.want(theirs, array)
        return
    weight = _weight(theirs)
    if weight is None:
        raise GridError(f"constant of operator {op.get_friendly_name()!r} is quantized in a way that is not known")
    shape = np.asarray(weight.integers.data).shape
    if shape != array.shape:
        raise GridError(
            f"weights of operator {op.get_friendly_name()!r} have shape {list(array.shape)}, and {list(shape)} in the "
            "version before: its architecture was another"
        )
    contents.quantize(weight, array / _smoothing(old, port, array.shape))


def _check_constant(op: Any, new: Array, old: Array) -> None:
    same_kind = new.shape == old.shape and new.dtype == old.dtype
    if not same_kind or (new.dtype.kind != "f" and not np.array_equal(new, old)):
        raise GridError(f"constant of operator {op.get_friendly_name()!r} is not the one of the version before")


def _source(op: Any, port: int) -> Any:
    return op.input(port).get_source_output().get_node()


def _source_index(op: Any, port: int) -> int:
    return int(op.input(port).get_source_output().get_index())


def _look_through(op: Any) -> Any:
    """Return the operator behind what quantization inserted on the way of an activation."""
    while op.get_type_name() == "FakeQuantize" or _is_smoothing(op):
        op = _source(op, 0)
    return op


def _is_smoothing(op: Any) -> bool:
    return op.get_type_name() == "Multiply" and str(op.get_friendly_name()).endswith(_SMOOTH)


def _weight(op: Any) -> _Weight | None:
    """Return the quantized constant that ends in `op`: Multiply(Convert(integers) [- zero point], scale)."""
    if op.get_type_name() != "Multiply":
        return None
    scale, zero_point, inner = _constant(_source(op, 1)), None, _source(op, 0)
    if inner.get_type_name() == "Subtract":
        found = _constant(_source(inner, 1))
        if found is None:
            return None
        zero_point, inner = _number(found), _source(inner, 0)
    if scale is None or inner.get_type_name() != "Convert" or _source(inner, 0).get_type_name() != "Constant":
        return None
    integers = _source(inner, 0)
    rank = len(integers.get_output_shape(0))
    if any(array.ndim != rank for array in (_number(scale), *([] if zero_point is None else [zero_point]))):
        return None
    return _Weight(integers, scale, zero_point)


def _constant(op: Any) -> Any:
    """Return a constant, also one that is stored in another precision; None for anything else."""
    if op.get_type_name() == "Convert":
        op = _source(op, 0)
    return op if op.get_type_name() == "Constant" else None


def _number(constant: Any) -> Array:
    return np.asarray(constant.data, dtype=np.float64)


def _smoothing(old: Any, port: int, shape: tuple[int, ...]) -> Array | float:
    """Return by what the other operand is multiplied, per input channel: the weights are divided by it."""
    factors = [_constant(_source(op, 1)) for op in _behind(old, port) if _is_smoothing(op)]
    if not factors:
        return 1.0
    factor = factors[0]
    if old.get_type_name() != "MatMul" or port != 1 or len(factors) > 1 or factor is None or len(shape) < 2:
        raise GridError(f"operator {old.get_friendly_name()!r} is smoothed in a way that is not known")
    transposed = old.get_attributes()["transpose_b"]
    channels = _number(factor).reshape(-1)
    if channels.size not in (1, shape[-1] if transposed else shape[-2]):
        raise GridError(f"operator {old.get_friendly_name()!r}: smoothing does not fit the weights")
    return channels if transposed else channels[:, None]


def _behind(old: Any, port: int) -> Iterator[Any]:
    """Yield what quantization inserted on the way of the other operand."""
    for other in range(old.get_input_size()):
        op = _source(old, other)
        while other != port and (op.get_type_name() == "FakeQuantize" or _is_smoothing(op)):
            yield op
            op = _source(op, 0)
