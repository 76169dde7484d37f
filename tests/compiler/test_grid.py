from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compiler.capture import CapturedModel, capture
from compiler.grid import GridError, keep_grid, requantize
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
    keep_grid(old, convert(captured(folder, weights)), folder / "model.xml")
    return folder / "model.xml"


@pytest.mark.slow
def test_an_unchanged_model_gives_the_same_bytes(old: Path, tmp_path: Path) -> None:
    new = keep(old, tmp_path, models.encoder_weights())

    assert new.read_bytes() == old.read_bytes()
    assert new.with_suffix(".bin").read_bytes() == old.with_suffix(".bin").read_bytes()


@pytest.mark.slow
def test_only_what_moved_changes(old: Path, tmp_path: Path) -> None:
    weights = models.encoder_weights()
    moved = weights | {"query": weights["query"] * np.float32(0.98), "out_bias": weights["out_bias"] + np.float32(0.1)}

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
def test_weights_far_outside_need_a_new_grid(old: Path, tmp_path: Path) -> None:
    weights = models.encoder_weights()
    weights["value"] = weights["value"] * 3

    with pytest.raises(GridError, match="outside of the old grid"):
        keep(old, tmp_path, weights)

    assert not (tmp_path / "model.xml").exists()


@pytest.mark.slow
def test_another_topology_needs_a_new_grid(old: Path, tmp_path: Path) -> None:
    path = models.write_encoder(tmp_path / "m.onnx", models.encoder_weights())
    model = onnx.load(path)
    softmax = next(node for node in model.graph.node if node.name == "softmax")
    softmax.op_type = "Sigmoid"
    del softmax.attribute[:]
    onnx.save(model, path)

    with pytest.raises(GridError, match="is not in the version before"):
        keep_grid(old, convert(capture(path, tmp_path / "c.onnx")), tmp_path / "model.xml")


@pytest.mark.slow
def test_operators_fed_in_another_order_need_a_new_grid(old: Path, tmp_path: Path) -> None:
    path = models.write_encoder(tmp_path / "m.onnx", models.encoder_weights())
    model = onnx.load(path)
    score = next(node for node in model.graph.node if node.name == "residual_add")
    score.input[0], score.input[1] = score.input[1], score.input[0]
    onnx.save(model, path)

    with pytest.raises(GridError, match="is fed by another one"):
        keep_grid(old, convert(capture(path, tmp_path / "c.onnx")), tmp_path / "model.xml")


@pytest.mark.slow
def test_a_document_type_is_not_read(old: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "old.xml"
    hostile.write_bytes(b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "b">]>' + old.read_bytes().split(b"?>", 1)[1])
    hostile.with_suffix(".bin").write_bytes(old.with_suffix(".bin").read_bytes())

    with pytest.raises(GridError, match="document type"):
        keep(hostile, tmp_path, models.encoder_weights())


SCALE = np.array([[0.01], [0.5]])


@given(arrays(np.int8, (2, 6), elements=st.integers(-127, 127)))
def test_integers_survive_their_own_weights(old: np.ndarray[Any, Any]) -> None:
    weights = (old * SCALE).astype(np.float32)

    integers, clipped = requantize(weights, old, SCALE, None)

    assert integers.dtype == np.int8
    np.testing.assert_array_equal(integers, old)
    assert clipped == 0.0


@given(arrays(np.float32, (2, 6), elements=st.floats(-100, 100, width=32)))
def test_the_nearest_step_is_taken_and_what_does_not_fit_is_counted(weights: np.ndarray[Any, Any]) -> None:
    old = np.zeros((2, 6), np.int8)

    integers, clipped = requantize(weights, old, SCALE, None)

    steps = np.clip(weights.astype(np.float64) / SCALE, -127, 127)
    assert (np.abs(integers - steps) <= 0.5 + 1e-3).all()
    assert clipped == pytest.approx((np.abs(weights / SCALE) > 127.5 + 1e-3).mean(), abs=1e-9)


def test_a_zero_point_moves_the_grid() -> None:
    old = np.array([[10, 200]], np.uint8)

    integers, clipped = requantize(np.array([[0.1, 2.0]], np.float32), old, np.array([[0.1]]), np.array([[9.0]]))

    assert integers.tolist() == [[10, 29]]
    assert clipped == 0.0


def test_a_tie_keeps_the_old_step() -> None:
    old = np.array([[3, 4]], np.int8)

    assert requantize(np.array([[3.5, 3.5]], np.float32), old, np.array([[1.0]]), None)[0].tolist() == [[3, 4]]


def test_a_dead_channel_may_stay_dead_but_not_wake() -> None:
    old, scale = np.zeros((1, 4), np.int8), np.array([[0.0]])

    assert requantize(np.zeros((1, 4), np.float32), old, scale, None)[1] == 0.0
    assert requantize(np.ones((1, 4), np.float32), old, scale, None)[1] == 1.0


def test_weights_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(GridError, match="not numbers"):
        requantize(np.array([[np.nan]], np.float32), np.zeros((1, 1), np.int8), np.array([[1.0]]), None)
