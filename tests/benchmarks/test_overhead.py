from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.overhead import VARIANTS, by_hand_s, compile_s, write_recipe
from compiler.recipe import load_recipe
from isthmus.bundle import open_bundle
from tests.compiler.conftest import fill_workspace


def test_the_recipe_is_one_that_the_compiler_reads(tmp_path: Path) -> None:
    recipe, _ = load_recipe(write_recipe(tmp_path, Path("light.onnx"), Path("heavy.onnx"), VARIANTS))
    assert [(section.target, section.precision) for section in recipe.variants] == list(VARIANTS)
    assert not recipe.measure.enabled


@pytest.mark.slow
def test_what_is_timed_is_done(tmp_path: Path) -> None:
    fill_workspace(tmp_path)
    light, heavy = tmp_path / "light-v1.onnx", tmp_path / "heavy.onnx"

    assert compile_s(write_recipe(tmp_path, light, heavy, VARIANTS)) > 0
    for job in ("light", "heavy", *("-".join(variant) for variant in VARIANTS)):
        assert by_hand_s(job, light, heavy, tmp_path) > 0

    assert [(one.runtime, one.precision) for one in open_bundle(tmp_path / "bundle").variants] == list(VARIANTS)
    made = {path.name for path in tmp_path.glob("by-hand*")}
    assert {"by-hand-openvino-fp32.xml", "by-hand-openvino-int8.xml", "by-hand.onnx"} <= made
