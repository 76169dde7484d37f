"""A search of a few trials on a tiny CNN: what matters is that it is kept, bounded, and never makes an answer wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from compiler.capture import CapturedModel, capture
from compiler.targets import BuildOptions, Tuning
from compiler.targets.tvm import TvmTarget
from isthmus.errors import InputError
from tests.compiler import models

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path: Path) -> CapturedModel:
    return capture(models.write_cnn(tmp_path / "m.onnx"), tmp_path / "captured.onnx")


def test_what_a_search_spent_is_not_spent_again(model: CapturedModel, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    tuning = Tuning(trials=12, database=tmp_path / "database")
    notes = []
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        options = BuildOptions(tuning=tuning, advance=lambda *at: seen.append(at))
        built = TvmTarget().build(model, tmp_path / run, options)
        notes.append(built.note)
        assert built.not_reproducible

    assert notes[0].startswith("tuned: 12 trials")
    assert notes[1].startswith("tuned: 0 trials")
    assert seen[-1] == ("tune", 12, 12)
    assert list((tmp_path / "database").glob("*/ledger.json"))
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / run).iterdir()} for run in ("first", "second")
    )
    assert first == second  # one database, the same code


def test_a_tuned_library_computes_what_the_source_does(model: CapturedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    built = TvmTarget().build(model, tmp_path / "out", BuildOptions(tuning=Tuning(trials=16)))
    image = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)

    answers = TvmTarget().open(tmp_path / "out" / built.entry, threads=1).infer({"image": image})["logits"]

    np.testing.assert_allclose(
        answers, onnxruntime.InferenceSession(str(model.path)).run(None, {"image": image})[0], atol=1e-4
    )


def test_another_machine_cannot_be_searched_for(model: CapturedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="cannot search for faster code for aarch64"):
        TvmTarget().build(model, tmp_path / "out", BuildOptions(platform="aarch64", tuning=Tuning(trials=4)))


def test_a_broken_database_is_named(model: CapturedModel, tmp_path: Path) -> None:
    tuning = Tuning(trials=4, database=tmp_path / "database")
    (tmp_path / "a").mkdir()
    TvmTarget().build(model, tmp_path / "a", BuildOptions(tuning=tuning))
    (ledger,) = (tmp_path / "database").glob("*/ledger.json")
    ledger.write_text("{broken")
    (tmp_path / "b").mkdir()

    with pytest.raises(InputError, match=r"tuning database .* cannot be read") as caught:
        TvmTarget().build(model, tmp_path / "b", BuildOptions(tuning=tuning))

    assert "remove the folder" in caught.value.hint
