"""Deltas of compiled models, whose code and weights no format describes: they come back, for less than the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compiler.capture import capture
from compiler.targets import BuildOptions
from compiler.targets.tensorrt import TENSORRT_RTX, build_plan
from compiler.targets.tvm import TvmTarget
from isthmus.delta import apply_delta, make_delta
from isthmus.digests import sha256_file
from tests.compiler import models

ONE_GPU = replace(TENSORRT_RTX, capabilities=("SM86",))

Build = Callable[[Path, Path], Path]


def tvm_library(source: Path, folder: Path) -> Path:
    """Return the shared library that TVM makes of a model."""
    TvmTarget().build(capture(source, folder / "captured.onnx"), folder, BuildOptions())
    return next(folder.glob("*.so"))


def tensorrt_plan(source: Path, folder: Path) -> Path:
    """Return the engine that TensorRT-RTX makes of a model."""
    model = capture(source, folder / "captured.onnx")
    build_plan(ONE_GPU, model, BuildOptions(samples={"tokens": models.tokens(4)}, max_batch=4), folder / "plan")
    return folder / "plan"


@pytest.mark.slow
@pytest.mark.parametrize("build", [tvm_library, tensorrt_plan])
def test_a_compiled_model_comes_back_from_the_one_before(tmp_path: Path, build: Build) -> None:
    weights = models.encoder_weights()
    files = []
    for name, values, mean in (("old", weights, False), ("new", models.nudged(weights, 1e-4), True)):
        folder = tmp_path / name
        folder.mkdir()
        files.append(build(models.write_encoder(folder / "model.onnx", values, mean=mean), folder))
    old, new = files
    made, alone = make_delta(old, new, tmp_path / "delta"), make_delta(None, new, tmp_path / "alone")

    apply_delta(old, tmp_path / "delta", tmp_path / "out", sha256=sha256_file(new), length=new.stat().st_size)

    assert (tmp_path / "out").read_bytes() == new.read_bytes() != old.read_bytes()
    assert made.length < alone.length
