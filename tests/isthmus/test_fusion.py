from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.fusion import fuse
from isthmus.tensors import Array

LOGITS = hnp.arrays(np.float32, (3, 4), elements=st.floats(-50, 50, width=32))


@given(LOGITS, LOGITS, st.floats(0.01, 0.99), st.floats(0.2, 5))
def test_it_is_the_normalised_weighted_mean_of_log_probabilities(
    light: Array, heavy: Array, weight: float, temperature: float
) -> None:
    def logs(logits: Array) -> Array:
        rows = logits.astype(np.float64)
        rows = rows - rows.max(axis=1, keepdims=True)
        return np.asarray(rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)))

    found = fuse(light, heavy, temperature=temperature, light_weight=weight)

    expected = logs(weight * logs(light / np.float32(temperature)) + (1 - weight) * logs(heavy))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-3)


@given(LOGITS)
def test_models_that_agree_stay_as_they_are(logits: Array) -> None:
    found = fuse(logits, logits, temperature=1.0, light_weight=0.3)

    chosen = np.take_along_axis(logits, found.argmax(axis=1)[:, np.newaxis], axis=1)[:, 0]
    np.testing.assert_allclose(chosen, logits.max(axis=1), atol=1e-4)  # ties apart
