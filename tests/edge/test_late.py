"""Cloud answers that come too late for their callers: learnt from where that is free, never given, never asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.breaker import Breaker
from edge.hedge import Hedge
from edge.stragglers import Stragglers
from isthmus.tensors import Array
from tests.edge import bundles, faulty_cloud
from tests.edge.serving import MODEL, Serving, explanation, serving

BRIEF: dict[str, Any] = {"timeout": 500_000}  # microseconds that the agent has; the client waits for longer
PATIENCE_S = 30


@dataclass
class SlowCloud:
    """Answers right, or as it is told, when it is let; knows which calls were cancelled."""

    behaviour: faulty_cloud.Behaviour = faulty_cloud.right
    let: asyncio.Event = field(default_factory=asyncio.Event)
    begun: int = 0
    cancelled: int = 0

    async def __call__(self, raw: bytes, context: Any) -> bytes:
        self.begun += 1
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await self.behaviour(raw, context)


@dataclass
class Late:
    agent: Serving
    cloud: SlowCloud
    captured: list[tuple[Mapping[str, Array], Mapping[str, Array]]]
    stragglers: Stragglers

    async def until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not reached():
                await asyncio.sleep(0.005)

    async def fall_back(self, parameters: dict[str, Any] | None = None) -> None:
        told = explanation(await self.agent.infer(bundles.HARD, parameters=parameters, **BRIEF))
        assert (told["isthmus.route"], told["isthmus.reason"]) == ("fallback", "deadline")


@asynccontextmanager
async def slow_cloud(folder: Path, stragglers: Stragglers, *, hedge: Hedge | None = None) -> AsyncIterator[Late]:
    captured: list[tuple[Mapping[str, Array], Mapping[str, Array]]] = []
    async with serving(
        folder,
        breaker=Breaker(failures=1000),
        hedge=hedge,
        stragglers=stragglers,
        capture=lambda _, inputs, outputs: captured.append((inputs, outputs)),
    ) as agent:
        cloud = SlowCloud()
        agent.cloud.behaviour = cloud
        try:
            yield Late(agent, cloud, captured, stragglers)
        finally:
            await stragglers.stop()


@pytest.mark.parametrize("hedged", [False, True])
def test_late_answer_is_learnt_from_and_given_to_nobody(tmp_path: Path, hedged: bool) -> None:
    async def scenario() -> None:
        async with slow_cloud(tmp_path, Stragglers(PATIENCE_S), hedge=Hedge() if hedged else None) as late:
            await late.fall_back({"isthmus.hedge": hedged})
            assert late.captured == []
            late.cloud.let.set()
            await late.until(lambda: bool(late.captured))
            ((inputs, outputs),) = late.captured
            np.testing.assert_array_equal(inputs["x"], bundles.HARD)
            np.testing.assert_array_equal(outputs["logits"], bundles.HARD + np.float32(100))
            uplink, model = late.agent.uplink.counters, late.agent.models.counters[MODEL]
            assert (uplink.attempts, uplink.failures, uplink.late, uplink.successes, uplink.hedged) == (
                1,
                1,
                1,
                0,
                hedged,
            )
            assert (model.compared_rows, model.agreed_rows) == (1, 1)
            assert (model.routes["fallback"].answers, model.routes["cloud"].answers) == (1, 0)
            assert uplink.bytes_up == len(late.agent.cloud.requests[0]), "nothing is sent for it"

    asyncio.run(scenario())


def test_without_a_grace_the_cloud_stops_with_the_callers_deadline(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with slow_cloud(tmp_path, Stragglers()) as late:
            await late.fall_back()
            await late.until(lambda: late.cloud.cancelled == 1)
            assert (late.captured, late.agent.uplink.counters.late) == ([], 0)

    asyncio.run(scenario())


def test_caller_who_goes_away_takes_the_call_to_the_cloud_along(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with slow_cloud(tmp_path, Stragglers(PATIENCE_S)) as late:
            call = asyncio.ensure_future(late.agent.infer(bundles.HARD, client_timeout=PATIENCE_S))
            await late.until(lambda: late.cloud.begun == 1)
            call.cancel()
            await late.until(lambda: late.cloud.cancelled == 1)
            await late.until(lambda: late.agent.uplink.counters.cancelled == 1)
            assert late.captured == []

    asyncio.run(scenario())


def test_few_calls_are_followed_and_the_others_are_cancelled(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with slow_cloud(tmp_path, Stragglers(PATIENCE_S, at_most=2)) as late:
            await asyncio.gather(*(late.fall_back() for _ in range(5)))
            await late.until(lambda: late.cloud.cancelled == 3)
            late.cloud.let.set()
            await late.until(lambda: len(late.captured) == 2)
            late.cloud.let.clear()
            await late.fall_back()
            assert late.stragglers.grace_s(1) == PATIENCE_S, "one of two places is taken"
            late.cloud.let.set()
            await late.until(lambda: len(late.captured) == 3)
            assert late.agent.uplink.counters.late == 3

    asyncio.run(scenario())


def test_what_is_followed_is_bounded_by_bytes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with slow_cloud(tmp_path, Stragglers(PATIENCE_S, limit_bytes=20)) as late:
            await late.fall_back()  # of more bytes than that
            await late.until(lambda: late.cloud.cancelled == 1)
            assert late.captured == []

    asyncio.run(scenario())


@pytest.mark.parametrize("behaviour", ["garbage", "wrong_shape", "not_finite"])
def test_late_answer_is_checked_as_any_other(tmp_path: Path, behaviour: str) -> None:
    async def scenario() -> None:
        async with slow_cloud(tmp_path, Stragglers(PATIENCE_S)) as late:
            late.cloud.behaviour = getattr(faulty_cloud, behaviour)
            await late.fall_back()
            late.cloud.let.set()
            await late.until(lambda: not late.stragglers._running)
            assert (late.captured, late.agent.uplink.counters.late) == ([], 0)

    asyncio.run(scenario())


def test_an_agent_that_stops_waits_for_no_straggler(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with slow_cloud(tmp_path, Stragglers(PATIENCE_S)) as late:
            await late.fall_back()
            await late.stragglers.stop()
            await late.until(lambda: late.cloud.cancelled == 1)
            assert (late.captured, late.stragglers.grace_s(1)) == ([], PATIENCE_S)

    asyncio.run(scenario())


def test_the_grace_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with slow_cloud(tmp_path, Stragglers(0.2)) as late:
            await late.fall_back()
            await late.until(lambda: late.cloud.cancelled == 1)
            await late.until(lambda: not late.stragglers._running)
            assert late.captured == []

    asyncio.run(scenario())
