"""From a captured ONNX model to Relax: every axis fixed, everything constant folded, every tensor accounted for.

TVM's ONNX frontend reads static graphs well and dynamic ones badly. The steps of `import_model`:
 (1) every symbolic axis gets its one length: the batch 1, others what the recipe fixes;
 (2) branches whose condition is known then are taken (`tvm_branches`);
 (3) ONNX Runtime's basic optimizer folds what became constant (shapes, ranges, masks) and drops what nobody needs;
 (4) what the frontend and this module lack is refused with the operator's and the node's name;
 (5) the frontend converts node by node, and says at which one it failed; recurrent operators are ours
     (`tvm_recurrent`);
 (6) lookups are made safe: TVM's default reads wherever an index points, outside of the table too.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime

from compiler.capture import CapturedModel
from compiler.targets import UnsupportedModelError
from compiler.targets.tvm_branches import take_branches
from compiler.targets.tvm_recurrent import GATES, Recurrences
from isthmus.bundle import TensorSpec
from isthmus.tvm_artifact import Port

BATCH: Final = "batch"
_INSTEAD: Final = "use the target openvino or onnxruntime for this model instead"
_PASSED_THROUGH: Final = {"Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Identity"}
_DOMAINS: Final = {"", "ai.onnx", "com.microsoft"}


@dataclass(frozen=True, slots=True)
class Imported:
    """A Relax module whose `main` takes and gives tensors of fixed shapes."""

    module: Any  # tvm.IRModule
    kernels: Mapping[str, Any]  # functions that `module` calls by name, scheduled: to be added when it is lowered
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def import_model(model: CapturedModel) -> Imported:
    """Return the model as Relax, for one row at a time.

    Raises:
        UnsupportedModelError: An axis has no fixed length, or TVM's frontend cannot take an operator.
    """
    graph = fold(take_branches(fixed(onnx.load(model.path), model)))
    check_operators(graph)
    module, kernels = _convert(graph)
    main = module["main"]
    inputs = tuple(
        _input_port(spec, graph, model) for spec in (_spec_of(model.inputs, value.name) for value in graph.graph.input)
    )
    if len(main.params) != len(inputs):
        raise UnsupportedModelError(f"TVM's frontend made {len(main.params)} inputs of {len(inputs)}", hint=_INSTEAD)
    types = list(main.ret_ty.fields) if hasattr(main.ret_ty, "fields") else [main.ret_ty]
    outputs = tuple(
        _output_port(_spec_of(model.outputs, value.name), kind, model)
        for value, kind in zip(graph.graph.output, types, strict=True)
    )
    return Imported(module, kernels, inputs, outputs)


def fixed(graph: Any, model: CapturedModel) -> Any:
    """Return the ONNX model with every input of a fixed shape, and no shapes written down but the inputs'.

    Raises:
        UnsupportedModelError: A symbolic axis is neither the batch nor of one length.
    """
    specs = {spec.name: spec for spec in model.inputs}
    for value in graph.graph.input:
        if value.name not in specs:
            continue  # a weight, in the old style
        dims = value.type.tensor_type.shape.dim
        for dim, size in zip(dims, _fixed_shape(specs[value.name], model), strict=True):
            dim.Clear()
            dim.dim_value = size
    for value in graph.graph.output:
        value.type.tensor_type.ClearField("shape")
    del graph.graph.value_info[:]
    return graph


def _fixed_shape(spec: TensorSpec, model: CapturedModel) -> list[int]:
    sizes = []
    for size, axis in zip(spec.shape, model.axes[spec.name], strict=True):
        if size != -1:
            sizes.append(size)
        elif axis == BATCH:
            sizes.append(1)
        else:
            shortest, longest = model.lengths.get(axis, (0, 0))
            if not shortest == longest > 0:
                raise UnsupportedModelError(
                    f"TVM compiles for one length, and {axis!r} of input {spec.name!r} may vary",
                    hint=f"fix the length in the recipe, for example [light.lengths] {axis} = 64, "
                    "or use the target openvino or onnxruntime",
                )
            sizes.append(longest)
    return sizes


def fold(graph: Any) -> Any:
    """Return the model after ONNX Runtime's basic optimizer: what is constant at these shapes is folded.

    Raises:
        UnsupportedModelError: ONNX Runtime cannot take the model at these shapes.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3  # errors, which also come as exceptions
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory(prefix="isthmus-tvm-") as folder:
        source, folded = Path(folder) / "fixed.onnx", Path(folder) / "folded.onnx"
        onnx.save(graph, source)
        options.optimized_model_filepath = str(folded)
        try:
            onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class
            raise UnsupportedModelError(
                f"the model cannot be fixed to one row: {str(error)[:300]}", hint=_INSTEAD
            ) from error
        return onnx.load(folded)


