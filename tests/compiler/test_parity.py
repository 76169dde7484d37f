from __future__ import annotations

import numpy as np
import pytest

from compiler.parity import ParityMeter
from isthmus.tensors import Array


def test_batches_add_up_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    source: dict[str, Array] = {"logits": rng.normal(size=(50, 4)).astype(np.float32), "class": rng.integers(0, 4, 50)}
    ours: dict[str, Array] = {
        "logits": source["logits"] + rng.normal(size=(50, 4)).astype(np.float32) / 10,
        "class": source["class"],
    }
    whole, parts = ParityMeter(), ParityMeter()

    whole.add(ours, source)
    for start in range(0, 50, 7):
        parts.add(*({name: array[start : start + 7] for name, array in both.items()} for both in (ours, source)))

    first, second = whole.result(), parts.result()
    assert second.max_absolute == first.max_absolute == pytest.approx(np.abs(ours["logits"] - source["logits"]).max())
    assert second.cosine == pytest.approx(first.cosine)
    assert first.max_relative == pytest.approx(first.max_absolute / np.ptp(source["logits"]))
    same = (ours["logits"].argmax(1) == source["logits"].argmax(1)).mean()
    assert second.agreement == first.agreement == same


def test_the_worst_output_counts() -> None:
    meter = ParityMeter()
    zeros = np.zeros((2, 3), np.float32)

    meter.add({"a": zeros + 1, "b": zeros + 5}, {"a": zeros + 1, "b": zeros + 1})

    assert meter.result().max_absolute == 4
    assert meter.result().difference == 4
    assert meter.result().cosine == pytest.approx(1.0)


def test_an_output_of_zeros_has_a_direction_only_when_both_are() -> None:
    for ours, cosine in ((0.0, 1.0), (1.0, 0.0)):
        meter = ParityMeter()
        meter.add({"a": np.full((1, 2), ours, np.float32)}, {"a": np.zeros((1, 2), np.float32)})
        assert meter.result().cosine == cosine


def test_large_values_count_by_their_range() -> None:
    meter = ParityMeter()
    boxes = np.array([[0.0, 640.0]], np.float32)

    meter.add({"boxes": boxes + np.float32(0.064)}, {"boxes": boxes})

    assert meter.result().difference == pytest.approx(1e-4, rel=1e-3)
