"""Takes the branch that an If always takes.

Exporters write Ifs over what is known once shapes and constants are fixed: a sampling rate, the number of axes. ONNX
Runtime's optimizer folds most of them, but some crash it (1.31: a branch that uses a value which was folded before), so
they are resolved before it sees the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator


def take_branches(model: Any) -> Any:
    """Return the ONNX model with every If whose condition is known replaced by its branch; shapes must be fixed."""
    graph = model.graph
    while any(node.op_type == "If" for node in graph.node):
        _write_shapes_down(model)
        known = {node.name or node.output[0]: _condition(model, node) for node in graph.node if node.op_type == "If"}
        if all(value is None for value in known.values()):
            break
        nodes = []
        for node in graph.node:
            value = known.get(node.name or node.output[0]) if node.op_type == "If" else None
            nodes += [node] if value is None else _branch(model, node, taken=value)
        del graph.node[:]
        graph.node.extend(nodes)
    return model


def _write_shapes_down(model: Any) -> None:
    """Replace every Shape of a tensor whose shape is known by a constant."""
    if not any(node.op_type == "Shape" for node in model.graph.node):
        return
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.value_info)
        if value.type.tensor_type.HasField("shape")
    }
    for node in model.graph.node:
        shape = shapes.get(node.input[0]) if node.op_type == "Shape" else None
        if shape is not None and 0 not in shape:
            at = {attribute.name: attribute.i for attribute in node.attribute}
            part = shape[at.get("start", 0) : at.get("end", len(shape))]
            value = numpy_helper.from_array(np.array(part, np.int64))
            node.CopyFrom(helper.make_node("Constant", [], list(node.output), name=node.name, value=value))


def _condition(model: Any, node: Any) -> bool | None:
    """Return what the If's condition always is; None when it depends on the model's inputs."""
    makers = {name: maker for maker in model.graph.node for name in maker.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    needed: list[Any] = []
    used: dict[str, Any] = {}
    ahead, seen = [node.input[0]], set()
    while ahead:
        name = ahead.pop()
        if name in seen or not name:
            continue
        seen.add(name)
        if name in constants:
            used[name] = constants[name]
        elif name not in makers or any(attribute.HasField("g") for attribute in makers[name].attribute):
            return None
        elif not any(maker is makers[name] for maker in needed):
            needed.append(makers[name])
            ahead += makers[name].input
    order = {id(maker): place for place, maker in enumerate(model.graph.node)}
    needed.sort(key=lambda maker: order[id(maker)])
    result = helper.make_empty_tensor_value_info(node.input[0])
    graph = helper.make_graph(needed, "condition", [], [result], list(used.values()))
    if not needed:
        return bool(numpy_helper.to_array(used[node.input[0]]).item())
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    answers: Any = ReferenceEvaluator(alone).run(None, {})
    return bool(np.asarray(answers[0]).item())


def _branch(model: Any, node: Any, *, taken: bool) -> list[Any]:
    """Return the nodes of the If's branch, under names of their own; its constants become the model's."""
    name = "then_branch" if taken else "else_branch"
    branch = next(attribute.g for attribute in node.attribute if attribute.name == name)
    prefix = f"{node.name or node.output[0]}/{name}"
    own = {made: f"{prefix}/{made}" for inner in branch.node for made in inner.output if made}
    own |= {tensor.name: f"{prefix}/{tensor.name}" for tensor in branch.initializer}
    for tensor in branch.initializer:
        tensor.name = own[tensor.name]
        model.graph.initializer.append(tensor)
    for inner in branch.node:
        inner.output[:] = [own.get(made, made) for made in inner.output]
        _rename_inputs(inner, own)
    results = [
        helper.make_node("Identity", [own.get(result.name, result.name)], [output], name=f"{prefix}/{output}/out")
        for result, output in zip(branch.output, node.output, strict=True)
    ]
    return [*branch.node, *results]


def _rename_inputs(node: Any, names: Mapping[str, str]) -> None:
    node.input[:] = [names.get(name, name) for name in node.input]
    for nested in _graphs(node):
        for inner in nested.node:
            _rename_inputs(inner, names)
        for result in nested.output:
            result.name = names.get(result.name, result.name)


def _graphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
