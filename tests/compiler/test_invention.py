from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from compiler.capture import capture
from compiler.invention import invent_samples
from tests.compiler import models


def test_indices_stay_within_their_table(tmp_path: Path) -> None:
    model = capture(models.write_encoder(tmp_path / "m.onnx", models.encoder_weights()), tmp_path / "c.onnx")

    samples = invent_samples(model, 200)["tokens"]

    assert samples.shape == (200, models.TOKENS)
    assert samples.dtype == np.int64
    assert samples.min() == 0
    assert samples.max() == models.WORDS - 1
    onnxruntime.InferenceSession(str(model.path)).run(None, {"tokens": samples})


def test_the_same_seed_gives_the_same_samples(tmp_path: Path) -> None:
    model = capture(models.write_cnn(tmp_path / "m.onnx"), tmp_path / "c.onnx")

    first, again, other = (invent_samples(model, 3, seed=seed)["image"] for seed in (1, 1, 2))

    assert first.shape == (3, 1, 8, 8)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
