"""The ONNX graph that TensorRT is given: folded, and with the datatypes that the precision asks for.

TensorRT's networks are strongly typed here: every layer computes in the type that the graph says, never in one that the
builder picks. So the precision is made in the graph, where it can be looked at and run by ONNX Runtime, too:

* fp32: the graph as it is, after constants are folded (with symbolic axes kept);
* fp16: weights and activations in half precision; inputs and outputs keep their types, and operators that overflow or
  lose too much in half precision (normalisation, reductions, softmax, powers, and those whose values are too large for
  the samples, where there are some) stay in single precision between casts;
* int8: explicit QuantizeLinear and DequantizeLinear pairs, signed and symmetric as TensorRT wants them, weights per
  channel; convolutions and products with constant weights are quantized, all else stays in single precision.
"""

from __future__ import annotations

import graphlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime

from compiler.capture import CapturedModel
from compiler.data import BATCH_AXIS, is_batchable, request, requests
from compiler.targets import BuildOptions, UnsupportedModelError
from isthmus.errors import InputError
from isthmus.tensors import DTYPES, Array

_ERRORS_ONLY: Final = 3  # ONNX Runtime's logging severity
_STANDARD: Final = ("", "ai.onnx")
_SINGLE: Final = (
    "Cos", "Exp", "InstanceNormalization", "LayerNormalization", "Log", "LogSoftmax", "LpNormalization", "Pow",
    "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "RMSNormalization",
    "Sin", "Softmax", "Sqrt",
)  # fmt: skip
_CHANNEL_AXIS: Final = {"Conv": 0, "Gemm": 1, "MatMul": 1}  # of the weights, of what is quantized
_AXIS_OPSET: Final = 13  # the first where QuantizeLinear has an axis
_INT8_MAX: Final = 127
_HALF_MAX: Final = 32752.0  # half of the largest number in half precision: other inputs than the samples get near it
_CONTROL_FLOW: Final = ("If", "Loop", "Scan")
_MOST_SHAPES: Final = 512  # that a graph is asked for, to see what it does
_CALIBRATION_BATCH: Final = 32
_CHECKED_ROWS: Final = 8
_LEAST_COSINE: Final = 0.9  # far below what any usable conversion gives


def typed_graph(model: CapturedModel, options: BuildOptions, title: str) -> onnx.ModelProto:
    """Return the model's graph for `options.precision`; `title` names the library in errors.

    Raises:
        InputError: int8 without samples, or samples that the model cannot take.
        UnsupportedModelError: The graph holds operators outside the ONNX standard, or cannot be converted.
    """
    graph = folded(model, options)
    _refuse_foreign(graph, title)
    if options.precision == "fp16":
        graph = _half(graph, model, options.samples, title)
    elif options.precision == "int8":
        if options.samples is None:
            raise InputError("int8 needs samples of typical inputs")
        graph = _quantized(graph, model, options.samples, title)
    if options.precision != "fp32" and options.samples is not None:
        _refuse_ruined(model, graph, options.samples, options.precision)
    return graph


def folded(model: CapturedModel, options: BuildOptions) -> onnx.ModelProto:
    """Return the model's graph after ONNX Runtime's basic optimizations, or as it is where they leave the standard.

    They fold constants, drop branches of If that are never taken, and fuse batch normalisation into convolutions. Where
    an If asks only for shapes, and gets the same answer for every size of every axis, the branch that it takes becomes
    part of the graph: exporters write such an If for every squeeze.
    """
    original = onnx.load(model.path)
    graph = _optimized(str(model.path), original)
    while any(node.op_type == "If" for node in graph.graph.node) and _take_branches(graph, model, options):
        graph = _optimized(graph.SerializeToString(), graph)
    return graph


def _optimized(source: str | bytes, original: onnx.ModelProto) -> onnx.ModelProto:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = _ERRORS_ONLY
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        try:
            onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            graph = onnx.load(options.optimized_model_filepath)
        except Exception:  # its exceptions share no base class; TensorRT may well take what ONNX Runtime does not
            return original
    before = {node.domain for node in nodes_of(original.graph)}
    after = {node.domain for node in nodes_of(graph.graph)}
    if not after <= before | set(_STANDARD):
        return original
    used = [entry for entry in graph.opset_import if entry.domain in after or entry.domain in _STANDARD]
    del graph.opset_import[:]
    graph.opset_import.extend(used)
    return graph


