"""Versions side by side: the slower one is found, a good one is spared, whatever else the machine does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from edge.model import open_model
from edge.runtimes import Worker
from edge.side_by_side import PAIRS, Side, is_slower
from isthmus.errors import InputError
from isthmus.tensors import Array
from tests.edge import bundles
from tests.edge.serving import computed_by


class Takes:
    """Takes so many turns of the processor's counter; every `spare`th call takes none."""

    def __init__(self, turns: int, spare: int = 0) -> None:
        self.turns, self.spare, self.calls = turns, spare, 0

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.calls += 1
        turns = 0 if self.spare and self.calls % self.spare == 0 else self.turns
        sum(range(turns))
        return {"logits": inputs["x"]}

    def close(self) -> None:
        pass


class Refuses(Takes):
    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        raise InputError("cannot")


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    bundles.build_bundle(tmp_path / "slot", 1)
    return tmp_path / "slot"


def compare(slot: Path, now: Takes, before: Takes, most: float = 3.0) -> bool:
    live = open_model(slot, "onnxruntime-fp32")

    async def run() -> bool:
        workers = Worker(now), Worker(before)
        sides = [Side(computed_by(live, worker), slot) for worker in workers]
        try:
            return await is_slower(sides[0], sides[1], most)
        finally:
            for worker in workers:
                worker.close()
            live.retire()

    return asyncio.run(run())


def test_a_version_far_above_the_limit_is_slower(slot: Path) -> None:
    now, before = Takes(1_000_000), Takes(1_000)
    assert compare(slot, now, before)
    assert (now.calls, before.calls) == (PAIRS, PAIRS)


def test_one_pair_within_the_limit_changes_nothing(slot: Path) -> None:
    assert compare(slot, Takes(1_000_000, spare=PAIRS), Takes(1_000))


def test_an_equal_version_is_spared_after_a_few_pairs(slot: Path) -> None:
    now = Takes(200_000)
    assert not compare(slot, now, Takes(200_000))
    assert now.calls < PAIRS


def test_a_version_that_is_slow_now_and_then_only_is_spared(slot: Path) -> None:
    assert not compare(slot, Takes(1_000_000, spare=2), Takes(1_000))


def test_what_cannot_be_computed_is_said(slot: Path) -> None:
    with pytest.raises(InputError):
        compare(slot, Takes(1), Refuses(1))
