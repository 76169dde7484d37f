"""Rewrites that make the graph easier to fuse: each removes a detour that exporters leave, none changes a result.

(1) Reshapes and transpositions of constants, and shapes that are known, become constants.
(2) Reshapes of reshapes and transpositions of transpositions become one, or none; moving axes of length one is a
    reshape.
(3) Element-wise operators move before reshapes and transpositions, next to the products that they can join.
(4) Clip becomes minimum and maximum, division by a constant a multiplication, small powers products or roots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

UNARY: Final = frozenset(
    f"relax.{name}"
    for name in (
        "abs", "erf", "exp", "log", "negative", "rsqrt", "sigmoid", "sqrt", "tanh",
        "nn.gelu", "nn.relu", "nn.silu",
    )
)  # fmt: skip
BINARY: Final = frozenset(
    f"relax.{name}" for name in ("add", "divide", "maximum", "minimum", "multiply", "power", "subtract")
)
_BOUNDS: Final = frozenset({"maximum", "minimum"})
RESHAPES: Final = frozenset(f"relax.{name}" for name in ("expand_dims", "flatten", "reshape", "squeeze"))


def canonicalize(module: Any) -> Any:
    """Return the module with all of its Relax functions rewritten."""
    from tvm import relax

    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            rewriter = _rewriter()(module)
            rewriter.builder_.update_func(variable, rewriter.visit_expr(function))
            module = rewriter.builder_.get()
    passes = [relax.transform.CanonicalizeBindings(), relax.transform.DeadCodeElimination()]
    for step in passes:
        module = step(module)
    return module


def static_shape(expression: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor expression; None if any of it is known only at run time."""
    sizes = getattr(getattr(expression, "ty", None), "shape", None)
    values = getattr(sizes, "values", None)
    if values is None:
        return None
    shape = tuple(int(size.value) for size in values if hasattr(size, "value"))
    return shape if len(shape) == len(values) else None


def constant(expression: Any) -> np.ndarray[Any, Any] | None:
    """Return the value of a constant expression, or None."""
    from tvm import ir

    if isinstance(expression, ir.GenericConst):
        value: np.ndarray[Any, Any] = expression.value.numpy()
        return value
    return None


def operator(expression: Any) -> str:
    """Return the name of the operator that an expression calls, or ""."""
    return str(getattr(getattr(expression, "op", None), "name", ""))


def permutation(call: Any) -> tuple[int, ...]:
    """Return the axes of a `permute_dims` call."""
    rank = int(call.args[0].ty.ndim)
    if call.attrs.axes is None:
        return tuple(range(rank))[::-1]
    return tuple(int(axis) % rank for axis in call.attrs.axes)


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


_REWRITER: list[Any] = []


def _rewriter() -> Any:
    if not _REWRITER:
        _REWRITER.append(_make_rewriter())
    return _REWRITER[0]


def _make_rewriter() -> Any:
    """Return the mutator class; made late, because its base class needs TVM."""
    from tvm import ir, relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    @mutator
    class Rewriter(PyExprMutator):  # type: ignore[misc]
        def visit_call_(self, call: Any) -> Any:
            call = self.with_constants(self.visit_expr_post_order(call))
            name = operator(call)
            rule = _RULES.get(name)
            if rule is None and name in UNARY:
                rule = _sink_unary
            if rule is None and name in BINARY:
                rule = _sink_binary
            return call if rule is None else rule(self, call)

        def with_constants(self, call: Any) -> Any:
            """Return the call with variables that are bound to constants replaced by those."""
            arguments = [self.value(argument) for argument in call.args]
            if all(new is old for new, old in zip(arguments, call.args, strict=True)):
                return call
            return self.builder_.normalize(ir.Call(call.op, arguments, call.attrs, call.ty_args))

        def value(self, expression: Any) -> Any:
            """Return the constant that a variable is bound to, or the expression itself."""
            bound = self.lookup_binding(expression) if isinstance(expression, relax.Var) else None
            return expression if constant(bound) is None else bound

        def source(self, expression: Any) -> Any:
            """Return the call that a variable is bound to, or the expression itself."""
            if isinstance(expression, relax.Var):
                return self.lookup_binding(expression)
            return expression

        def emit(self, expression: Any) -> Any:
            """Bind an expression to a variable."""
            return self.builder_.emit(self.builder_.normalize(expression))

    return Rewriter


