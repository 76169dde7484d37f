"""Keeping the INT8 grid of an ONNX file with QuantizeLinear and DequantizeLinear.

The new version is quantized by itself first; then its tensors, which the quantizer names after those of the source, get
the scales that tensors of the same name and shape have in the version before:
 (1) activations: the old scale and zero point, while the range that the samples need now is about the one of then;
 (2) weights and embeddings: compiler.grid decides, channel by channel;
 (3) biases of 32 bits: on the product of the two scales that their operator has by now.
What has no counterpart in the version before keeps the scales that the quantizer gave it. The order of tensors and
nodes is the quantizer's, which is the same for the same architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compiler.grid import GridError, PreviousGrid, Quantized, Regridded, TensorGrid, regrid_all
from isthmus.tensors import Array

MAX_EXCESS: Final = 0.1  # of the old range of an activation: what the new range may lie outside of it
LEAST_USE: Final = 0.5  # of the old range: what the new range must be at least
_SUFFIX: Final = "_quantized"  # of a quantized tensor's name
_TIE: Final = 1e-3  # steps
_LARGEST: Final = float(np.iinfo(np.int32).max)
_MARGIN: Final = 0.99  # scales are float32: a bias at the limit must stay below it


@dataclass(frozen=True, slots=True)
class _Unpacking:
    """A DequantizeLinear of constants: names of its tensors, and along which axis scales lie."""

    integers: str
    scale: str
    zero_point: str
    axis: int


@dataclass(frozen=True, slots=True)
class _Biased:
    """An operator with a quantized bias: names of constants."""

    activation_scale: str
    weight: str
    weight_scale: str
    bias: str
    bias_scale: str
    source: str  # the bias in full precision


def keep_grid(model: Any, weights: Mapping[str, Array], previous: PreviousGrid) -> list[TensorGrid]:
    """Put a quantized ONNX model on the grid of the version before, as far as that suits it.

    Args:
        model: The new version in INT8, which is changed.
        weights: Its full-precision constants, by name.
        previous: The ONNX file of the version before.

    Returns:
        How each quantized constant came out.

    Raises:
        GridError: The version before cannot be read, or the model does not fit on its grid; `model` is as it was.
    """
    import onnx

    try:
        old = _Tensors(onnx.load(previous.entry).graph)
    except Exception as error:  # the library raises whatever its parser raises
        raise GridError(f"the version before cannot be read: {str(error)[:200]}") from error
    new = _Tensors(model.graph)
    # (1)
    changes = _activations(new, old)
    # (2)
    least = _least_scales(new, weights, changes)
    found: dict[str, Quantized] = {}
    fresh: list[TensorGrid] = []
    for unpacking in new.unpackings:
        source = _source(unpacking.integers, weights)
        if source is None or new.array(unpacking.integers).dtype == np.int32:
            continue
        tensor = _quantized(unpacking, weights[source], new, old, least.get(unpacking.integers))
        if isinstance(tensor, TensorGrid):
            fresh.append(tensor)
        else:
            found[unpacking.integers] = tensor
    settled = regrid_all(found, previous.share)
    for unpacking in new.unpackings:
        if unpacking.integers in settled:
            changes |= _settle(unpacking, settled[unpacking.integers], new)
    # (3)
    changes |= _biases(new, old, weights, changes)
    new.replace(changes)
    return [*(entry.tensor for entry in settled.values()), *fresh]


class _Tensors:
    """The constants of a graph, and what is quantized there."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.unpackings = [
            unpacking
            for node in graph.node
            if node.op_type == "DequantizeLinear" and (unpacking := self._unpacking(node)) is not None
        ]
        self.by_integers = {unpacking.integers: unpacking for unpacking in self.unpackings}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def array(self, name: str) -> NDArray[Any]:
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(self._tensors[name]))

    def replace(self, changes: Mapping[str, NDArray[Any]]) -> None:
        from onnx import numpy_helper

        for name, array in changes.items():
            self._tensors[name].CopyFrom(
                numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
            )

    def _unpacking(self, node: Any) -> _Unpacking | None:
        """Return what this node unpacks: constants, or rows that are looked up in a table of constants."""
        name = node.input[0]
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == "Gather":
            name = maker.input[0]
        if name not in self._tensors or node.input[1] not in self._tensors:
            return None
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        return _Unpacking(name, node.input[1], node.input[2] if len(node.input) > 2 else "", axis)


def _activations(new: _Tensors, old: _Tensors) -> dict[str, NDArray[Any]]:
    """Return the old scales and zero points of activations whose range is about the one of then."""
    changes: dict[str, NDArray[Any]] = {}
    for node in new.graph.node:
        names = tuple(node.input[1:3])
        if node.op_type != "QuantizeLinear" or len(names) < 2 or not all(name in new for name in names):
            continue
        if not all(name in old for name in names):
            continue
        (scale, zero), (was_scale, was_zero) = ([tensors.array(name) for name in names] for tensors in (new, old))
        if (scale.shape, zero.dtype) == (was_scale.shape, was_zero.dtype) and scale.size == 1:
            ranges = _range(scale, zero), _range(was_scale, was_zero)
            if _suits(*ranges):
                changes |= dict(zip(names, (was_scale, was_zero), strict=True))
    return changes


