from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.overhead import VARIANTS, tools_s, write_recipe
from compiler.recipe import load_recipe


def test_the_recipe_is_one_that_the_compiler_reads(tmp_path: Path) -> None:
    recipe, _ = load_recipe(write_recipe(tmp_path, Path("light.onnx"), Path("heavy.onnx"), VARIANTS))
    assert [(section.target, section.precision) for section in recipe.variants] == list(VARIANTS)
    assert not recipe.measure.enabled


def test_the_tools_time_is_the_sum_of_all_results(tmp_path: Path) -> None:
    for name, build, prove in (("a", 1.5, 0.25), ("b", 2.0, 0.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({"build_s": build, "prove_s": prove}))
    assert tools_s(tmp_path) == pytest.approx((3.5, 0.75))
