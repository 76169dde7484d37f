from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cells.verdicts import judge


def _result(difference: float = 0.0, cosine: float = 1.0, agreement: float = 1.0) -> dict[str, Any]:
    return {"parity": {"difference": difference, "cosine": cosine, "agreement": agreement}, "least_ms": 1.0}


def test_fp32_is_held_to_the_difference() -> None:
    assert judge(_result(difference=1e-4), "fp32", classifies=True).state == "green"
    assert judge(_result(difference=2e-3), "fp32", classifies=True).state == "inexact"


def test_int8_is_held_to_the_direction_and_for_classifiers_to_the_best_class() -> None:
    assert judge(_result(difference=0.5, cosine=0.995), "int8", classifies=True).state == "green"
    assert judge(_result(cosine=0.94), "int8", classifies=False).state == "inexact"
    assert judge(_result(cosine=0.94), "int4w", classifies=False).state == "green"
    assert judge(_result(cosine=0.98), "bf16", classifies=False).state == "inexact"
    assert judge(_result(agreement=0.9), "int8", classifies=True).state == "inexact"
    assert judge(_result(agreement=0.9), "int8", classifies=False).state == "green"


def test_a_build_that_cannot_run_here_counts_as_covered() -> None:
    verdict = judge({"bytes": 3 << 20}, "fp32", classifies=False)
    assert verdict.covered
    assert verdict.detail == "3.0 MiB"


@pytest.mark.parametrize(
    ("reason", "state"), [("unsupported-model", "refused"), ("time", "failed"), ("crash", "failed")]
)
def test_a_refusal_is_told_from_a_failure(reason: str, state: str) -> None:
    verdict = judge({"error": "no LSTM", "reason": reason, "hint": "use openvino"}, "fp32", classifies=False)
    assert (verdict.state, verdict.detail, verdict.hint, verdict.covered) == (state, "no LSTM", "use openvino", False)
