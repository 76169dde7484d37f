from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest

from compiler.capture import CapturedModel, capture
from compiler.grid import GridError, PreviousGrid, TensorGrid
from compiler.openvino_grid import keep_grid
from compiler.targets import BuildOptions
from compiler.targets.openvino import OpenVinoRunner, OpenVinoTarget, convert
from tests.compiler import models
from tests.compiler.models import Weights


def captured(folder: Path, weights: Weights) -> CapturedModel:
    folder.mkdir(exist_ok=True)
    return capture(models.write_encoder(folder / "m.onnx", weights), folder / "captured.onnx")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    model = captured(folder, models.encoder_weights())
    OpenVinoTarget().build(model, folder, BuildOptions(precision="int8", samples={"tokens": models.tokens(60)}))
    return folder / "model.xml"


def constants(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    graph = openvino.Core().read_model(str(path))
    return {
        op.get_friendly_name(): np.array(op.data) for op in graph.get_ordered_ops() if op.get_type_name() == "Constant"
    }


def keep(old: Path, folder: Path, weights: Weights) -> Path:
    regrid(old, folder, weights)
    return folder / "model.xml"


def regrid(old: Path, folder: Path, weights: Weights, share: float = 1.0) -> list[TensorGrid]:
    return keep_grid(PreviousGrid(old, share), convert(captured(folder, weights)), folder / "model.xml")


@pytest.mark.slow
def test_an_unchanged_model_gives_the_same_bytes(old: Path, tmp_path: Path) -> None:
    new = keep(old, tmp_path, models.encoder_weights())

    assert new.read_bytes() == old.read_bytes()
    assert new.with_suffix(".bin").read_bytes() == old.with_suffix(".bin").read_bytes()


@pytest.mark.slow
def test_only_what_moved_changes(old: Path, tmp_path: Path) -> None:
    weights = models.encoder_weights()
    small = np.abs(weights["query"]) < 0.02  # the largest ones stay, and with them every scale
    moved = weights | {"query": weights["query"] + np.float32(0.003) * small}
    moved["out_bias"] = weights["out_bias"] + np.float32(0.1)

    new = keep(old, tmp_path, moved)

    assert new.read_bytes() == old.read_bytes()
    before, after = constants(old), constants(new)
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert sorted(before[name].dtype.str for name in changed) == ["<f4", "|i1"]
    assert {before[name].size for name in changed} == {models.WIDTH, models.WIDTH**2}
    difference = next(after[name].astype(int) - before[name] for name in changed if before[name].dtype == np.int8)
    assert 0 < np.abs(difference).max() <= 6
    assert [len(path.with_suffix(".bin").read_bytes()) for path in (old, new)] == [
        old.with_suffix(".bin").stat().st_size
    ] * 2


@pytest.mark.slow
def test_answers_follow_the_new_weights(old: Path, tmp_path: Path) -> None:
    weights = {name: array * np.float32(0.8) for name, array in models.encoder_weights().items()}
    new = keep(old, tmp_path, weights)
    inputs = {"tokens": models.tokens(50, seed=9)}
    exact = tmp_path / "exact.xml"
    openvino.save_model(convert(captured(tmp_path, weights)), str(exact), compress_to_fp16=False)

    kept, truth, stale = (OpenVinoRunner(path, threads=1).infer(inputs)["logits"] for path in (new, exact, old))

    assert np.abs(kept - truth).mean() < np.abs(stale - truth).mean() / 2


@pytest.mark.slow
def test_channels_that_left_the_grid_get_scales_of_their_own(old: Path, tmp_path: Path) -> None:
    weights = models.encoder_weights()
    grown = weights["value"].copy()
    grown[0, 3] *= 9  # one weight of one output channel: the whole channel, rescaled, would be moved
    tensors = regrid(old, tmp_path, weights | {"value": grown})

    assert sorted(tensor.channels - tensor.kept for tensor in tensors) == [0] * (len(tensors) - 1) + [1]
    before, after = constants(old), constants(tmp_path / "model.xml")
    scales = [name for name in before if before[name].shape == (models.WIDTH, 1)]
    changed = {
        name: np.flatnonzero(before[name] != after[name]) for name in scales if (before[name] != after[name]).any()
    }
    assert [places.tolist() for places in changed.values()] == [[3]]
    assert max(tensor.clipped for tensor in tensors) == 0.0


@pytest.mark.slow
def test_the_most_damaged_tensors_give_their_grid_up_first(old: Path, tmp_path: Path) -> None:
    weights = models.encoder_weights()
    nudged = models.nudged(weights, 0.001, only=("value",)) | {}
    nudged["value"] = nudged["value"] * np.float32(0.7) + np.float32(0.002) * np.sign(nudged["value"])

    tensors = regrid(old, tmp_path, nudged, share=0.5)

    new = {tensor.name for tensor in tensors if tensor.kept + tensor.moved == 0}
    assert len(new) == len(tensors) - round(len(tensors) * 0.5)
    whole = regrid(old, tmp_path / "again", nudged)
    worst = max(whole, key=lambda tensor: tensor.noise)
    assert worst.name in new


@pytest.mark.slow
def test_another_topology_needs_a_new_grid(old: Path, tmp_path: Path) -> None:
    path = models.write_encoder(tmp_path / "m.onnx", models.encoder_weights())
    model = onnx.load(path)
    softmax = next(node for node in model.graph.node if node.name == "softmax")
    softmax.op_type = "Sigmoid"
    del softmax.attribute[:]
    onnx.save(model, path)

    with pytest.raises(GridError, match=r"has no operator like .*'softmax'.*: its architecture was another"):
        keep_grid(PreviousGrid(old), convert(capture(path, tmp_path / "c.onnx")), tmp_path / "model.xml")


@pytest.mark.slow
def test_operators_fed_in_another_order_need_a_new_grid(old: Path, tmp_path: Path) -> None:
    path = models.write_encoder(tmp_path / "m.onnx", models.encoder_weights())
    model = onnx.load(path)
    score = next(node for node in model.graph.node if node.name == "residual_add")
    score.input[0], score.input[1] = score.input[1], score.input[0]
    onnx.save(model, path)

    with pytest.raises(GridError, match="is fed by another one"):
        keep_grid(PreviousGrid(old), convert(capture(path, tmp_path / "c.onnx")), tmp_path / "model.xml")


@pytest.mark.slow
def test_a_document_type_is_not_read(old: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "old.xml"
    hostile.write_bytes(b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "b">]>' + old.read_bytes().split(b"?>", 1)[1])
    hostile.with_suffix(".bin").write_bytes(old.with_suffix(".bin").read_bytes())

    with pytest.raises(GridError, match="document type"):
        keep(hostile, tmp_path, models.encoder_weights())
