"""A search of a few trials on a tiny CNN: what matters is that it is kept, bounded, and never makes an answer wrong."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
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
TRIALS = 16
Seen = list[tuple[str, int, int]]


@dataclass(frozen=True)
class Searched:
    """A model, the only search of this file, and what it left."""

    model: CapturedModel
    database: Path
    folder: Path
    built: BuildResult
    seen: Seen


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    root = tmp_path_factory.mktemp("tuning")
    model = capture(models.write_cnn(root / "m.onnx"), root / "captured.onnx")
    seen: Seen = []
    built = build(model, root / "first", Tuning(trials=TRIALS, database=root / "database"), seen=seen)
    return Searched(model, root / "database", root / "first", built, seen)


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


def test_what_a_search_spent_is_not_spent_again(searched: Searched, tmp_path: Path) -> None:
    assert searched.built.note.startswith(f"tuned: {TRIALS} trials")
    assert searched.built.not_reproducible
    assert ("tune", TRIALS, TRIALS) in searched.seen
    assert list(searched.database.glob("*/ledger.json"))

    second = build(searched.model, tmp_path / "second", Tuning(trials=TRIALS, database=searched.database))

    assert second.note.startswith("tuned: 0 trials")
    runs = (searched.folder, tmp_path / "second")
    files = [{p.name: p.read_bytes() for p in (run / ARTEFACT).iterdir()} for run in runs]
    assert files[0] == files[1]  # one database, the same code


def test_a_tuned_library_computes_what_the_source_does(searched: Searched) -> None:
    image = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)

    tuned = TvmTarget().open(searched.folder / ARTEFACT / searched.built.entry, threads=1)

    expected = onnxruntime.InferenceSession(str(searched.model.path)).run(None, {"image": image})[0]
    np.testing.assert_allclose(tuned.infer({"image": image})["logits"], expected, atol=1e-4)


def test_another_machine_cannot_be_searched_for(searched: Searched, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot search for faster code for aarch64"):
        build(searched.model, tmp_path / "out", Tuning(trials=4), platform="aarch64")


def test_a_broken_database_is_named(searched: Searched, tmp_path: Path) -> None:
    database = shutil.copytree(searched.database, tmp_path / "database")
    (ledger,) = database.glob("*/ledger.json")
    ledger.write_text("{broken")

    with pytest.raises(InputError, match=r"tuning database .* cannot be read") as caught:
        build(searched.model, tmp_path / "out", Tuning(trials=TRIALS, database=database))

    assert "remove the folder" in caught.value.hint