def _take_branches(graph: onnx.ModelProto, model: CapturedModel, options: BuildOptions) -> bool:
    """Replace each outer If that shapes decide, always alike, by its branch; return whether there was one."""
    makers = {output: node for node in graph.graph.node for output in node.output}
    ends = {value.name for value in graph.graph.input}
    asks = [node for node in graph.graph.node if node.op_type == "If" and _asks_for_shapes(node.input[0], makers, ends)]
    if not asks:
        return False
    asking = onnx.ModelProto()
    asking.CopyFrom(graph)
    names = sorted({node.input[0] for node in asks})
    del asking.graph.output[:]
    asking.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, None) for name in names)
    answers = []
    try:
        session = _session(asking.SerializeToString())
        for shapes in _every_shape(model, options):
            inputs = {spec.name: np.zeros(shapes[spec.name], DTYPES[spec.datatype]) for spec in model.inputs}
            answers.append([bool(np.all(answer)) for answer in session.run(names, inputs)])
    except Exception:  # its exceptions share no base class; zeros may be no input for this model
        return False
    certain = {
        name: found[0] for name, found in zip(names, zip(*answers, strict=True), strict=False) if len({*found}) == 1
    }
    taken = [node for node in asks if node.input[0] in certain]
    for node in taken:
        _inline(graph.graph, node, "then_branch" if certain[node.input[0]] else "else_branch")
    return bool(taken)


def _every_shape(model: CapturedModel, options: BuildOptions) -> list[dict[str, list[int]]]:
    """Return the inputs' shapes with each axis in all its sizes, others at their shortest; nothing when too many."""
    ranges = dict(model.lengths) | {BATCH_AXIS: (1, options.max_batch)}
    axes = {spec.name: model.axes.get(spec.name, ()) for spec in model.inputs}
    varying = sorted({axis for names in axes.values() for axis in names if axis})
    if not all(axis in ranges for axis in varying) or any(len(axes[s.name]) != len(s.shape) for s in model.inputs):
        return []
    shortest = {axis: ranges[axis][0] for axis in varying}
    sizes = [shortest | {axis: size} for axis in varying for size in range(ranges[axis][0], ranges[axis][1] + 1)]
    sizes.append({axis: ranges[axis][1] for axis in varying})
    if len(sizes) > _MOST_SHAPES:
        return []
    return [
        {
            spec.name: [size[name] if name else axis for name, axis in zip(axes[spec.name], spec.shape, strict=True)]
            for spec in model.inputs
        }
        for size in sizes
    ]


def _asks_for_shapes(condition: str, makers: Mapping[str, onnx.NodeProto], ends: set[str]) -> bool:
    """Return whether a value depends on the inputs, `ends`, through their shapes only."""
    waiting, seen = {condition}, set[str]()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        if name in ends or (name in makers and makers[name].op_type in _CONTROL_FLOW):
            return False
        if name in makers and makers[name].op_type not in ("Shape", "Size"):
            waiting.update(set(makers[name].input) - seen)
    return True


def _inline(graph: onnx.GraphProto, choice: onnx.NodeProto, branch: str) -> None:
    nested = next(attribute.g for attribute in choice.attribute if attribute.name == branch)
    nodes = []
    for node in graph.node:
        if node.output[:] != choice.output[:]:
            nodes.append(node)
            continue
        nodes.extend(nested.node)
        nodes.extend(
            onnx.helper.make_node("Identity", [inner.name], [outer], name=f"{choice.name}.{outer}")
            for inner, outer in zip(nested.output, choice.output, strict=True)
        )
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    graph.initializer.extend(nested.initializer)
    del graph.node[:]
    graph.node.extend(kept)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield all nodes of a graph, those of nested graphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for nested in (attribute.g, *attribute.graphs):
                yield from nodes_of(nested)


def _refuse_foreign(graph: onnx.ModelProto, title: str) -> None:
    for node in nodes_of(graph.graph):
        if node.domain not in _STANDARD:
            raise UnsupportedModelError(
                f"{title} cannot take operator {node.domain}.{node.op_type} (node {node.name!r})",
                hint="use target onnxruntime, which has this operator",
            )


def _half(
    graph: onnx.ModelProto, model: CapturedModel, samples: Mapping[str, Array] | None, title: str
) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    for index, node in enumerate(graph.graph.node):
        node.name = node.name or f"{node.op_type}.{index}"
    overflowing = [] if samples is None else _overflowing(graph, model, samples)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for every weight that is clamped; what they do is checked afterwards
            converted: onnx.ModelProto = convert_float_to_float16(
                graph,
                keep_io_types=True,
                op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_SINGLE],
                node_block_list=overflowing,
            )
    except Exception as error:  # it raises whatever it stumbles over
        raise UnsupportedModelError(
            f"the graph cannot be converted to fp16 for {title}: {str(error)[:300]}", hint="use precision fp32"
        ) from error
    del converted.graph.value_info[:]  # some still say fp32
    _sort(converted.graph)
    _drop_round_trips(converted)
    return converted


