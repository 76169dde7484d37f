"""Exponential, hyperbolic tangent, error function and logistic as polynomials: vectors of them, not calls of libm.

The approximations are TOPI's (Cephes' expf; Eigen's rational tanh and erf), good to a few units in the last place of
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

_LN2: Final = 0.6931471805599453
_LOG2E: Final = 1.4426950408889634
_LOWEST: Final = -87.3
_HIGHEST: Final = 88.37
# e**f on [-ln2/2, ln2/2], Cephes expf
_EXP: Final = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LN2_HIGH: Final = 0.693359375
_LN2_LOW: Final = -2.12194440e-4


def exponential(value: Any) -> Any:
    """Return e ** value of a float32 expression; 0 far below zero is 1.2e-38, infinities are clipped."""
    from tvm import tirx

    limited = tirx.max(tirx.min(value, tirx.const(_HIGHEST, "float32")), tirx.const(_LOWEST, "float32"))
    return _let(limited, _exponential)


def _exponential(x: Any) -> Any:
    from tvm import tirx

    return _let(tirx.floor(x * tirx.const(_LOG2E, "float32") + 0.5), lambda n: _scaled(x, n))


def _scaled(x: Any, n: Any) -> Any:
    from tvm import tirx

    remainder = x - n * tirx.const(_LN2_HIGH, "float32") - n * tirx.const(_LN2_LOW, "float32")
    power = tirx.reinterpret("float32", (n.astype("int32") + 127) << 23)
    return _let(remainder, lambda f: _series(f) * power)


def _series(f: Any) -> Any:
    from tvm import tirx

    series = tirx.const(_EXP[0], "float32")
    for coefficient in _EXP[1:]:
        series = series * f + tirx.const(coefficient, "float32")
    return series * f * f + f + 1.0


def _let(value: Any, body: Callable[[Any], Any]) -> Any:
    """Return `body` of a variable that is bound to `value`: the expression grows with its uses otherwise."""
    from tvm import tirx

    variable = tirx.Var("t", "float32")
    return tirx.Let(variable, value, body(variable))


def logistic(value: Any) -> Any:
    """Return 1 / (1 + e ** -value)."""
    return 1.0 / (1.0 + exponential(0.0 - value))
