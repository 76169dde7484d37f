from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiler.conftest import WriteRecipe

ORT_ONLY = '[[variants]]\ntarget = "onnxruntime"\n'


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isthmus", "compile", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PYTHONPATH": ":".join(sys.path), "COLUMNS": "100"}
    )


@pytest.mark.slow
def test_json_is_all_there_is_on_standard_output(recipe: WriteRecipe, tmp_path: Path) -> None:
    done = run(
        recipe(measure="true\nseconds = 0.05"),
        "--output",
        tmp_path / "out",
        "--json",
        "--archive",
        tmp_path / "out.tar",
    )

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bundle"] == str(tmp_path / "out")
    assert [entry["variant"] for entry in result["variants"]] == ["openvino-int8", "openvino-fp32", "onnxruntime-fp32"]
    assert all(entry["latency_ms"] > 0 and entry["refused"] is None for entry in result["variants"])
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert (tmp_path / "out.tar").is_file()


@pytest.mark.slow
def test_a_refusal_shows_the_table_and_ends_with_six(recipe: WriteRecipe, tmp_path: Path) -> None:
    path = recipe(variants='[[variants]]\ntarget = "openvino"\n', difference=1e-12)

    done = run(path, "--output", tmp_path / "out")

    assert done.returncode == 6
    assert "openvino-fp32" in done.stdout
    assert "refused" in done.stdout
    assert "differs from the source by" in done.stderr
    assert "hint:" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_bundle_lies_beside_the_recipe(recipe: WriteRecipe, tmp_path: Path) -> None:
    done = run(recipe(variants=ORT_ONLY))

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bundle" / "manifest.json").is_file()
    assert "onnxruntime-fp32" in done.stdout


@pytest.mark.slow
def test_a_wrong_recipe_ends_with_two_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[model]\nname = 3\n")

    done = run(tmp_path / "recipe.toml")

    assert done.returncode == 2
    assert "model.name" in done.stderr
    assert "Traceback" not in done.stderr
