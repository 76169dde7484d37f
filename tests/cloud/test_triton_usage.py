"""Compute time from sums that Tritons tell: looked at by several clouds, begun anew, looked at too late."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from cloud import database as db
from cloud.triton_usage import Sums, TritonUsage
from isthmus.oip import service_pb2

HOUR = 1_800_000_000


class Triton:
    """What a Triton tells of the model `triage@2`."""

    def __init__(self, *names: str) -> None:
        self.names = names or ("triage@2",)
        self.done, self.last_ms = 0, 0

    def infer(self, times: int) -> None:
        self.done += times
        self.last_ms += 1

    def restart(self) -> None:
        self.done = 0

    def told(self) -> list[Any]:
        found = []
        for name in self.names:
            model = service_pb2.ModelStatistics(
                name=name, inference_count=3 * self.done, execution_count=self.done,
                last_inference=self.last_ms if self.done else 0,
            )  # fmt: skip
            model.inference_stats.success.count = self.done
            model.inference_stats.compute_infer.ns = 1000 * self.done
            found.append(model)
        return found


def follower(database: db.Database, tritons: Mapping[str, Triton], clock: Any = lambda: float(HOUR)) -> TritonUsage:
    async def ask() -> dict[str, list[Any]]:
        return {name: triton.told() for name, triton in tritons.items()}

    return TritonUsage(database, ask, clock=clock)


def answered(usage: TritonUsage, since: int | None = None, until: int | None = None) -> dict[tuple[str, int], int]:
    return {(model, version): sums.answered for model, version, sums in usage.read(since, until)}


def test_adds_what_was_done_since_the_last_look(database: db.Database) -> None:
    triton, now = Triton(), [float(HOUR)]
    usage = follower(database, {"t": triton}, lambda: now[0])
    for times in (5, 0, 7):
        triton.infer(times)
        asyncio.run(usage.look())
    now[0] += 3600
    triton.infer(4)
    asyncio.run(usage.look())
    assert usage.read(None, None) == [("triage", 2, Sums(16, 0, 48, 16, 0, 16_000))]
    assert answered(usage, until=HOUR + 1) == {("triage", 2): 12}
    assert answered(usage, since=HOUR + 3600) == {("triage", 2): 4}


def test_a_triton_that_two_clouds_share_is_counted_once(database: db.Database) -> None:
    triton = Triton()
    one, other = (follower(database, {"shared": triton}) for _ in range(2))
    for _ in range(4):
        for usage in (one, other):
            triton.infer(3)
            asyncio.run(usage.look())
    asyncio.run(follower(database, {"shared": triton}).look())  # a cloud that starts again
    assert answered(one) == {("triage", 2): 24}


def test_a_look_that_is_written_late_counts_nothing_twice(database: db.Database) -> None:
    triton = Triton()
    usage = follower(database, {"t": triton})
    triton.infer(3)
    old = {("t", "triage@2"): Sums.of(triton.told()[0])}
    triton.infer(4)
    asyncio.run(usage.look())
    usage._add(old)
    triton.infer(1)
    asyncio.run(usage.look())
    assert answered(usage) == {("triage", 2): 8}


def test_a_triton_that_begins_anew_goes_on_adding_up(database: db.Database) -> None:
    triton = Triton()
    usage = follower(database, {"t": triton})
    triton.infer(10)
    asyncio.run(usage.look())
    triton.restart()
    asyncio.run(usage.look())
    triton.infer(4)
    asyncio.run(usage.look())
    assert answered(usage) == {("triage", 2): 14}


def test_replicas_add_up_and_what_is_not_a_heavy_model_does_not_count(database: db.Database) -> None:
    one, other = Triton("triage@2", "isthmus-check"), Triton("triage@2", "other@1")
    usage = follower(database, {"one": one, "other": other})
    one.infer(2)
    other.infer(5)
    asyncio.run(usage.look())
    assert answered(usage) == {("other", 1): 5, ("triage", 2): 7}
