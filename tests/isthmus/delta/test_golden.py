"""Deltas of every format that was ever made decode for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.delta import Method, apply_delta, read_header
from isthmus.digests import sha256_file

GOLDEN = Path(__file__).parent / "golden"
DELTAS = sorted(GOLDEN.glob("*.delta"))


@pytest.mark.parametrize("delta", DELTAS, ids=lambda path: path.name)
def test_a_golden_delta_decodes(tmp_path: Path, delta: Path) -> None:
    name = delta.name.split(".")[0]
    old, new = GOLDEN / f"{name}.old", GOLDEN / f"{name}.new"
    apply_delta(old, delta, tmp_path / "out", sha256=sha256_file(new), length=new.stat().st_size)
    assert (tmp_path / "out").read_bytes() == new.read_bytes()


def test_there_is_a_golden_delta_of_every_method() -> None:
    found = set()
    for delta in DELTAS:
        with delta.open("rb") as file:
            found.add(read_header(file).method)
    assert found == set(Method)