def _overflowing(graph: onnx.ModelProto, model: CapturedModel, samples: Mapping[str, Array]) -> list[str]:
    """Return the nodes that make or take values too large for half precision, for the samples."""
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    floats = {
        value.name
        for value in (*inferred.value_info, *inferred.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    made = [output for node in graph.graph.node for output in node.output if output in floats]
    largest = _largest(graph, made, model, samples)
    huge = {name for name, value in largest.items() if not value <= _HALF_MAX}
    return [node.name for node in graph.graph.node if huge.intersection((*node.input, *node.output))]


def _sort(graph: onnx.GraphProto) -> None:
    """Put the nodes in order, and leave one of each cast: the converter appends them, once for every node it meets."""
    nodes = list({tuple(node.output): node for node in reversed(graph.node)}.values())[::-1]
    maker = {output: index for index, node in enumerate(nodes) for output in node.output if output}
    needs = {
        index: [maker[name] for name in _inputs(node) if name in maker and maker[name] != index]
        for index, node in enumerate(nodes)
    }
    ordered = [nodes[index] for index in graphlib.TopologicalSorter(needs).static_order()]
    del graph.node[:]
    graph.node.extend(ordered)


def _inputs(node: onnx.NodeProto) -> Iterator[str]:
    """Yield what a node takes, its nested graphs too."""
    yield from node.input
    for attribute in node.attribute:
        for nested in (attribute.g, *attribute.graphs):
            for inner in nodes_of(nested):
                yield from inner.input


def _drop_round_trips(graph: onnx.ModelProto) -> None:
    """Leave values in single precision from one node that computes in it to the next: the converter halves them."""
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    single = {
        value.name
        for value in (*inferred.value_info, *inferred.input)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    halved = {
        node.output[0]: node.input[0]
        for node in graph.graph.node
        if _casts_to(node, onnx.TensorProto.FLOAT16) and node.input[0] in single
    }
    for node in graph.graph.node:
        if _casts_to(node, onnx.TensorProto.FLOAT) and node.input[0] in halved:
            node.op_type = "Identity"
            node.input[0] = halved[node.input[0]]
            del node.attribute[:]


def _casts_to(node: onnx.NodeProto, datatype: int) -> bool:
    return node.op_type == "Cast" and node.attribute[0].i == datatype


def _quantized(
    graph: onnx.ModelProto, model: CapturedModel, samples: Mapping[str, Array], title: str
) -> onnx.ModelProto:
    """Put a pair of QuantizeLinear and DequantizeLinear before both inputs of every layer that can be quantized."""
    graph = _with_axis(graph, title)
    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    layers = [
        node
        for node in graph.graph.node
        if node.op_type in _CHANNEL_AXIS
        and node.input[1] in weights
        and weights[node.input[1]].data_type == onnx.TensorProto.FLOAT
        and node.input[0] not in weights
    ]
    if not layers:
        raise UnsupportedModelError(
            f"nothing in the model can be quantized for {title}: no {', '.join(_CHANNEL_AXIS)} with constant weights",
            hint="use precision fp16 or fp32",
        )
    largest = _largest(graph, sorted({node.input[0] for node in layers}), model, samples)
    wild = [name for name, value in largest.items() if not np.isfinite(value)]
    if wild:
        raise UnsupportedModelError(
            f"int8 for {title}: tensor {wild[0]!r} is not finite for the samples", hint="use precision fp32"
        )
    pairs: dict[str, list[onnx.NodeProto]] = {}  # of the tensor that they quantize
    for node in layers:
        activation, kernel = node.input[0], node.input[1]
        if activation not in pairs:
            pairs[activation] = _pair(graph, activation, np.array(largest[activation]), None)
        array = onnx.numpy_helper.to_array(weights[kernel])
        axis = _CHANNEL_AXIS[node.op_type] if not _is_transposed(node) else 0
        if kernel not in pairs:
            whole = array.ndim != 2 and node.op_type == "MatMul"  # a stack of products has one scale for all
            others = None if whole else tuple(other for other in range(array.ndim) if other != axis)
            pairs[kernel] = _pair(graph, kernel, np.abs(array).max(axis=others), None if whole else axis)
        node.input[0], node.input[1] = pairs[activation][1].output[0], pairs[kernel][1].output[0]
    _insert(graph.graph, pairs)
    return graph


def _with_axis(graph: onnx.ModelProto, title: str) -> onnx.ModelProto:
    """Return the graph in an opset where scales can differ from channel to channel."""
    version = next(entry.version for entry in graph.opset_import if entry.domain in _STANDARD)
    if version >= _AXIS_OPSET:
        return graph
    try:
        converted: onnx.ModelProto = onnx.version_converter.convert_version(graph, _AXIS_OPSET)
    except Exception as error:  # it raises whatever it stumbles over
        raise UnsupportedModelError(
            f"int8 for {title} needs opset {_AXIS_OPSET}, the model has {version} and cannot be converted: "
            f"{str(error)[:200]}",
            hint=f"export the model with opset {_AXIS_OPSET} or later, or use precision fp16",
        ) from error
    return converted


def _is_transposed(node: onnx.NodeProto) -> bool:
    return node.op_type == "Gemm" and any(entry.name == "transB" and entry.i for entry in node.attribute)


def _largest(
    graph: onnx.ModelProto,
    tensors: Sequence[str],
    model: CapturedModel,
    samples: Mapping[str, Array],
) -> dict[str, float]:
    """Return the largest magnitude that each tensor has for the samples."""
    measuring = onnx.ModelProto()
    measuring.CopyFrom(graph)
    for index, name in enumerate(tensors):
        measuring.graph.node.extend(
            [
                onnx.helper.make_node("Abs", [name], [f"magnitude.{index}"]),
                onnx.helper.make_node("ReduceMax", [f"magnitude.{index}"], [f"largest.{index}"], keepdims=0),
            ]
        )
        measuring.graph.output.append(
            onnx.helper.make_tensor_value_info(f"largest.{index}", onnx.TensorProto.FLOAT, [])
        )
    names = [f"largest.{index}" for index in range(len(tensors))]
    session = _session(measuring.SerializeToString())
    largest = np.zeros(len(tensors))
    for _, inputs in requests(model, samples, _CALIBRATION_BATCH):
        try:
            found = session.run(names, inputs)
        except Exception as error:  # its exceptions share no base class
            raise InputError(f"the model cannot take the samples: {str(error)[:300]}") from error
        largest = np.maximum(largest, found)
    return dict(zip(tensors, largest.tolist(), strict=True))


def _pair(graph: onnx.ModelProto, tensor: str, largest: Array, axis: int | None) -> list[onnx.NodeProto]:
    """Return the two nodes that quantize a tensor, and add their scale and zero point to the graph."""
    scale = np.maximum(np.asarray(largest, np.float32) / np.float32(_INT8_MAX), np.finfo(np.float32).tiny)
    names = [f"{tensor}.scale", f"{tensor}.zero"]
    arrays = [scale, np.zeros(scale.shape, np.int8)]
    graph.graph.initializer.extend(map(onnx.numpy_helper.from_array, arrays, names))
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    nodes = []
    for operator, before, after in (
        ("QuantizeLinear", tensor, "int8"),
        ("DequantizeLinear", f"{tensor}.int8", "rounded"),
    ):
        output = f"{tensor}.{after}"
        nodes.append(onnx.helper.make_node(operator, [before, *names], [output], name=f"{output}_node", **attributes))
    return nodes


def _insert(graph: onnx.GraphProto, pairs: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Put each pair right after what makes its tensor, so that the nodes stay in order."""
    made = {output for node in graph.node for output in node.output}
    nodes = [node for tensor, pair in pairs.items() if tensor not in made for node in pair]
    for node in graph.node:
        nodes.append(node)
        for output in node.output:
            nodes.extend(pairs.get(output, ()))
    del graph.node[:]
    graph.node.extend(nodes)


def _session(source: str | bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _refuse_ruined(model: CapturedModel, graph: onnx.ModelProto, samples: Mapping[str, Array], precision: str) -> None:
    """Run the source and the typed graph in ONNX Runtime: what is ruined there will not be right on a GPU."""
    rows = min(len(samples[model.inputs[0].name]), _CHECKED_ROWS if is_batchable(model) else 1)
    inputs = request(model, samples, 0, rows)
    names = [spec.name for spec in model.outputs]
    answers = []
    for source in (str(model.path), graph.SerializeToString()):
        try:
            answers.append(dict(zip(names, _session(source).run(names, inputs), strict=True)))
        except Exception as error:  # its exceptions share no base class
            raise UnsupportedModelError(
                f"the graph in {precision} cannot be checked: ONNX Runtime: {str(error)[:300]}",
                hint="use precision fp32",
            ) from error
    for spec in model.outputs:
        want, got = (np.asarray(answer[spec.name], np.float64).ravel() for answer in answers)
        finite = bool(np.isfinite(got).all())
        if spec.datatype not in ("FP16", "FP32") or (finite and _cosine(want, got) >= _LEAST_COSINE):
            continue
        what = f"has cosine {_cosine(want, got):.3f} with the source" if finite else "holds values that are not finite"
        raise UnsupportedModelError(
            f"in {precision} output {spec.name!r} {what}, for the first {rows} samples",
            hint=f"use {'precision fp32' if precision == 'fp16' else 'precision fp16 or fp32'}, or other samples",
        )


def _cosine(first: Array, second: Array) -> float:
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms else float(np.array_equal(first, second))
