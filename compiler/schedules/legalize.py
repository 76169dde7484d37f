"""From operators to loops: kernels of ours where there is one, vectorizable mathematics, Relax's own for the rest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np

from compiler.schedules.blocks import FUSES_WHAT_FOLLOWS
from compiler.schedules.canonical import constant, operator, permutation, static_shape
from compiler.schedules.convolution import Window, convolution, pack_weights, spread_image
from compiler.schedules.machine import Machine
from compiler.schedules.matmul import batched_matmul, pack_matrix, packed_matmul
from compiler.schedules.rows import layer_norm, reduce_rows, softmax
from compiler.schedules.tiles import choose_tile
from compiler.schedules.transcendental import exponential, logistic
from compiler.schedules.windows import depthwise

Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # of the left operand, the right one, the result

_SYMBOLIC_ROWS: Final = 8  # tile rows where the number of rows is known only at run time
_FUSES: Final = {"op_pattern": FUSES_WHAT_FOLLOWS}


def use_kernels(module: Any, machine: Machine) -> Any:
    """Replace the operators that we have kernels for by calls of them, weights packed."""
    from tvm import relax

    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            rewriter = _rewriter()(module)
            rewriter.machine = machine
            rewriter.uses = _count_uses(function)
            rewriter.products = {}
            rewriter.builder_.update_func(variable, rewriter.visit_expr(function))
            module = rewriter.builder_.get()
    return relax.transform.DeadCodeElimination()(module)


def _count_uses(function: Any) -> dict[Any, int]:
    from tvm import relax

    counts: dict[Any, int] = {}

    def count(expression: Any) -> None:
        for argument in getattr(expression, "args", None) or getattr(expression, "fields", None) or ():
            if isinstance(argument, relax.Var):
                counts[argument] = counts.get(argument, 0) + 1

    relax.analysis.post_order_visit(function, count)
    return counts


_REWRITER: list[Any] = []


def _rewriter() -> Any:
    if not _REWRITER:
        _REWRITER.append(_make_rewriter())
    return _REWRITER[0]


def _make_rewriter() -> Any:
    from tvm.relax.expr_functor import PyExprMutator, mutator

    @mutator
    class Rewriter(PyExprMutator):  # type: ignore[misc]
        machine: Machine
        uses: dict[Any, int]
        products: dict[str, Any]

        def visit_call_(self, call: Any) -> Any:
            original = call
            call = self.visit_expr_post_order(call)
            rule = _RULES.get(operator(call))
            replaced = rule(self, call, original) if rule is not None else None
            return call if replaced is None else replaced

    return Rewriter


def _call(rewriter: Any, name: str, compute: Callable[..., Any], *arguments: Any) -> Any:
    """Call the kernel that a TE computation describes; what follows it element by element may be fused into it."""
    return rewriter.builder_.call_te(compute, *arguments, primfunc_name_hint=name, primfunc_attrs=_FUSES)


def _is_float(expression: Any) -> bool:
    return str(getattr(getattr(expression, "ty", None), "dtype", "")) == "float32"


def _convolution(rewriter: Any, call: Any, _original: Any) -> Any | None:
    from tvm import relax

    attrs, (data, kernel) = call.attrs, call.args
    weights, sizes = constant(kernel), data.ty.shape.values[1:]
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout))
    fixed = all(hasattr(size, "value") for size in sizes)
    if weights is None or not fixed or not _is_float(data) or layouts != ("NHWC", "OHWI", "NHWC"):
        return None
    outputs, height, width, inputs = weights.shape
    groups = int(attrs.groups)
    top, left, bottom, right = (int(size) for size in attrs.padding)
    window = Window(_pair(attrs.strides), _pair(attrs.dilation), (top, left, bottom, right), (height, width))
    if groups == outputs and inputs == 1 and groups > 1:
        packed = relax.const(np.ascontiguousarray(weights[..., 0].transpose(1, 2, 0)), "float32")
        return _call(rewriter, "depthwise", partial(depthwise, window=window), data, packed)
    out_h, out_w = window.output(int(sizes[0]), int(sizes[1]))
    stride = int(sizes[2]) * window.strides[1]
    tile = choose_tile(out_h, out_w, outputs // groups, rewriter.machine, stride=stride)
    packed = relax.const(pack_weights(weights, groups, tile), "float32")
    kernel_of = partial(convolution, window=window, channels=outputs, tile=tile)
    return _call(rewriter, "convolution", kernel_of, data, packed)


def _transposed_convolution(rewriter: Any, call: Any, _original: Any) -> Any | None:
    """A transposed convolution that ends up channels last: a plain one over an image spread out with zeros.

    Windows that do not overlap need no zeros: each pixel becomes a patch, which is a matrix product.
    """
    from tvm import relax

    attrs, (data, kernel) = call.attrs, call.args
    weights, shape = constant(kernel), static_shape(data)
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout))
    if layouts != ("NHWC", "IOHW"):
        return None
    strides, dilation, padding = _pair(attrs.strides), _pair(attrs.dilation), tuple(int(p) for p in attrs.padding)
    extra = _pair(attrs.output_padding)
    if weights is None or shape is None or int(attrs.groups) != 1 or dilation != (1, 1) or not _is_float(data):
        return _channels_first(rewriter, call)
    inputs, outputs, height, width = weights.shape
    if strides == (height, width) and not any(padding) and not any(extra):
        matrix = weights.transpose(0, 2, 3, 1).reshape(inputs, height * width * outputs)
        tile = choose_tile(1, shape[2], matrix.shape[1], rewriter.machine)
        packed = relax.const(pack_matrix(matrix, tile), "float32")
        patches = rewriter.builder_.emit(
            _call(rewriter, "dense", partial(packed_matmul, channels=matrix.shape[1], tile=tile), data, packed)
        )
        split = relax.op.reshape(patches, (*shape[:3], height, width, outputs))
        woven = relax.op.permute_dims(rewriter.builder_.emit(split), [0, 1, 3, 2, 4, 5])
        whole = (shape[0], shape[1] * height, shape[2] * width, outputs)
        return rewriter.builder_.normalize(relax.op.reshape(rewriter.builder_.emit(woven), whole))
    top, left, bottom, right = padding
    border = (height - 1 - top, width - 1 - left, height - 1 - bottom + extra[0], width - 1 - right + extra[1])
    spread = tuple((size - 1) * step + 1 for size, step in zip(shape[1:3], strides, strict=True))
    window = Window((1, 1), (1, 1), (0, 0, 0, 0), (height, width))
    out_h, out_w = spread[0] + border[0] + border[2] - height + 1, spread[1] + border[1] + border[3] - width + 1
    tile = choose_tile(out_h, out_w, outputs, rewriter.machine)
    flipped = np.ascontiguousarray(weights[:, :, ::-1, ::-1].transpose(1, 2, 3, 0))
    packed = relax.const(pack_weights(flipped, 1, tile), "float32")

    def compute(image: Any, packed_weights: Any) -> Any:
        wide = spread_image(image, strides, border)
        return convolution(wide, packed_weights, window=window, channels=outputs, tile=tile)

    return _call(rewriter, "transposed_convolution", compute, data, packed)


def _channels_first(rewriter: Any, call: Any) -> Any:
    """Undo the layout of a transposed convolution that Relax can only legalize channels first."""
    from tvm import relax

    attrs, emit = call.attrs, rewriter.builder_.emit
    data = emit(relax.op.permute_dims(call.args[0], [0, 3, 1, 2]))
    result = relax.op.nn.conv2d_transpose(
        data,
        call.args[1],
        strides=list(attrs.strides),
        padding=list(attrs.padding),
        output_padding=list(attrs.output_padding),
        dilation=list(attrs.dilation),
        groups=int(attrs.groups),
    )
    return rewriter.builder_.normalize(relax.op.permute_dims(emit(result), [0, 2, 3, 1]))


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second


def _matmul(rewriter: Any, call: Any, _original: Any) -> Any | None:
    from tvm import relax

    left, right = call.args
    if not (_is_float(left) and _is_float(right)) or left.ty.ndim < 2 or right.ty.ndim < 2:
        return None
    weights = constant(right)
    rows = getattr(left.ty.shape.values[-2], "value", None)
    if weights is not None and weights.ndim == 2:
        channels = weights.shape[1]
        tile = choose_tile(
            1, int(rows) if rows is not None else _SYMBOLIC_ROWS, channels, rewriter.machine, stride=weights.shape[0]
        )
        packed = relax.const(pack_matrix(weights, tile), "float32")
        return _call(rewriter, "dense", partial(packed_matmul, channels=channels, tile=tile), left, packed)
    shape = static_shape(call)
    if shape is None or static_shape(left) is None or static_shape(right) is None:
        return None
    (left, left_axes), (right, right_axes) = (_through_permutation(rewriter, operand) for operand in (left, right))
    return _product(rewriter, (left, right), (left_axes, right_axes, tuple(range(len(shape)))), shape)


def _product(rewriter: Any, operands: tuple[Any, Any], axes: Axes, shape: tuple[int, ...]) -> Any:
    """Call the kernel for two activations, and remember the call: a transposition may follow."""
    tile = choose_tile(1, shape[-2], shape[-1], rewriter.machine)
    call = _call(rewriter, "batched_matmul", partial(batched_matmul, axes=axes, tile=tile), *operands)
    rewriter.products[call.args[0].name_hint] = (axes, shape)
    return call


def _through_permutation(rewriter: Any, operand: Any) -> tuple[Any, tuple[int, ...]]:
    from tvm import relax

    bound: Any = rewriter.lookup_binding(operand) if isinstance(operand, relax.Var) else None
    if operator(bound) == "relax.permute_dims":
        return bound.args[0], permutation(bound)
    return operand, tuple(range(int(operand.ty.ndim)))


def _transposed_product(rewriter: Any, call: Any, original: Any) -> Any | None:
    """A product that is only read transposed is written that way."""
    from tvm import relax

    if not isinstance(original.args[0], relax.Var) or rewriter.uses.get(original.args[0]) != 1:
        return None
    bound = rewriter.lookup_binding(call.args[0])
    if operator(bound) != "relax.call_tir" or bound.args[0].name_hint not in rewriter.products:
        return None
    axes, shape = rewriter.products[bound.args[0].name_hint]
    left, right = bound.args[1].fields
    return _product(rewriter, (left, right), (axes[0], axes[1], permutation(call)), shape)


def _softmax(rewriter: Any, call: Any, _original: Any) -> Any | None:
    data = call.args[0]
    axis = int(call.attrs.axis)
    if not _is_float(data) or axis not in {-1, data.ty.ndim - 1} or _last(data) is None:
        return None
    return _call(rewriter, "softmax", partial(softmax, machine=rewriter.machine), data)


def _layer_norm(rewriter: Any, call: Any, _original: Any) -> Any | None:
    data, gamma, beta = call.args
    axes = [int(axis) % data.ty.ndim for axis in call.attrs.axes]
    if axes != [data.ty.ndim - 1] or not _is_float(data) or _last(data) is None:
        return None
    if not (call.attrs.center and call.attrs.scale):
        return None
    kernel = partial(layer_norm, epsilon=float(call.attrs.epsilon), machine=rewriter.machine)
    return _call(rewriter, "layer_norm", kernel, data, gamma, beta)


def _row_reduction(rewriter: Any, call: Any, _original: Any) -> Any | None:
    data = call.args[0]
    rank = int(data.ty.ndim)
    axes = [int(axis) % rank for axis in call.attrs.axis] if call.attrs.axis is not None else []
    if axes != [rank - 1] or rank < 2 or not _is_float(data) or (_last(data) or 0) < rewriter.machine.lanes:
        return None
    name = operator(call)
    kernel = partial(
        reduce_rows,
        keepdims=bool(call.attrs.keepdims),
        mean=name == "relax.mean",
        largest=name == "relax.max",
        machine=rewriter.machine,
    )
    return _call(rewriter, name.removeprefix("relax.") + "_rows", kernel, data)


def _last(data: Any) -> int | None:
    value = getattr(data.ty.shape.values[-1], "value", None)
    return None if value is None else int(value)


_RULES: Final[dict[str, Callable[[Any, Any, Any], Any]]] = {
    "relax.nn.conv2d": _convolution,
    "relax.nn.conv2d_transpose": _transposed_convolution,
    "relax.matmul": _matmul,
    "relax.permute_dims": _transposed_product,
    "relax.nn.softmax": _softmax,
    "relax.nn.layer_norm": _layer_norm,
    "relax.mean": _row_reduction,
    "relax.sum": _row_reduction,
    "relax.max": _row_reduction,
}


def mathematics() -> dict[str, Callable[[Any, Any], Any]]:
    """Return the legalizations that replace Relax's where those call libm element by element."""
    from tvm import te, topi

    def elementwise(name: str, function: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        def compute(data: Any) -> Any:
            return te.compute(data.shape, lambda *index: function(data[index]), name=name)

        return _float_only(name, compute)

    def gelu(data: Any) -> Any:
        error = topi.fast_erf(data * 0.7071067811865476)
        return te.compute(data.shape, lambda *i: data[i] * 0.5 * (1.0 + error[i]), name="gelu")

    return {
        "relax.exp": elementwise("exp", exponential),
        "relax.sigmoid": elementwise("sigmoid", logistic),
        "relax.nn.silu": elementwise("silu", lambda x: x * logistic(x)),
        "relax.tanh": _float_only("tanh", topi.fast_tanh),
        "relax.erf": _float_only("erf", topi.fast_erf),
        "relax.nn.gelu": _float_only("gelu", gelu),
    }


def _float_only(name: str, compute: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def legalize(builder: Any, call: Any) -> Any:
        if not _is_float(call.args[0]):
            return call
        return builder.call_te(compute, call.args[0], primfunc_name_hint=name)

    return legalize
