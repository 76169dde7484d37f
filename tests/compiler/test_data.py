from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.data import load_labelled, load_samples, run_in_batches
from isthmus.bundle import TensorSpec
from isthmus.errors import InputError
from tests.compiler.models import write_samples

SPECS = [TensorSpec(name="x", datatype="FP32", shape=(-1, 2)), TensorSpec(name="n", datatype="INT64", shape=(-1,))]
GOOD: dict[str, Any] = {
    "x": np.ones((4, 2), np.float32),
    "n": np.arange(4),
    "labels": np.array([0, 1, 2, 0]),
    "other": np.zeros(7),
}


def test_inputs_and_labels_are_read(tmp_path: Path) -> None:
    samples = load_labelled(write_samples(tmp_path / "d", GOOD), SPECS, classes=3)

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
        load_labelled(path, SPECS, classes=3)

    assert "data.safetensors" in caught.value.message


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "d", {"x": GOOD["x"]})

    with pytest.raises(InputError, match="missing tensor 'n'; the file has x"):
        load_samples(path, SPECS)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 100])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d").write_bytes(content)

    with pytest.raises(InputError, match="not a safetensors file"):
        load_samples(tmp_path / "d", SPECS)


def test_batches_cover_every_row_once_and_in_order() -> None:
    seen: list[tuple[int, int]] = []
    rows = np.arange(10)

    outputs = run_in_batches(
        lambda inputs: {"y": inputs["x"] * 2}, {"x": rows}, batch=4, advance=lambda *at: seen.append(at)
    )

    assert outputs["y"].tolist() == (rows * 2).tolist()
    assert seen == [(4, 10), (8, 10), (10, 10)]