def check_operators(graph: Any) -> None:
    """Check that TVM's ONNX frontend knows every operator.

    Raises:
        UnsupportedModelError: It does not; the message names the operator and the node.
    """
    from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

    known = {*_get_convert_map(), *GATES, "If", "Constant"}
    for node in _nodes(graph.graph):
        if node.op_type not in known or node.domain not in _DOMAINS:
            raise unsupported(node.op_type, node.name)


def unsupported(operator: str, node: str, why: str = "") -> UnsupportedModelError:
    """Return the error that says that TVM cannot take an operator."""
    return UnsupportedModelError(
        f"TVM cannot take operator {operator} (node {node!r})" + (f": {why[:300]}" if why else ""), hint=_INSTEAD
    )


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for nested in (attribute.g, *attribute.graphs):
                yield from _nodes(nested)


def _convert(graph: Any) -> tuple[Any, Mapping[str, Any]]:
    from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

    class Importer(ONNXGraphImporter):  # type: ignore[misc]
        """TVM's importer, which also knows where it is."""

        at: tuple[str, str] | None = None

        def _convert_operator(self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int) -> Any:
            self.at = (op_name, attrs["tvm_custom"]["name"])
            if op_name in GATES:
                return recurrences.convert(self.bb, op_name, inputs, attrs)
            if op_name == "ConvTranspose" and _is_disjoint(inputs, attrs):
                return _disjoint_transpose(self.bb, inputs)
            return super()._convert_operator(op_name, inputs, attrs, opset)

        def _check_for_unsupported_ops(self, graph: Any) -> None:
            """`check_operators` has looked already, and knows of those that are ours."""

    opset = next(entry.version for entry in graph.opset_import if entry.domain in {"", "ai.onnx"})
    recurrences = Recurrences()
    importer = Importer({}, "float32")
    try:
        # On an error it prints the operator's inputs, whole weights among them.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importer.from_onnx(graph.graph, opset)
    except Exception as error:  # the frontend raises whatever Python and TVM raise
        why = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise unsupported(*(importer.at or ("?", "?")), why) from error
    return _with_safe_lookups(module), recurrences.kernels


def _is_disjoint(inputs: Any, attributes: Mapping[str, Any]) -> bool:
    """Return whether a transposed convolution writes every pixel once: its stride is its kernel's size."""
    from tvm.ir import GenericConst

    kernel = inputs[1]
    if not isinstance(kernel, GenericConst) or len(kernel.ty.shape.values) != 4:
        return False
    size = [int(axis) for axis in kernel.ty.shape.values[2:]]
    plain = attributes.get("auto_pad", b"NOTSET") in {b"NOTSET", b"VALID"} and attributes.get("group", 1) == 1
    padded = any(attributes.get("pads", ())) or any(attributes.get("output_padding", ()))
    return plain and not padded and list(attributes.get("strides", ())) == size and "output_shape" not in attributes


