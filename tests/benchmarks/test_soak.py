from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import soak
from benchmarks.servers import ServedModel
from benchmarks.soak import PHASES, QUICK, Sample, Soak
from tests.compiler.models import write_cnn


def _sample(phase: str, rss_kib: int, descriptors: int, *, failures: int = 0) -> Sample:
    return Sample(phase, [1.0, 2.0], Counter(edge=2), ["no answer"] * failures, rss_kib, descriptors)


def _goals(samples: list[Sample], counted: int) -> dict[str, bool]:
    return {goal.goal: goal.holds for goal in Soak(warm=5, samples=samples).goals(counted=counted)}


def test_a_steady_agent_reaches_all_goals() -> None:
    samples = [_sample(phase, 1000, 20) for phase in PHASES for _ in range(10)]
    assert all(_goals(samples, counted=65).values())


def test_growth_errors_and_miscounts_are_seen() -> None:
    samples = [_sample(PHASES[0], 1000 + 10 * index, 20 + index, failures=index % 2) for index in range(30)]
    assert _goals(samples, counted=64) == {
        "errors": False,
        "growth of resident memory": False,
        "growth of file descriptors": False,
        "answers that agent and clients count differently": False,
    }


@pytest.mark.slow
def test_half_a_minute_under_load_loses_nothing(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs.safetensors"
    save_file({"image": np.random.default_rng(0).normal(size=(64, 1, 8, 8)).astype(np.float32)}, inputs)
    model = ServedModel("tiny", write_cnn(tmp_path / "tiny.onnx"), inputs)

    rows, told = soak.run(tmp_path, model, QUICK)

    assert [row["phase"] for row in rows] == list(PHASES)
    dead = next(row for row in rows if row["phase"] == "cloud dead")
    assert (dead["cloud"], dead["errors"]) == (0, 0)
    assert dead["fallback"] > 0
    goals = {goal.goal: goal.holds for goal in told}
    assert goals["errors"]
    assert goals["growth of file descriptors"]
    assert goals["answers that agent and clients count differently"]
