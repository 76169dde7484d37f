"""A search of a few trials on a tiny CNN: what matters is that it is kept, bounded, and never makes an answer wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from compiler.capture import CapturedModel, capture
from compiler.processes import default_budget, run_process
from compiler.targets import Tuning
from compiler.targets.tvm import TvmTarget
from compiler.worker import ARTEFACT, JOB, RESULT, BuildJob, BuildResult
from isthmus.errors import InputError
from tests.compiler import models

pytestmark = pytest.mark.slow
Seen = list[tuple[str, int, int]]


@pytest.fixture
def model(tmp_path: Path) -> CapturedModel:
    return capture(models.write_cnn(tmp_path / "m.onnx"), tmp_path / "captured.onnx")


def build(
    model: CapturedModel, folder: Path, tuning: Tuning, platform: str = "x86_64", seen: Seen | None = None
) -> BuildResult:
    """Build as the compiler does, in a process of its own: a search is hard on the one that it runs in."""
    folder.mkdir()
    job = BuildJob(target="tvm", role="light", model=model, precision="fp32", platform=platform, tuning=tuning)
    (folder / JOB).write_text(job.model_dump_json())
    run_process(
        "compiler.worker", folder, what="tuning", budget=default_budget(),
        advance=lambda *at: None if seen is None else seen.append(at),
    )  # fmt: skip
    return BuildResult.model_validate_json((folder / RESULT).read_bytes())


def test_what_a_search_spent_is_not_spent_again(model: CapturedModel, tmp_path: Path) -> None:
    seen: Seen = []
    tuning = Tuning(trials=12, database=tmp_path / "database")

    first, second = (build(model, tmp_path / run, tuning, seen=seen) for run in ("first", "second"))

    assert first.note.startswith("tuned: 12 trials")
    assert second.note.startswith("tuned: 0 trials")
    assert first.not_reproducible
    assert ("tune", 12, 12) in seen
    assert list((tmp_path / "database").glob("*/ledger.json"))
    files = [{p.name: p.read_bytes() for p in (tmp_path / run / ARTEFACT).iterdir()} for run in ("first", "second")]
    assert files[0] == files[1]  # one database, the same code


def test_a_tuned_library_computes_what_the_source_does(model: CapturedModel, tmp_path: Path) -> None:
    built = build(model, tmp_path / "out", Tuning(trials=16))
    image = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)

    answers = TvmTarget().open(tmp_path / "out" / ARTEFACT / built.entry, threads=1).infer({"image": image})["logits"]

    np.testing.assert_allclose(
        answers, onnxruntime.InferenceSession(str(model.path)).run(None, {"image": image})[0], atol=1e-4
    )


def test_another_machine_cannot_be_searched_for(model: CapturedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot search for faster code for aarch64"):
        build(model, tmp_path / "out", Tuning(trials=4), platform="aarch64")


def test_a_broken_database_is_named(model: CapturedModel, tmp_path: Path) -> None:
    tuning = Tuning(trials=4, database=tmp_path / "database")
    build(model, tmp_path / "a", tuning)
    (ledger,) = (tmp_path / "database").glob("*/ledger.json")
    ledger.write_text("{broken")

    with pytest.raises(InputError, match=r"tuning database .* cannot be read") as caught:
        build(model, tmp_path / "b", tuning)

    assert "remove the folder" in caught.value.hint
