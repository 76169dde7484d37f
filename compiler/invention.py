"""Samples for a model that nobody gave samples for: enough to see whether a target takes it and agrees with the source.

They are no stand-in for real data: what INT8 costs in accuracy shows on real inputs only.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from compiler.capture import CapturedModel
from compiler.data import BATCH_AXIS
from isthmus.bundle import TensorSpec
from isthmus.tensors import DTYPES, Array

LENGTH: Final = 64  # of an axis that may be of any length
_UNBOUNDED: Final = 2  # integers below it suit every use: an index, a flag


def invent_samples(model: CapturedModel, count: int, *, seed: int = 0) -> dict[str, Array]:
    """Return `count` samples for each input, the first axis counts them.

    Floating-point inputs are normally distributed, integers are indices of the table that they are looked up in, where
    the graph has one, and masks are ones.
    """
    rng = np.random.default_rng(seed)
    tables = _tables(model)
    return {spec.name: _invent(spec, _shape(spec, model, count), tables, rng) for spec in model.inputs}


def _shape(spec: TensorSpec, model: CapturedModel, count: int) -> tuple[int, ...]:
    names = model.axes.get(spec.name, ("",) * len(spec.shape))
    sizes = [
        size if size > 0 else 1 if name == BATCH_AXIS else _length(model, name)
        for size, name in zip(spec.shape, names, strict=True)
    ]
    in_front = spec.shape[:1] == (-1,) or (spec.shape[:1] == (1,) and BATCH_AXIS not in names)
    return (count, *sizes[1:]) if in_front else (count, *sizes)


def _length(model: CapturedModel, axis: str) -> int:
    shortest, longest = model.lengths.get(axis, (1, LENGTH))
    return max(shortest, min(longest, LENGTH))


def _invent(spec: TensorSpec, shape: tuple[int, ...], tables: dict[str, int], rng: np.random.Generator) -> Array:
    dtype = DTYPES[spec.datatype]
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if "mask" in spec.name or dtype.kind == "b":
        return np.ones(shape, dtype)
    return rng.integers(0, min(tables.get(spec.name, _UNBOUNDED), np.iinfo(dtype).max), shape).astype(dtype)


def _tables(model: CapturedModel) -> dict[str, int]:
    """Return the number of rows of the table that an input is an index of, for those that are."""
    import onnx

    graph = onnx.load_model(str(model.path), load_external_data=False).graph
    rows = {tensor.name: int(tensor.dims[0]) for tensor in graph.initializer if tensor.dims}
    casts: dict[str, Any] = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    return {
        casts.get(node.input[1], node.input[1]): rows[node.input[0]]
        for node in graph.node
        if node.op_type == "Gather" and node.input[0] in rows
    }
