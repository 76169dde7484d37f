"""A graph as the targets want it: only the inputs and outputs that were asked for, and nothing about where it was made.

Exporters write stack traces with the paths of the machine into every node; they say nothing about what the model
computes, and would give the same model other bytes elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final

import numpy as np

from compiler.sources.onnx_file import graphs_of
from isthmus.errors import InputError

_PRODUCER: Final = "isthmus"
_MAX_CONSTANT: Final = 1 << 20  # elements of an input that is given one value


def strip(model: Any) -> None:
    """Take out doc strings, metadata, training graphs and the producer's name and version."""
    for field in ("doc_string", "metadata_props", "training_info", "configuration", "producer_version", "domain"):
        model.ClearField(field)
    model.producer_name = _PRODUCER
    model.ClearField("model_version")
    for graph in graphs_of(model):
        for field in ("doc_string", "metadata_props"):
            graph.ClearField(field)
        for values in (graph.input, graph.output, graph.value_info, getattr(graph, "initializer", ())):
            for value in values:
                if not isinstance(value, str):
                    value.ClearField("doc_string")
                    value.ClearField("metadata_props")
        for node in graph.node:
            for field in ("doc_string", "metadata_props", "device_configurations"):
                node.ClearField(field)
            for attribute in node.attribute:
                attribute.ClearField("doc_string")


def drop_weight_inputs(model: Any) -> None:
    """Take weights out of the inputs: old files list them there, as values that a caller may override."""
    weights = {tensor.name for tensor in model.graph.initializer}
    _keep(model.graph.input, [value for value in model.graph.input if value.name not in weights])


def keep_outputs(model: Any, outputs: Sequence[str], what: str) -> None:
    """Keep these outputs in this order, and the operators that they need.

    Raises:
        InputError: There is no such output, or one is named twice.
    """
    known = {value.name: value for value in model.graph.output}
    for name in outputs:
        if name not in known:
            raise _no_such("output", name, known, what)
    if len(set(outputs)) < len(outputs):
        raise InputError(f"{what}: expected each output once, got {', '.join(outputs)}")
    _keep(model.graph.output, [known[name] for name in outputs])
    _prune(model.graph)


def bake_constants(model: Any, constants: Mapping[str, float | int], what: str) -> None:
    """Replace inputs by a tensor that holds one value everywhere.

    An input with symbolic axes takes its shape from another input with the same ones.

    Raises:
        InputError: There is no such input, it cannot hold the value, or no other input has its axes.
    """
    inputs = {value.name: value for value in model.graph.input}
    for name in constants:
        if name not in inputs:
            raise _no_such("input", name, inputs, what)
    _keep(model.graph.input, [value for name, value in inputs.items() if name not in constants])
    if constants and not model.graph.input:
        raise InputError(f"{what}: expected at least one input that is not a constant")
    for name, number in constants.items():
        _bake(model, inputs[name], number, what)


def _bake(model: Any, value: Any, number: float, what: str) -> None:
    from onnx import helper, numpy_helper

    tensor = value.type.tensor_type
    try:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        array = np.asarray(number).astype(dtype)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{what}: constant {value.name!r}: {number} does not fit the input's datatype") from error
    if dtype.kind in "iub" and int(array) != number:
        raise InputError(f"{what}: constant {value.name!r}: expected a value of type {dtype}, got {number}")
    dims = list(tensor.shape.dim)
    sizes = [dim.dim_value for dim in dims]
    if all(dim.dim_value > 0 for dim in dims):
        if int(np.prod(sizes, dtype=np.int64)) > _MAX_CONSTANT:
            raise InputError(f"{what}: constant {value.name!r}: expected at most {_MAX_CONSTANT} elements, got {sizes}")
        model.graph.initializer.append(numpy_helper.from_array(np.full(sizes, array), value.name))
        return
    axes = tensor.shape.SerializeToString(deterministic=True)
    shapes = {one.name: one.type.tensor_type.shape.SerializeToString(deterministic=True) for one in model.graph.input}
    twin = next((name for name, shape in shapes.items() if shape == axes), None)
    if twin is None:
        raise InputError(f"{what}: constant {value.name!r}: its size is unknown, for no other input has its axes")
    size = f"{value.name}_shape"
    nodes = [
        helper.make_node("Shape", [twin], [size], name=size),
        helper.make_node(
            "ConstantOfShape", [size], [value.name], name=f"{value.name}_constant",
            value=numpy_helper.from_array(array.reshape(1), "value"),
        ),
    ]  # fmt: skip
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def _no_such(kind: str, name: str, known: Mapping[str, Any], what: str) -> InputError:
    close = get_close_matches(name, known, n=1)
    return InputError(
        f"{what}: there is no {kind} {name[:200]!r}; there are {', '.join(known)[:300]}",
        hint=f"did you mean {close[0]}?" if close else "mend the recipe",
    )


def _keep(field: Any, values: Sequence[Any]) -> None:
    kept = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(kept)


def _prune(graph: Any) -> None:
    """Take out operators and weights that no output needs."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        kept.append(node)
        needed.update(_used(node))
    _keep(graph.node, kept[::-1])
    for field in (graph.initializer, graph.value_info):
        for index in range(len(field) - 1, -1, -1):
            if field[index].name not in needed:
                del field[index]


def _used(node: Any) -> Iterator[str]:
    """Yield what the node reads, in the graphs inside it too."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from _used(inner)