def _range(scale: NDArray[Any], zero: NDArray[Any]) -> tuple[float, float]:
    limits = np.iinfo(zero.dtype)
    return (limits.min - float(zero)) * float(scale), (limits.max - float(zero)) * float(scale)


def _suits(needed: tuple[float, float], given: tuple[float, float]) -> bool:
    width = given[1] - given[0]
    excess = max(given[0] - needed[0], needed[1] - given[1])
    return excess <= MAX_EXCESS * width and needed[1] - needed[0] >= LEAST_USE * width


def _source(integers: str, weights: Mapping[str, Array]) -> str | None:
    """Return the name of the constant that was quantized."""
    for name in (integers.removesuffix(_SUFFIX), integers):
        if name in weights:
            return name
    return None


def _quantized(
    unpacking: _Unpacking, weights: Array, new: _Tensors, old: _Tensors, least: NDArray[np.float64] | None
) -> Quantized | TensorGrid:
    """Return the tensor with the old scales, or why it has none."""
    integers, scale = new.array(unpacking.integers), new.array(unpacking.scale)
    was = old.by_integers.get(unpacking.integers)
    name = unpacking.integers.removesuffix(_SUFFIX)
    if was is None:
        return TensorGrid(name, max(scale.size, 1), 0, reason="the version before has no such tensor")
    before, was_scale = old.array(was.integers), old.array(was.scale)
    if (before.shape, before.dtype, was_scale.shape) != (integers.shape, integers.dtype, scale.shape):
        reason = f"its shape was {list(before.shape)} and is {list(integers.shape)}"
        return TensorGrid(name, max(scale.size, 1), 0, reason=reason)
    zeros = [tensors.array(at.zero_point) for tensors, at in ((new, unpacking), (old, was)) if at.zero_point in tensors]
    if any(np.any(zero) for zero in zeros):
        return TensorGrid(name, max(scale.size, 1), 0, reason="its zero points are not 0")
    shape = _aligned(scale, unpacking.axis, integers.ndim)
    return Quantized(
        name, weights, before, was_scale.astype(np.float64).reshape(shape),
        own_scale=scale.astype(np.float64).reshape(shape), least_scale=None if least is None else least.reshape(shape),
    )  # fmt: skip


def _aligned(scale: NDArray[Any], axis: int, rank: int) -> tuple[int, ...]:
    """Return the shape that lets scales stand beside their channels."""
    if scale.size == 1:
        return (1,) * rank
    at = axis % rank
    return tuple(scale.size if place == at else 1 for place in range(rank))


def _settle(unpacking: _Unpacking, regridded: Regridded, new: _Tensors) -> dict[str, NDArray[Any]]:
    stored = new.array(unpacking.scale)
    scale = regridded.scale.reshape(stored.shape).astype(stored.dtype)
    return {unpacking.integers: regridded.integers, unpacking.scale: scale}


def _biased(new: _Tensors, weights: Mapping[str, Array]) -> Iterator[_Biased]:
    """Yield the operators with an activation, weights and a bias that are all quantized."""
    for node in new.graph.node:
        makers = [new.makers.get(name) for name in node.input[:3]]
        if len(makers) < 3 or any(maker is None or maker.op_type != "DequantizeLinear" for maker in makers):
            continue
        activation, weight, bias = (maker.input for maker in makers if maker is not None)
        source = _source(bias[0], weights) if bias[0] in new else None
        if source is not None and new.array(bias[0]).dtype == np.int32:
            yield _Biased(activation[1], weight[0], weight[1], bias[0], bias[1], source)


def _biases(
    new: _Tensors, old: _Tensors, weights: Mapping[str, Array], changes: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Return the biases on the scales that their operators have by now; the runtime takes no others."""

    def now(name: str) -> NDArray[np.float64]:
        return np.asarray(changes[name] if name in changes else new.array(name), dtype=np.float64)

    found: dict[str, NDArray[Any]] = {}
    for entry in _biased(new, weights):
        scale = (now(entry.activation_scale) * now(entry.weight_scale)).astype(np.float32)
        steps = np.asarray(weights[entry.source], dtype=np.float64) / scale
        if not np.isfinite(steps).all() or np.abs(steps).max(initial=0) > _LARGEST:
            raise GridError(f"bias {entry.source!r} does not fit on the scales of its operator")
        integers = np.rint(steps).astype(np.int32)
        if entry.bias in old and old.array(entry.bias).shape == integers.shape:
            before = old.array(entry.bias)
            integers = np.where(np.abs(steps - before) <= 0.5 + _TIE, before, integers).astype(np.int32)
        found |= {entry.bias: integers, entry.bias_scale: scale.reshape(new.array(entry.bias_scale).shape)}
    return found


def _least_scales(
    new: _Tensors, weights: Mapping[str, Array], changes: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[np.float64]]:
    """Return by integers how small scales of weights may be, lest biases on them need more than 32 bits."""
    found: dict[str, NDArray[np.float64]] = {}
    for entry in _biased(new, weights):
        name = entry.activation_scale
        activation = float(changes[name] if name in changes else new.array(name))
        least = np.abs(np.asarray(weights[entry.source], dtype=np.float64)) / (activation * _LARGEST * _MARGIN)
        scales = new.array(entry.weight_scale).size
        least = least if scales == least.size else np.full(scales, least.max(initial=0.0))
        found[entry.weight] = np.maximum(least, found.get(entry.weight, 0.0))
    return found