def _reshape(rewriter: Any, call: Any) -> Any:
    """(1), (2): a reshape, squeeze or expand_dims."""
    from tvm import relax

    argument, shape = call.args[0], static_shape(call)
    if shape is None:
        return call
    value = constant(argument)
    if value is not None:
        return relax.const(
            value.reshape(shape),
            str(argument.ty.dtype.dtype if hasattr(argument.ty.dtype, "dtype") else argument.ty.dtype),
        )
    if static_shape(argument) == shape:
        return argument
    inner = rewriter.source(argument)
    if operator(inner) == "relax.reshape":
        return _reshape(rewriter, rewriter.builder_.normalize(relax.op.reshape(inner.args[0], shape)))
    if operator(call) != "relax.reshape":
        return rewriter.builder_.normalize(relax.op.reshape(argument, shape))
    return call


def _permute(rewriter: Any, call: Any) -> Any:
    """(1), (2): a transposition."""
    from tvm import relax

    argument, axes, shape = call.args[0], permutation(call), static_shape(call)
    value = constant(argument)
    if value is not None:
        return relax.const(np.ascontiguousarray(value.transpose(axes)), str(value.dtype))
    if axes == tuple(range(len(axes))):
        return argument
    before = static_shape(argument)
    if (
        shape is not None
        and before is not None
        and [a for a in axes if before[a] != 1] == sorted(a for a in axes if before[a] != 1)
    ):
        return _reshape(rewriter, rewriter.builder_.normalize(relax.op.reshape(argument, shape)))
    inner = rewriter.source(argument)
    if operator(inner) == "relax.permute_dims":
        first = permutation(inner)
        both = [first[axis] for axis in axes]
        return _permute(rewriter, rewriter.builder_.normalize(relax.op.permute_dims(inner.args[0], both)))
    return call


def _sink_unary(rewriter: Any, call: Any) -> Any:
    """(3): f(reshape(x)) is reshape(f(x)), and the same for a transposition."""
    from tvm import ir

    inner = rewriter.source(call.args[0])
    if not _moves(inner):
        return call
    moved = rewriter.emit(ir.Call(call.op, [inner.args[0]], call.attrs))
    return _again(rewriter, inner, moved)


def _sink_binary(rewriter: Any, call: Any) -> Any:
    """(3): the same for two operands of which one is a scalar, or both have the shape but for axes of length one."""
    for position in (0, 1):
        inner, other = rewriter.source(call.args[position]), call.args[1 - position]
        if not _moves(inner) or static_shape(inner.args[0]) is None or static_shape(call) is None:
            continue
        scalar = static_shape(other) == () and constant(other) is not None
        if scalar and static_shape(inner) == static_shape(call):
            return _moved_binary(rewriter, call, position, inner, other)
        if operator(inner) == "relax.reshape" and _keeps_order(inner, call):
            fitted = _fit(rewriter, other, call, inner.args[0])
            if fitted is not None:
                return _moved_binary(rewriter, call, position, inner, fitted)
    return call


def _moved_binary(rewriter: Any, call: Any, position: int, inner: Any, other: Any) -> Any:
    from tvm import ir

    arguments = [inner.args[0], other] if position == 0 else [other, inner.args[0]]
    moved = rewriter.emit(ir.Call(call.op, arguments, call.attrs))
    return _again(rewriter, inner, moved, shape=static_shape(call))


def _keeps_order(inner: Any, call: Any) -> bool:
    source, result = static_shape(inner.args[0]), static_shape(call)
    return source is not None and result is not None and _without_ones(source) == _without_ones(result)


def _fit(rewriter: Any, other: Any, call: Any, source: Any) -> Any | None:
    """Return `other` reshaped to broadcast against `source` as it did against the result; None if it cannot be."""
    from tvm import relax

    shape, result, target = static_shape(other), static_shape(call), static_shape(source)
    if shape is None or result is None or target is None or len(shape) > len(result):
        return None
    padded = (1,) * (len(result) - len(shape)) + shape
    if any(size != 1 for size, whole in zip(padded, result, strict=True) if whole == 1):
        return None
    kept = iter([size for size, whole in zip(padded, result, strict=True) if whole != 1])
    fitted = tuple(next(kept) if size != 1 else 1 for size in target)
    if fitted == shape:
        return other
    reshaped = rewriter.builder_.normalize(relax.op.reshape(other, fitted))
    result_expression = _reshape(rewriter, reshaped)
    return result_expression if constant(result_expression) is not None else rewriter.emit(result_expression)


