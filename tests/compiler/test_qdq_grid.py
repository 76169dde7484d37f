"""ONNX files on the grid of the version before, with ONNX Runtime's real quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compiler.capture import CapturedModel, capture
from compiler.grid import PreviousGrid
from compiler.targets import BuildOptions, Built
from compiler.targets.onnxruntime import OnnxRuntimeTarget
from tests.compiler import models
from tests.compiler.models import Weights

pytestmark = pytest.mark.slow

IMAGES = np.random.default_rng(3).normal(size=(40, 1, 8, 8)).astype(np.float32)


def captured(folder: Path, weights: Weights) -> CapturedModel:
    folder.mkdir(exist_ok=True)
    return capture(models.write_encoder(folder / "m.onnx", weights), folder / "captured.onnx")


def build(model: CapturedModel, folder: Path, old: Path | None = None, share: float = 1.0) -> Built:
    folder.mkdir(exist_ok=True)
    samples = {"tokens": models.tokens(60)} if model.inputs[0].name == "tokens" else {"image": IMAGES}
    previous = None if old is None else PreviousGrid(old, share)
    return OnnxRuntimeTarget().build(model, folder, BuildOptions(precision="int8", samples=samples, previous=previous))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    build(captured(folder, models.encoder_weights()), folder)
    return folder / "model.onnx"


def constants(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_an_unchanged_model_gives_the_same_bytes(old: Path, tmp_path: Path) -> None:
    built = build(captured(tmp_path, models.encoder_weights()), tmp_path / "out", old)

    assert (tmp_path / "out" / "model.onnx").read_bytes() == old.read_bytes()
    assert built.grid == "kept"
    assert {tensor.kept == tensor.channels for tensor in built.tensors} == {True}


def test_a_little_training_changes_few_integers_and_hardly_a_scale(old: Path, tmp_path: Path) -> None:
    weights = models.nudged(models.encoder_weights(), 0.001)
    built = build(captured(tmp_path, weights), tmp_path / "out", old)
    build(captured(tmp_path, weights), tmp_path / "anew")

    before, kept, anew = (constants(path / "model.onnx") for path in (old.parent, tmp_path / "out", tmp_path / "anew"))
    assert before.keys() == kept.keys()
    assert len(old.read_bytes()) == len((tmp_path / "out" / "model.onnx").read_bytes())

    def changed(after: dict[str, np.ndarray[Any, Any]], kind: type) -> float:
        names = [name for name in before if before[name].dtype == kind and before[name].size > 20]
        return float(np.mean(np.concatenate([(before[name] != after[name]).ravel() for name in names])))

    assert changed(kept, np.int8) < changed(anew, np.int8)
    scales = [name for name in before if name.endswith("_scale")]
    same = [name for name in scales if np.array_equal(before[name], kept[name])]
    assert len(same) > 0.8 * len(scales)
    assert built.grid in ("kept", "part")
    assert max(tensor.noise for tensor in built.tensors) < 4


def test_answers_follow_the_new_weights(old: Path, tmp_path: Path) -> None:
    weights = {name: array * np.float32(0.8) for name, array in models.encoder_weights().items()}
    model = captured(tmp_path, weights)
    build(model, tmp_path / "out", old)
    inputs = {"tokens": models.tokens(50, seed=9)}

    kept, stale, truth = (
        OnnxRuntimeTarget().open(path, threads=1).infer(inputs)["logits"]
        for path in (tmp_path / "out" / "model.onnx", old, model.path)
    )

    assert np.abs(kept - truth).mean() < np.abs(stale - truth).mean() / 2


def test_biases_stand_on_the_scales_of_their_operators(tmp_path: Path) -> None:
    """A dead channel with a large bias: the quantizer makes its scale larger than the weights ask for."""
    before = capture(models.write_cnn(tmp_path / "old.onnx"), tmp_path / "old-captured.onnx")
    build(before, tmp_path / "old")
    new = onnx.load(models.write_cnn(tmp_path / "new.onnx"))
    arrays = {tensor.name: tensor for tensor in new.graph.initializer}
    kernel = numpy_helper.to_array(arrays["kernel"]).copy()
    kernel[1] *= np.float32(1e-9)
    bias = numpy_helper.to_array(arrays["kernel_bias"]) * np.float32(30)
    arrays["kernel"].CopyFrom(numpy_helper.from_array(kernel, "kernel"))
    arrays["kernel_bias"].CopyFrom(numpy_helper.from_array(bias, "kernel_bias"))
    onnx.save(new, tmp_path / "new.onnx")
    model = capture(tmp_path / "new.onnx", tmp_path / "new-captured.onnx")

    built = build(model, tmp_path / "out", tmp_path / "old" / "model.onnx")

    assert built.note == ""
    found = constants(tmp_path / "out" / "model.onnx")
    product = found["image_scale"] * found["kernel_scale"]
    np.testing.assert_allclose(found["kernel_bias_quantized_scale"], product, rtol=1e-6)
    restored = found["kernel_bias_quantized"] * product.astype(np.float64)
    np.testing.assert_allclose(restored, bias, rtol=1e-3, atol=float(product.max()))


def test_what_the_version_before_has_otherwise_is_named_and_new(old: Path, tmp_path: Path) -> None:
    weights = models.encoder_weights()
    path = models.write_encoder(tmp_path / "m.onnx", weights)
    graph = onnx.load(path)
    for tensor in graph.graph.initializer:
        if tensor.name in ("head", "head_bias"):
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.concatenate([array, array[..., :1]], axis=-1), tensor.name))
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value += 1
    onnx.save(graph, path)

    built = build(capture(path, tmp_path / "captured.onnx"), tmp_path / "out", old)

    assert built.grid == "part"
    new = {tensor.name: tensor.reason for tensor in built.tensors if not tensor.kept}
    assert new == {"head": f"its shape was [{models.WIDTH}, 3] and is [{models.WIDTH}, 4]"}


def test_another_model_gives_no_grid(old: Path, tmp_path: Path) -> None:
    model = capture(models.write_cnn(tmp_path / "m.onnx"), tmp_path / "captured.onnx")

    built = build(model, tmp_path / "out", old)

    assert built.grid == "new"
    reasons = {tensor.name: tensor.reason for tensor in built.tensors}
    assert reasons == {
        "kernel": "the version before has no such tensor",
        "head": f"its shape was [{models.WIDTH}, 3] and is [144, 3]",
    }


def test_a_file_that_is_no_model_gives_no_grid(tmp_path: Path) -> None:
    (tmp_path / "old.onnx").write_bytes(b"\xff" * 100)

    built = build(captured(tmp_path, models.encoder_weights()), tmp_path / "out", tmp_path / "old.onnx")

    assert built.grid == "new"
    assert built.note.startswith("the version before cannot be read")


def test_half_of_the_tensors_give_their_grid_up(old: Path, tmp_path: Path) -> None:
    built = build(captured(tmp_path, models.nudged(models.encoder_weights(), 0.0005)), tmp_path / "out", old, 0.5)

    assert built.grid == "part"
    assert sum(tensor.kept + tensor.moved == 0 for tensor in built.tensors) == len(built.tensors) - round(
        len(built.tensors) * 0.5
    )


def test_embeddings_are_packed_and_kept_too(old: Path, tmp_path: Path) -> None:
    before = constants(old)["words"]
    weights = models.nudged(models.encoder_weights(), 0.001, only=("words",))

    build(captured(tmp_path, weights), tmp_path / "out", old)

    after = constants(tmp_path / "out" / "model.onnx")["words"]
    assert before.dtype == after.dtype == np.int8
    assert 0 < (before != after).mean() < 0.3
