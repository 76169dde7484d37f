from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.soak import PHASES, Sample, Soak


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
@pytest.mark.timeout(900)  # trains the model first where nobody has yet
def test_half_a_minute_under_load_loses_nothing(tmp_path: Path) -> None:
    assert soak.main(["--quick", "--json", str(tmp_path / "soak.json")]) == 0
    told = json.loads((tmp_path / "soak.json").read_text())
    dead = next(row for row in told["rows"] if row["phase"] == "cloud dead")
    assert (dead["cloud"], dead["errors"]) == (0, 0)
    assert dead["fallback"] > 0
    goals = {goal["goal"]: goal["holds"] for goal in told["goals"]}
    assert goals["errors"]
    assert goals["growth of file descriptors"]
    assert goals["answers that agent and clients count differently"]
