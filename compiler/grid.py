"""Grid keeping: a new version's weights on the INT8 scales of the version before.

A weight that did not change keeps its byte, and one that changed little moves by one step: the difference between two
versions is then mostly zeros. Scales derived anew would change nearly every byte.

How it is done: the files of the version before are taken as they are, model.xml byte for byte, and only the contents of
constants in model.bin are replaced, each at its place. So the result has the same operators, scales, activation
ranges, length and layout. The steps of `keep_grid`:
 (1) read the version before, and where each of its constants lies in model.bin;
 (2) walk the new full-precision graph: each operator must be in the old graph under the same name, with the same
     attributes, fed by the same operators; what quantization inserted between them is looked through;
 (3) integer weights: round the new weights to the nearest step of the old scale, and clip; full-precision constants
     (biases, normalisation, tables): take the new ones;
 (4) refuse when constants that share their bytes in the file need different ones now, or too many weights clip.

A difference of half a step is not a change: the old step is kept at ties, so that equal weights give equal bytes
whatever the order of rounding was. This is not hysteresis: no weight is left on a step that is not its nearest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

import numpy as np
from numpy.typing import NDArray

from compiler.targets.openvino import read_ir
from isthmus.errors import VerificationError
from isthmus.tensors import Array

MAX_CLIPPED: Final = 0.01  # of one tensor's weights
_TIE: Final = 1e-3  # steps; float32 products that nncf rounded differ by less
_SMOOTH: Final = "/nncf_smooth_quant"


class GridError(VerificationError):
    """The new version does not fit on the old grid; make a new one."""

    reason = "grid-not-kept"


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class _Weight:
    """Integers, and what turns them into weights: (integers - zero_point) * scale."""

    integers: Any
    scale: Array
    zero_point: Array | None


@dataclass(slots=True)
class _Contents:
    """What each place in model.bin has to hold, collected from every constant that lies there."""

    places: dict[str, _Place]
    wanted: dict[str, bytes] = field(default_factory=dict)  # by name of the constant

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


def keep_grid(previous: Path, graph: Any, destination: Path) -> float:
    """Write `graph`, a new version in full precision, on the grid of the INT8 IR in `previous`.

    Args:
        previous: model.xml of the version before; model.bin lies beside it.
        graph: The new version, converted as the version before was.
        destination: model.xml to write; model.bin is written beside it.

    Returns:
        The largest share of one tensor's weights that had to be clipped.

    Raises:
        GridError: It does not fit; nothing is written.
    """
    # (1)
    old_graph = read_ir(previous)
    contents = _Contents(_places(previous))
    old = {op.get_friendly_name(): op for op in old_graph.get_ordered_ops()}
    # (2) and (3)
    clipped = 0.0
    for op in graph.get_ordered_ops():
        if op.get_type_name() == "Constant":
            continue
        match = old.get(op.get_friendly_name())
        if match is None or _signature(match) != _signature(op):
            raise GridError(f"operator {op.get_friendly_name()!r} is not in the version before as it is now")
        for port in range(op.get_input_size()):
            clipped = max(clipped, _take_input(op, match, port, contents))
    # (4)
    if clipped > MAX_CLIPPED:
        raise GridError(f"{clipped:.1%} of a tensor's weights lie outside of the old grid, more than {MAX_CLIPPED:.0%}")
    weights = contents.patch(previous.with_suffix(".bin").read_bytes())
    destination.write_bytes(previous.read_bytes())
    destination.with_suffix(".bin").write_bytes(weights)
    return clipped


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


def _take_input(op: Any, old: Any, port: int, contents: _Contents) -> float:
    """Check that both operators are fed alike; take over a constant and return its share of clipped weights."""
    ours, theirs = _source(op, port), _source(old, port)
    if ours.get_type_name() != "Constant":
        origin = _look_through(theirs)
        same = origin.get_friendly_name() == ours.get_friendly_name() and (
            origin.get_output_size() == 1 or _source_index(op, port) == _source_index(old, port)
        )
        if not same:
            raise GridError(f"operator {op.get_friendly_name()!r} is fed by another one than in the version before")
        return 0.0
    array = np.asarray(ours.data)
    if theirs.get_type_name() == "Constant":
        _check_constant(op, array, np.asarray(theirs.data))
        contents.want(theirs, array)
        return 0.0
    weight = _weight(theirs)
    if weight is None or np.asarray(weight.integers.data).shape != array.shape:
        raise GridError(f"constant of operator {op.get_friendly_name()!r} is quantized in a way that is not known")
    integers, clipped = requantize(
        array / _smoothing(old, port, array.shape), np.asarray(weight.integers.data), weight.scale, weight.zero_point
    )
    contents.want(weight.integers, integers)
    return clipped


def _check_constant(op: Any, new: Array, old: Array) -> None:
    same_kind = new.shape == old.shape and new.dtype == old.dtype
    if not same_kind or (new.dtype.kind != "f" and not np.array_equal(new, old)):
        raise GridError(f"constant of operator {op.get_friendly_name()!r} is not the one of the version before")


def requantize(weights: Array, old: NDArray[Any], scale: Array, zero_point: Array | None) -> tuple[NDArray[Any], float]:
    """Return the nearest integers on the old grid, and the share that had to be clipped.

    Raises:
        GridError: The old integers are not of 8 bits.
    """
    if old.dtype not in (np.int8, np.uint8):
        raise GridError(f"weights are {old.dtype}, expected 8-bit integers")
    low, high = np.iinfo(old.dtype).min, np.iinfo(old.dtype).max
    if zero_point is None and old.dtype == np.int8 and old.min(initial=0) > low:
        low = -high  # symmetric
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        steps = np.asarray(weights, dtype=np.float64) / scale
    steps = np.where(np.asarray(weights) == 0, 0.0, steps)  # a channel of zeros may have scale zero
    if zero_point is not None:
        steps = steps + zero_point
    if np.isnan(steps).any():
        raise GridError("weights hold values that are not numbers")
    near = np.abs(steps - old) <= 0.5 + _TIE
    integers = np.where(near, old, np.clip(np.rint(steps), low, high)).astype(old.dtype)
    outside = (steps < low - 0.5 - _TIE) | (steps > high + 0.5 + _TIE)
    return integers, float(outside.mean()) if outside.size else 0.0


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
        zero_point, inner = _constant(_source(inner, 1)), _source(inner, 0)
        if zero_point is None:
            return None
    if scale is None or inner.get_type_name() != "Convert" or _source(inner, 0).get_type_name() != "Constant":
        return None
    return _Weight(_source(inner, 0), scale, zero_point)


def _constant(op: Any) -> Array | None:
    """Return the value of a constant, also of one that is stored in another precision."""
    if op.get_type_name() == "Convert":
        op = _source(op, 0)
    return np.asarray(op.data, dtype=np.float64) if op.get_type_name() == "Constant" else None


def _smoothing(old: Any, port: int, shape: tuple[int, ...]) -> Array | float:
    """Return by what the other operand is multiplied, per input channel: the weights are divided by it."""
    factors = [_constant(_source(op, 1)) for op in _behind(old, port) if _is_smoothing(op)]
    if not factors:
        return 1.0
    factor = factors[0]
    if old.get_type_name() != "MatMul" or port != 1 or len(factors) > 1 or factor is None or len(shape) < 2:
        raise GridError(f"operator {old.get_friendly_name()!r} is smoothed in a way that is not known")
    transposed = old.get_attributes()["transpose_b"]
    channels = factor.reshape(-1)
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
