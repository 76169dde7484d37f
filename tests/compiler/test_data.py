from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.capture import CapturedModel
from compiler.data import as_samples, has_labels, is_batchable, load_labelled, load_samples, request, requests, run_over
from isthmus.bundle import TensorSpec
from isthmus.errors import InputError
from tests.compiler.models import write_samples


def model(*inputs: TensorSpec, **more: Any) -> CapturedModel:
    outputs = more.pop("outputs", (TensorSpec(name="y", datatype="FP32", shape=(-1, 2)),))
    return CapturedModel(Path("none.onnx"), "0" * 64, inputs, outputs, attention=False, **more)


MODEL = model(TensorSpec(name="x", datatype="FP32", shape=(-1, 2)), TensorSpec(name="n", datatype="INT64", shape=(-1,)))
STATEFUL = model(
    TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),
    TensorSpec(name="state", datatype="FP32", shape=(2, -1, 3)),
    TensorSpec(name="rate", datatype="INT64", shape=()),
    outputs=(
        TensorSpec(name="y", datatype="FP32", shape=(-1, 1)),
        TensorSpec(name="s", datatype="FP32", shape=(2, -1, 3)),
    ),
    axes={"x": ("batch", ""), "state": ("", "batch", ""), "rate": (), "y": ("batch", ""), "s": ("", "batch", "")},
)
GOOD: dict[str, Any] = {
    "x": np.ones((4, 2), np.float32),
    "n": np.arange(4),
    "labels": np.array([0, 1, 2, 0]),
    "other": np.zeros(7),
}


def test_inputs_and_labels_are_read(tmp_path: Path) -> None:
    samples = load_labelled(write_samples(tmp_path / "d", GOOD), MODEL, classes=3)

    assert len(samples) == 4
    assert sorted(samples.inputs) == ["n", "x"]
    assert samples.labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((4, 3), np.float32)}, "'x': expected float32"),
        ({"x": np.ones((4, 2), np.float64)}, "got float64"),
        ({"x": np.full((4, 2), np.nan, np.float32)}, "not finite"),
        ({"n": np.arange(3)}, "same number of rows"),
        ({"labels": np.array([0, 1, 2, 3])}, "classes 0 to 2"),
        ({"labels": np.array([0, -1, 2, 0])}, "classes 0 to 2"),
        ({"labels": np.array([0.0, 1.0, 2.0, 0.0])}, "expected int64"),
        ({"labels": np.array([0, 1])}, "expected int64"),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_samples(tmp_path / "data.safetensors", GOOD | change)

    with pytest.raises(InputError, match=message) as caught:
        load_labelled(path, MODEL, classes=3)

    assert "data.safetensors" in caught.value.message


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "d", {"x": GOOD["x"]})

    with pytest.raises(InputError, match="missing tensor 'n'; the file has x"):
        load_samples(path, MODEL)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 100])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d").write_bytes(content)

    with pytest.raises(InputError, match="not a safetensors file"):
        load_samples(tmp_path / "d", MODEL)


def test_batches_cover_every_row_once_and_in_order() -> None:
    seen: list[tuple[int, int]] = []
    inputs = {"x": np.arange(20, dtype=np.float32).reshape(10, 2), "n": np.arange(10)}

    outputs = run_over(lambda asked: {"y": asked["x"] * 2}, MODEL, inputs, batch=4, advance=lambda *at: seen.append(at))

    assert outputs["y"].tolist() == (inputs["x"] * 2).tolist()
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_a_model_whose_batch_is_not_in_front_takes_one_sample_at_a_time() -> None:
    inputs = {
        "x": np.zeros((3, 4), np.float32),
        "state": np.zeros((3, 2, 1, 3), np.float32),
        "rate": np.array([8, 16, 24]),
    }

    assert is_batchable(MODEL)
    assert not is_batchable(STATEFUL)
    shapes = [{name: array.shape for name, array in asked.items()} for _, asked in requests(STATEFUL, inputs, 64)]
    assert shapes == [{"x": (1, 4), "state": (2, 1, 3), "rate": ()}] * 3
    assert int(request(STATEFUL, inputs, 2, 3)["rate"]) == 24
    answer = as_samples(STATEFUL, {"y": np.zeros((1, 1)), "s": np.zeros((2, 1, 3))})
    assert {name: array.shape for name, array in answer.items()} == {"y": (1, 1), "s": (1, 2, 1, 3)}
    outputs = run_over(lambda asked: {"y": asked["x"][:, :1], "s": asked["state"]}, STATEFUL, inputs, batch=64)
    assert outputs["s"].shape == (3, 2, 1, 3)


def test_a_length_out_of_range_is_named(tmp_path: Path) -> None:
    text = model(
        TensorSpec(name="ids", datatype="INT64", shape=(-1, -1)),
        axes={"ids": ("batch", "sequence")},
        lengths={"batch": (1, 8), "sequence": (4, 16)},
    )
    for length, fits in ((4, True), (16, True), (3, False), (17, False)):
        path = write_samples(tmp_path / "d", {"ids": np.zeros((20, length), np.int64)})
        if fits:
            assert len(load_samples(path, text)) == 20
            continue
        with pytest.raises(InputError, match=f"axis 'sequence' must be 4 to 16 long, got {length}"):
            load_samples(path, text)


def test_labels_are_seen_without_reading_them(tmp_path: Path) -> None:
    assert has_labels(write_samples(tmp_path / "with", GOOD))
    assert not has_labels(write_samples(tmp_path / "without", {"x": GOOD["x"]}))
    assert not has_labels(tmp_path / "nowhere")
