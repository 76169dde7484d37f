"""The store from the event loop: a slow disk costs no deadline, and what comes together is written together."""

from __future__ import annotations

import asyncio
import threading

import pytest

from edge.deferred.deferral import FINAL, Deferral
from edge.deferred.store import Ending
from edge.deferred.wish import NotKept, Wish
from isthmus.oip import service_pb2
from tests.edge.deferred.simulated_disk import SimulatedDisk
from tests.edge.deferred.stores import QUEUE, Machine


class SlowDisk(SimulatedDisk):
    """Flushes no file until it is allowed to."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.syncs = 0

    def write(self, name: str, data: bytes) -> None:
        self.may_go_on.wait(timeout=20)
        super().write(name, data)

    def sync(self) -> None:
        self.syncs += 1
        super().sync()


async def keep(
    deferral: Deferral, request_id: str, *, remaining_s: float = 10.0, failure: str = "deadline"
) -> NotKept | None:
    return await deferral.keep(
        Wish(queue=QUEUE, id=request_id, priority=5, ttl_s=3600),
        request=b"request",
        template=service_pb2.ModelInferResponse(),
        answer_bytes=10,
        failure=failure,
        remaining_s=remaining_s,
    )


def test_slow_disk_costs_the_promise_and_not_the_deadline() -> None:
    disk = SlowDisk()

    async def scenario() -> None:
        deferral = Deferral(Machine(disk=disk).open(), longest_ttl_s=3600)
        disk.may_go_on.clear()
        started = asyncio.get_running_loop().time()
        assert await keep(deferral, "begun", remaining_s=0.05) == "disk-slow"
        assert await keep(deferral, "waiting", remaining_s=0.05) == "disk-slow"
        assert asyncio.get_running_loop().time() - started < 5
        disk.may_go_on.set()
        assert await keep(deferral, "next") is None
        # What was being written when its time ran out is there; what still waited was never begun.
        wishes = [Wish(queue=QUEUE, id=request_id, priority=5, ttl_s=1) for request_id in ("begun", "waiting", "next")]
        assert [deferral.knows(wish) for wish in wishes] == [True, False, True]
        assert (deferral.counters.stored, deferral.counters.not_stored) == (2, 2)
        deferral.close()

    asyncio.run(scenario())


def test_requests_that_come_together_share_a_flush() -> None:
    disk = SlowDisk()

    async def scenario() -> None:
        deferral = Deferral(Machine(disk=disk).open(), longest_ttl_s=3600)
        disk.may_go_on.clear()
        before = disk.syncs
        first = asyncio.create_task(keep(deferral, "first"))
        await asyncio.sleep(0)
        others = [asyncio.create_task(keep(deferral, f"r{number}")) for number in range(20)]
        await asyncio.sleep(0)
        disk.may_go_on.set()
        assert await asyncio.gather(first, *others) == [None] * 21
        assert disk.syncs - before <= 3
        deferral.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("failure", sorted(FINAL))
def test_what_the_cloud_would_refuse_again_is_not_kept(failure: str) -> None:
    async def scenario() -> None:
        deferral = Deferral(Machine().open(), longest_ttl_s=3600)
        assert await keep(deferral, "r", failure=failure) == "final"
        assert deferral.totals() == (0, 0, 0)
        deferral.close()

    asyncio.run(scenario())


def test_work_and_results_wake_those_who_wait() -> None:
    async def scenario() -> None:
        deferral = Deferral(Machine().open(), longest_ttl_s=3600)
        waiting = asyncio.create_task(deferral.wait_for_work())
        await keep(deferral, "r")
        async with asyncio.timeout(10):
            await waiting
            entry = deferral.take()
            assert entry is not None
            changed = deferral.changed
            assert await deferral.next_result(QUEUE, 0) is None
            await deferral.end(Ending(entry.number, answer=b"better"))
            await changed.wait()
            result = await deferral.next_result(QUEUE, 0)
        assert result is not None
        assert (result.id, result.answer) == ("r", b"better")
        deferral.close()

    asyncio.run(scenario())