def _disjoint_transpose(builder: Any, inputs: Any) -> Any:
    """Return a transposed convolution as a convolution of single pixels whose channels become squares of pixels.

    Relax has no transposed convolution with channels last, and its loops are many times slower than this.
    """
    from tvm import relax

    batch, channels, height, width = (int(axis) for axis in inputs[0].ty.shape.values)
    kernel = inputs[1].value.numpy()
    _, outputs, down, across = kernel.shape
    pixels = kernel.transpose(1, 2, 3, 0).reshape(outputs * down * across, channels, 1, 1)
    squares = relax.op.nn.conv2d(inputs[0], relax.const(np.ascontiguousarray(pixels)))
    apart = relax.op.reshape(squares, (batch, outputs, down, across, height, width))
    mixed = relax.op.permute_dims(apart, [0, 1, 4, 2, 5, 3])
    result = relax.op.reshape(mixed, (batch, outputs, height * down, width * across))
    if len(inputs) > 2 and inputs[2] is not None:
        result = relax.op.add(result, relax.op.reshape(inputs[2], (1, outputs, 1, 1)))
    return builder.normalize(result)


def _with_safe_lookups(module: Any) -> Any:
    """Keep every lookup inside its table; return the module."""
    from tvm import relax
    from tvm.ir import Op

    take = Op.get("relax.take")

    @relax.expr_functor.mutator
    class Clamp(relax.PyExprMutator):  # type: ignore[misc]
        def visit_call_(self, call: Any) -> Any:
            call = self.visit_expr_post_order(call)
            if call.op == take and str(call.attrs.mode) == "fast":
                return relax.op.take(call.args[0], call.args[1], call.attrs.axis, mode="clip")
            return call

    module.update_func(module.get_global_var("main"), Clamp(module).visit_expr(module["main"]))
    return module


def _spec_of(specs: tuple[TensorSpec, ...], name: str) -> TensorSpec:
    return next(spec for spec in specs if spec.name == name)


def _batch_axis(spec: TensorSpec, model: CapturedModel) -> int | None:
    names = model.axes[spec.name]
    return names.index(BATCH) if BATCH in names else None


def _input_port(spec: TensorSpec, graph: Any, model: CapturedModel) -> Port:
    low, high = _index_bounds(spec.name, graph.graph)
    return Port(
        name=spec.name,
        datatype=spec.datatype,
        shape=tuple(_fixed_shape(spec, model)),
        batch_axis=_batch_axis(spec, model),
        low=low,
        high=high,
    )


def _output_port(spec: TensorSpec, kind: Any, model: CapturedModel) -> Port:
    from tvm.tirx import IntImm

    axes = list(getattr(kind.shape, "values", ())) if kind.shape is not None else None
    if axes is None or not all(isinstance(axis, int | IntImm) for axis in axes):
        raise UnsupportedModelError(
            f"the shape of output {spec.name!r} depends on values, and TVM compiles for fixed shapes", hint=_INSTEAD
        )
    shape = tuple(int(axis) for axis in axes)
    batch = _batch_axis(spec, model)
    if len(shape) != len(spec.shape) or (batch is not None and shape[batch] != 1):
        raise UnsupportedModelError(
            f"output {spec.name!r}: expected one row along {BATCH!r} in {list(spec.shape)}, TVM made {list(shape)}",
            hint=_INSTEAD,
        )
    if 0 in shape:
        raise UnsupportedModelError(f"output {spec.name!r} is empty for one row: {list(shape)}", hint=_INSTEAD)
    return Port(name=spec.name, datatype=spec.datatype, shape=shape, batch_axis=batch)


def _index_bounds(name: str, graph: Any) -> tuple[int | None, int | None]:
    """Return the least and largest value of an input that is looked up in tables; None where it is not."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shortest: int | None = None
    reached, ahead = {name}, [name]
    while ahead:
        current = ahead.pop()
        for node in graph.node:
            if node.op_type == "Gather" and node.input[1] == current and node.input[0] in sizes:
                axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
                rows = sizes[node.input[0]][axis]
                shortest = rows if shortest is None else min(shortest, rows)
            elif node.op_type in _PASSED_THROUGH and node.input[0] == current and node.output[0] not in reached:
                reached.add(node.output[0])
                ahead.append(node.output[0])
    return (None, None) if shortest is None else (-shortest, shortest - 1)
