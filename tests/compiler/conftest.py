"""A workspace for the compiler: two encoders of which the heavy one is always right, data, and a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.compiler import models

RECIPE = """
[model]
name = "tiny"
version = {version}
labels = ["a", "b", "c"]
max_batch = 16
[light]
source = "{light}"
[heavy]
source = "heavy.onnx"
threads = 1
{variants}
[data]
quantization = "quantization.safetensors"
calibration = "calibration.safetensors"
[guard]
max_accuracy_drop = {drop}
max_difference = {difference}
[measure]
enabled = {measure}
{rest}
"""
INT8 = '[[variants]]\ntarget = "openvino"\nprecision = "int8"\n'
ALL = INT8 + '[[variants]]\ntarget = "openvino"\n[[variants]]\ntarget = "onnxruntime"\n'

WriteRecipe = Callable[..., Path]


def light_weights() -> models.Weights:
    return models.nudged(models.encoder_weights(), 0.12)


def fill_workspace(folder: Path) -> None:
    truth = models.encoder_weights()
    heavy = models.write_encoder(folder / "heavy.onnx", truth)
    light = light_weights()
    models.write_encoder(folder / "light-v1.onnx", light)
    # A little smaller as well: a tensor of 48 weights may not have a single one outside of the old grid.
    moved = light | {name: light[name] * np.float32(0.95) for name in ("value", "head")}
    moved = models.nudged(moved, 0.001, seed=2, only=("value", "head", "out_bias"))
    models.write_encoder(folder / "light-v2.onnx", moved)
    session = onnxruntime.InferenceSession(str(heavy))
    inputs = models.tokens(400)
    labels = session.run(None, {"tokens": inputs})[0].argmax(axis=1).astype(np.int64)
    models.write_samples(folder / "calibration.safetensors", {"tokens": inputs, "labels": labels})
    models.write_samples(folder / "quantization.safetensors", {"tokens": models.tokens(100, seed=8)})


def write_recipe(folder: Path, name: str = "recipe.toml", **changes: object) -> Path:
    values = {
        "version": 1,
        "light": "light-v1.onnx",
        "variants": ALL,
        "rest": "",
        "drop": 0.1,
        "difference": 1e-3,
        "measure": "false",
        **changes,
    }
    path = folder / name
    path.write_text(RECIPE.format(**values), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data; read only."""
    folder = tmp_path_factory.mktemp("compiler")
    fill_workspace(folder)
    return folder


@pytest.fixture
def recipe(workspace: Path, tmp_path: Path) -> WriteRecipe:
    """Write a recipe beside a link to the workspace's files."""
    for path in workspace.iterdir():
        if path.is_file():
            (tmp_path / path.name).symlink_to(path)
    return lambda name="recipe.toml", **changes: write_recipe(tmp_path, name, **changes)
