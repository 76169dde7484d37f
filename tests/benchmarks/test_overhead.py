from __future__ import annotations

from pathlib import Path

from benchmarks.overhead import VARIANTS, write_recipe
from compiler.recipe import load_recipe


def test_the_recipe_is_one_that_the_compiler_reads(tmp_path: Path) -> None:
    recipe, _ = load_recipe(write_recipe(tmp_path, Path("light.onnx"), Path("heavy.onnx"), VARIANTS))
    assert [(section.target, section.precision) for section in recipe.variants] == list(VARIANTS)
    assert not recipe.measure.enabled
