from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.capture import CapturedModel
from compiler.parity import Parity
from compiler.recipe import GuardSection
from compiler.verify import (
    EdgeResult,
    Materials,
    Proof,
    check_batching,
    check_source,
    golden_rows,
    one_by_one,
    prepare,
    prove,
    tolerance,
    verdict,
)
from isthmus.bundle import TensorSpec
from isthmus.errors import VerificationError
from isthmus.tensors import Array

MODEL = CapturedModel(
    Path("none.onnx"),
    "0" * 64,
    (TensorSpec(name="x", datatype="FP32", shape=(-1, 2)),),
    (TensorSpec(name="logits", datatype="FP32", shape=(-1, 2)),),
    attention=False,
)
INPUTS = {"x": np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)}
GOOD = Proof(Parity(0.0, 0.0, 0.0, 1.0, 1.0), ())


class Runner:
    """A model of one line."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"logits": np.asarray(self.function(inputs["x"]), np.float32)}


def proof(tmp_path: Path, function: Any, precision: str = "fp32") -> Proof:
    materials = Materials(tmp_path / "materials")
    prepare(MODEL, INPUTS, Runner(lambda x: x * 3), materials, max_batch=16, advance=lambda *_: None)
    runner = Runner(function)
    return prove(runner, runner, MODEL, materials, precision, "logits", lambda *_: None)[0]


def judge(measured: Proof, precision: str = "fp32", *, drop: float = 0.0, guard: GuardSection | None = None) -> str:
    return verdict(measured, precision, guard or GuardSection(), source_value=0.9, value=0.9 - drop)


def test_the_source_itself_is_good(tmp_path: Path) -> None:
    measured = proof(tmp_path, lambda x: x * 3)

    assert judge(measured) == ""
    assert measured.parity is not None
    assert measured.parity.max_absolute == 0
    assert {edge.name for edge in measured.edges} == {
        "batch 1", "batch 2", "batch 16", "smallest values", "largest values",
    }  # fmt: skip


@pytest.mark.parametrize(("offset", "refused"), [(0.0009, False), (0.0111, True)])
def test_full_precision_must_not_differ(tmp_path: Path, offset: float, refused: bool) -> None:
    """The outputs lie within 9 of zero, so that what counts is the share of their range."""
    assert bool(judge(proof(tmp_path, lambda x: x * 3 + offset))) == refused


def test_full_precision_must_not_differ_at_the_edges(tmp_path: Path) -> None:
    least = INPUTS["x"].min()

    reason = judge(proof(tmp_path, lambda x: np.where((x == least).all(axis=1, keepdims=True), 0, x * 3)))

    assert reason.startswith("smallest values: it differs from the source by 1")


def test_what_is_allowed_exactly_is_allowed() -> None:
    """0.9 - 0.88 is a little more than 0.02 in floating point."""
    assert judge(GOOD, "int8", drop=0.02) == ""
    assert "fell by 0.0300 (0.9000 to 0.8700)" in judge(GOOD, "int8", drop=0.03)


def test_the_metric_of_the_recipe_is_named() -> None:
    assert "its macro-f1 fell" in judge(GOOD, "fp16", drop=0.5, guard=GuardSection(metric="macro-f1"))


def test_outputs_of_another_direction_are_refused_whatever_their_accuracy() -> None:
    turned = replace(GOOD, parity=Parity(1.0, 1.0, 1.0, 0.94, 1.0))

    assert "cosine of 0.9400" in judge(turned, "int8")
    assert judge(turned, "int4w") == ""


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x * np.nan, "not finite"),
        (lambda x: x[:-1] * 3, "float32[63, 2], the source's is float32[64, 2]"),
        (lambda x: x[:, :1], "float32[64, 1]"),
    ],
)
def test_broken_outputs_are_refused_in_every_precision(tmp_path: Path, function: Any, reason: str) -> None:
    for precision in ("fp32", "int8"):
        assert reason in judge(proof(tmp_path, function, precision), precision)


def test_an_edge_case_that_fails_is_named() -> None:
    assert judge(replace(GOOD, edges=(EdgeResult("batch 2", 0, 0, "cannot run"),)), "int8") == "batch 2: cannot run"


def test_a_broken_source_is_named() -> None:
    with pytest.raises(VerificationError, match="the heavy model itself: gives no output 'logits'"):
        check_source({}, MODEL, 3, what="heavy")
    with pytest.raises(VerificationError, match="declared is FP32"):
        check_source({"logits": np.zeros((3, 2))}, MODEL, 3, what="heavy")
    with pytest.raises(VerificationError, match="not finite"):
        check_source({"logits": np.full((3, 2), np.inf, np.float32)}, MODEL, 3, what="heavy")


def test_rows_that_look_at_their_neighbours_are_found(tmp_path: Path) -> None:
    measured = proof(tmp_path, lambda x: x * 3 + (x - x.mean(axis=0)) * (len(x) > 1))

    assert "of a row alone differs by" in measured.broken
    assert "of a row alone differs by" in judge(measured, "int8")
    rows = golden_rows(10)
    alone = one_by_one(Runner(lambda x: x), MODEL, INPUTS, rows)
    assert check_batching(alone, {"logits": INPUTS["x"][rows]}, 0.0) == ""


def test_golden_rows_are_spread_and_differ() -> None:
    assert golden_rows(3764)[:2] == [0, 251]
    assert len(golden_rows(3764)) == 16
    assert golden_rows(5) == [0, 1, 2, 3, 4]


def test_the_tolerance_follows_the_spread() -> None:
    golden = {"logits": np.array([[-5.0, 15.0]], np.float32), "class": np.array([7])}

    assert tolerance(golden, "int8") == pytest.approx(1.0)
    assert tolerance(golden, "fp32") == pytest.approx(0.02)
    assert tolerance(golden, "fp32", seen=False) == pytest.approx(0.2)
    assert tolerance({"logits": np.zeros((1, 2), np.float32)}, "int8") == 0.001
