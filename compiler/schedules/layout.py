"""Images with channels last: convolutions, and what lies between them, are moved to NHWC before kernels are chosen.

One-dimensional convolutions become two-dimensional ones over images of one row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from compiler.schedules.canonical import constant, operator

_DESIRED: Final = {"relax.nn.conv2d": ["NHWC", "OHWI"]}


def channels_last(module: Any) -> Any:
    """Return the module with 2-D convolutions in NHWC; transpositions remain where the graph leaves that layout."""
    from tvm import relax

    module = _rewrite(module, "relax.nn.conv1d", _as_image)
    try:
        converted = relax.transform.ConvertLayout(_DESIRED)(module)
    except RuntimeError:  # Relax cannot infer the layout of an operator in between: each convolution by itself, then
        converted = _rewrite(module, "relax.nn.conv2d", _alone)
    return relax.transform.Normalize()(converted)


def _as_image(builder: Any, call: Any) -> Any:
    from tvm import relax

    attrs, (data, kernel) = call.attrs, call.args
    if (str(attrs.data_layout), str(attrs.kernel_layout)) != ("NCW", "OIW"):
        return call
    left, right = (int(size) for size in attrs.padding)
    weights = constant(kernel)
    image = relax.op.nn.conv2d(
        builder.emit(relax.op.expand_dims(data, 2)),
        relax.const(weights[:, :, None], str(weights.dtype))
        if weights is not None
        else builder.emit(relax.op.expand_dims(kernel, 2)),
        strides=[1, int(attrs.strides[0])],
        padding=[0, left, 0, right],
        dilation=[1, int(attrs.dilation[0])],
        groups=int(attrs.groups),
    )
    return builder.normalize(relax.op.squeeze(builder.emit(image), [2]))


def _alone(builder: Any, call: Any) -> Any:
    from tvm import relax

    attrs, (data, kernel) = call.attrs, call.args
    if (str(attrs.data_layout), str(attrs.kernel_layout)) != ("NCHW", "OIHW"):
        return call
    image = relax.op.nn.conv2d(
        builder.emit(relax.op.permute_dims(data, [0, 2, 3, 1])),
        builder.emit(relax.op.permute_dims(kernel, [0, 2, 3, 1])),
        strides=list(attrs.strides),
        padding=list(attrs.padding),
        dilation=list(attrs.dilation),
        groups=int(attrs.groups),
        data_layout="NHWC",
        kernel_layout="OHWI",
    )
    return builder.normalize(relax.op.permute_dims(builder.emit(image), [0, 3, 1, 2]))


def _rewrite(module: Any, name: str, rule: Callable[[Any, Any], Any]) -> Any:
    """Return the module with each call of one operator replaced by what `rule(builder, call)` returns."""
    from tvm import relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    @mutator
    class Rewriter(PyExprMutator):  # type: ignore[misc]
        def visit_call_(self, call: Any) -> Any:
            call = self.visit_expr_post_order(call)
            return rule(self.builder_, call) if operator(call) == name else call

    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            rewriter = Rewriter(module)
            rewriter.builder_.update_func(variable, rewriter.visit_expr(function))
            module = rewriter.builder_.get()
    return module
