"""The polynomials are as exact as float32 needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compiler.schedules.transcendental import exponential, logistic
from isthmus.tensors import Array
from tests.compiler.schedules.onnx_graphs import target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "reference"),
    [(exponential, np.exp), (logistic, lambda x: 1 / (1 + np.exp(-x)))],
)
def test_a_function_is_exact_to_three_units_in_the_last_place(
    function: Callable[[Any], Any], reference: Callable[[Array], Array]
) -> None:
    import tvm
    from tvm import te

    data = te.placeholder((4096,), name="x")
    computed = te.compute((4096,), lambda i: function(data[i]))
    library = tvm.compile(te.create_prim_func([data, computed]), target())
    values = np.linspace(-80, 80, 4096, dtype=np.float32)
    result = tvm.runtime.tensor(np.zeros(4096, np.float32))

    library["main"](tvm.runtime.tensor(values), result)

    exact = reference(values.astype(np.float64))
    assert np.max(np.abs(result.numpy() / exact - 1)) < 3 * np.finfo(np.float32).eps


@pytest.mark.slow
def test_the_ends_stay_finite() -> None:
    import tvm
    from tvm import te

    data = te.placeholder((4,), name="x")
    library = tvm.compile(te.create_prim_func([data, te.compute((4,), lambda i: exponential(data[i]))]), target())
    result = tvm.runtime.tensor(np.zeros(4, np.float32))

    library["main"](tvm.runtime.tensor(np.array([-np.inf, -1e30, 1e30, 0], np.float32)), result)

    assert np.all(np.isfinite(result.numpy()))
    assert result.numpy()[0] < 1e-37
    assert result.numpy()[3] == 1
