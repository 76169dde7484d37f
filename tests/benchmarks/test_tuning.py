from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tuning


def test_what_was_built_before_is_not_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs: list[float] = []

    def run(name: str, minutes: float, core: int) -> None:
        del name, core
        runs.append(minutes)
        (tmp_path / f"artefact-{minutes:g}.json").write_text(json.dumps({"entry": f"e{minutes}", "note": "tuned"}))

    monkeypatch.setattr(tuning, "_folder", lambda name: tmp_path)
    monkeypatch.setattr(tuning, "_run", run)

    first, again, other = (tuning.build("model", minutes, 0)[0] for minutes in (0.5, 0.5, 5.0))

    assert runs == [0.5, 5.0]
    assert first == again
    assert (first.name, first.entry, other.name) == ("tvm-0.5", "e0.5", "tvm-5")
    with pytest.raises(SystemExit, match="a longer search was done before"):
        tuning.build("model", 2.5, 0)
