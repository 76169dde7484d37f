from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from compiler.data import LabelledSamples
from compiler.recipe import GuardSection
from compiler.verify import (
    check_batching,
    check_source,
    check_variant,
    golden_rows,
    latency_ms,
    one_by_one,
    tolerance,
)
from isthmus.bundle import TensorSpec
from isthmus.errors import VerificationError
from isthmus.tensors import Array

SPECS = [TensorSpec(name="logits", datatype="FP32", shape=(-1, 2))]
LABELS = np.array([0, 1] * 50)
SOURCE = np.eye(2, dtype=np.float32)[LABELS] * 4
DATA = LabelledSamples({"x": np.zeros((100, 1), np.float32)}, "0" * 64, LABELS)


def check(logits: Any, precision: str = "fp32", guard: GuardSection | None = None) -> str:
    return check_variant(
        {"logits": logits}, {"logits": SOURCE}, DATA,
        specs=SPECS, score_output="logits", precision=precision, guard=guard or GuardSection(),
    ).refused  # fmt: skip


def flipped(rows: int) -> Array:
    logits = SOURCE.copy()
    logits[:rows] = logits[:rows, ::-1]
    return np.asarray(logits)


def test_the_source_itself_is_good() -> None:
    assert check(SOURCE) == ""


@pytest.mark.parametrize(("offset", "refused"), [(0.0009, False), (0.0011, True)])
def test_full_precision_must_not_differ(offset: float, refused: bool) -> None:
    assert bool(check(SOURCE + np.float32(offset))) == refused


def test_what_is_allowed_exactly_is_allowed() -> None:
    """1.0 - 0.98 is a little more than 0.02 in floating point."""
    assert check(flipped(2), "int8", GuardSection(max_accuracy_drop=0.02)) == ""
    assert check(flipped(3), "int8", GuardSection(max_accuracy_drop=0.02)) != ""


@pytest.mark.parametrize(("wrong", "refused"), [(2, False), (3, True)])
def test_int8_must_not_lose_accuracy(wrong: int, refused: bool) -> None:
    reason = check(flipped(wrong), "int8", GuardSection(max_accuracy_drop=0.0201))

    assert bool(reason) == refused
    assert not refused or "1.0000 to 0.9700" in reason


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        (np.full((100, 2), np.nan, np.float32), "not finite"),
        (np.zeros((99, 2), np.float32), r"declared is FP32\[100, 2\]"),
        (np.zeros((100, 2), np.float64), "float64"),
    ],
)
def test_broken_outputs_are_refused_in_every_precision(logits: Any, reason: str) -> None:
    for precision in ("fp32", "int8"):
        assert reason.replace("\\", "") in check(logits, precision)


def test_a_broken_source_is_named() -> None:
    with pytest.raises(VerificationError, match="the heavy model itself: gives no output 'logits'"):
        check_source({}, SPECS, 3, what="heavy")


class Leaky:
    """A runner whose answer for a row depends on the rows beside it."""

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"y": inputs["x"] - inputs["x"].mean(axis=0)}


def test_rows_that_look_at_their_neighbours_are_found() -> None:
    inputs = {"x": np.arange(20, dtype=np.float32).reshape(10, 2)}
    rows = golden_rows(10)
    runner = Leaky()

    alone, batched = one_by_one(runner, inputs, rows), runner.infer(inputs)

    assert "of a row alone differs by 9" in check_batching(alone, batched, rows, 0.5)
    assert check_batching(inputs, inputs, rows, 0.5) == ""


def test_golden_rows_are_spread_and_differ() -> None:
    assert golden_rows(3764)[:2] == [0, 251]
    assert len(golden_rows(3764)) == 16
    assert golden_rows(5) == [0, 1, 2, 3, 4]


def test_the_tolerance_follows_the_spread() -> None:
    golden = {"logits": np.array([[-5.0, 15.0]], np.float32), "class": np.array([7])}

    assert tolerance(golden, "int8") == pytest.approx(1.0)
    assert tolerance(golden, "fp32") == pytest.approx(0.02)
    assert tolerance({"logits": np.zeros((1, 2), np.float32)}, "int8") == 0.001


def test_latency_is_a_time() -> None:
    assert 0 < latency_ms(Leaky(), {"x": np.zeros((4, 2), np.float32)}) < 100
