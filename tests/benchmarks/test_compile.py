from __future__ import annotations

import pytest

from benchmarks.cells.contest import Contestant, ratio
from benchmarks.compile import Field, geometric_mean, goals_of, row_of


def _field(model: str, seconds: dict[str, float], precisions: dict[str, str]) -> Field:
    ours = {"openvino-int8", "tvm-fp32"}
    contestants = {name: Contestant(name, name in ours, name, "") for name in seconds}
    # The second round ran while the machine was busy: all of it took three times as long.
    times = {name: [value, 3 * value] for name, value in seconds.items()}
    return Field(model, contestants, precisions, times, {})


FIELD = _field(
    "resnet18",
    {"ort-fp32": 0.040, "openvino-default": 0.020, "openvino-int8": 0.010, "tvm-fp32": 0.050},
    {"ort-fp32": "fp32", "openvino-default": "bf16", "openvino-int8": "int8", "tvm-fp32": "fp32"},
)


def test_ratios_do_not_see_load_that_meets_all_alike() -> None:
    assert ratio(FIELD.times, "tvm-fp32", "ort-fp32") == pytest.approx(1.25)


def test_a_row_holds_the_best_of_both_sides() -> None:
    row = row_of(FIELD)
    assert (row["ours"], row["best by hand"], row["int8"]) == ("openvino-int8", "openvino-default", "openvino-int8")
    assert row["ours / by hand"] == pytest.approx(0.5)
    assert row["int8 / ORT fp32"] == pytest.approx(0.25)
    assert row["tvm / ORT fp32"] == pytest.approx(1.25)


def test_a_model_without_int8_or_tvm_has_no_ratio_for_them() -> None:
    row = row_of(_field("minilm", {"ort-fp32": 0.02}, {"ort-fp32": "fp32"}))
    assert (row["ours"], row["ours / by hand"], row["int8 / ORT fp32"], row["tvm / ORT fp32"]) == ("", None, None, None)


def test_goals_name_the_worst_model() -> None:
    slower = _field("minilm", {"ort-fp32": 0.02, "tvm-fp32": 0.05}, {"ort-fp32": "fp32", "tvm-fp32": "fp32"})
    goals = {goal.goal: goal for goal in goals_of([row_of(FIELD), row_of(slower)])}
    assert goals["best of ours / best by hand, worst: minilm"].value == pytest.approx(2.5)
    assert not goals["TVM untuned / ORT fp32, worst: minilm"].holds
    assert goals["best INT8 / ORT fp32, resnet18"].holds


def test_the_geometric_mean_of_a_ratio_and_its_inverse_is_one() -> None:
    assert geometric_mean([4.0, 0.25]) == pytest.approx(1.0)