def _moves(inner: Any) -> bool:
    return operator(inner) in {"relax.reshape", "relax.permute_dims"} and constant(inner.args[0]) is None


def _again(rewriter: Any, inner: Any, moved: Any, shape: tuple[int, ...] | None = None) -> Any:
    """Apply the reshape or transposition `inner` to what was moved before it."""
    from tvm import relax

    if operator(inner) == "relax.permute_dims":
        return rewriter.builder_.normalize(relax.op.permute_dims(moved, list(permutation(inner))))
    target = shape if shape is not None else static_shape(inner)
    if target is None:
        return rewriter.builder_.normalize(relax.op.reshape(moved, inner.args[1]))
    return rewriter.builder_.normalize(relax.op.reshape(moved, target))


def _clip(rewriter: Any, call: Any) -> Any:
    """(4)"""
    from tvm import relax

    dtype = str(call.args[0].ty.dtype)
    if dtype != "float32":
        return call
    low, high = (
        float(getattr(getattr(bound, "value", bound), "value", getattr(bound, "value", bound)))
        for bound in call.args[1:3]
    )
    raised = rewriter.emit(relax.op.maximum(call.args[0], relax.const(low, dtype)))
    raised = rewriter.emit(_sink_binary(rewriter, rewriter.lookup_binding(raised)))
    return _sink_binary(rewriter, rewriter.builder_.normalize(relax.op.minimum(raised, relax.const(high, dtype))))


def _divide(rewriter: Any, call: Any) -> Any:
    """(4)"""
    from tvm import relax

    divisor = constant(call.args[1])
    if divisor is None or divisor.dtype != np.float32 or not np.all(np.isfinite(divisor)) or np.any(divisor == 0):
        return _sink_binary(rewriter, call)
    factor = relax.const((1.0 / divisor.astype(np.float64)).astype(np.float32), "float32")
    return _sink_binary(rewriter, rewriter.builder_.normalize(relax.op.multiply(call.args[0], factor)))


def _power(rewriter: Any, call: Any) -> Any:
    """(4)"""
    from tvm import relax

    exponent = constant(call.args[1])
    if exponent is None or exponent.size != 1 or exponent.dtype != np.float32:
        return call
    base, value = call.args[0], float(exponent.reshape(()))
    replacement = {2.0: lambda: relax.op.multiply(base, base), 0.5: lambda: relax.op.sqrt(base), 1.0: lambda: base}
    return rewriter.builder_.normalize(replacement[value]()) if value in replacement else call


def _bound(rewriter: Any, call: Any) -> Any:
    """(4): the loops that the ONNX importer writes for a clip with constant bounds."""
    from tvm import relax

    name = str(call.args[0].name_hint).rstrip("0123456789")
    if name not in _BOUNDS or len(call.args[1].fields) != 2:
        return call
    value, bound = (rewriter.value(field) for field in call.args[1].fields)
    if constant(bound) is None or static_shape(bound) != () or str(value.ty.dtype) != "float32":
        return call
    operation = relax.op.maximum if name == "maximum" else relax.op.minimum
    return _sink_binary(rewriter, rewriter.builder_.normalize(operation(value, bound)))


def _is_nan(_rewriter: Any, call: Any) -> Any:
    """(1)"""
    from tvm import relax

    value = constant(call.args[0])
    return call if value is None else relax.const(np.isnan(value), "bool")


def _where(_rewriter: Any, call: Any) -> Any:
    """(1)"""
    from tvm import relax

    condition, first, second = (constant(argument) for argument in call.args)
    if condition is None or first is None or second is None:
        return call
    chosen = np.where(condition, first, second).astype(first.dtype)
    return relax.const(chosen, str(chosen.dtype))


def _known_shape(_rewriter: Any, call: Any) -> Any:
    """(1): a shape made a tensor."""
    from tvm import relax

    values = getattr(call.args[0].ty, "values", None)
    if values is None or not all(hasattr(size, "value") for size in values):
        return call
    return relax.const(np.array([int(size.value) for size in values], np.int64), "int64")


_RULES: Final[dict[str, Callable[[Any, Any], Any]]] = {
    **dict.fromkeys(RESHAPES, _reshape),
    "relax.permute_dims": _permute,
    "relax.clip": _clip,
    "relax.call_tir": _bound,
    "relax.divide": _divide,
    "relax.isnan": _is_nan,
    "relax.power": _power,
    "relax.shape_to_tensor": _known_shape,
    "relax.where": _where,
}
