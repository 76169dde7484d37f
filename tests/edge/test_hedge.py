"""Hedging: the cloud is asked before the light answer is there, and everything is still counted once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from edge.hedge import Hedge
from edge.runtimes import Runtime, Worker
from isthmus.tensors import Array
from tests.edge import bundles, faulty_cloud
from tests.edge.serving import MODEL, Serving, computed_by, explanation, serving

EXPECTED: dict[str, Any] = {"parameters": {"isthmus.hedge": True}, "client_timeout": 10.0}


class Gated:
    """A real light model that answers when it is let."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.gate = threading.Event()

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert self.gate.wait(20)
        return self._runtime.infer(inputs)

    def close(self) -> None:
        self._runtime.close()


def gated(agent: Serving) -> threading.Event:
    """Put a gate before the agent's light model."""
    live = agent.models.find(MODEL)
    assert isinstance(live._worker, Worker)
    model = Gated(live._worker._runtime)
    agent.models._live[MODEL] = computed_by(live, Worker(model))
    return model.gate


async def arrived(agent: Serving, count: int = 1) -> None:
    async with asyncio.timeout(10):
        while len(agent.cloud.requests) < count:
            await asyncio.sleep(0.005)


def test_cloud_answers_while_the_light_model_still_computes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, hedge=Hedge()) as agent:
            gate = gated(agent)
            call = asyncio.ensure_future(agent.infer(bundles.HARD, **EXPECTED))
            await arrived(agent)
            gate.set()
            result = await call
            told = explanation(result)
            assert (told["isthmus.route"], told["isthmus.reason"]) == ("cloud", "uncertain")
            np.testing.assert_allclose(result.as_numpy("logits"), bundles.HARD + 100)
            counters = agent.uplink.counters
            assert (counters.attempts, counters.hedged, counters.successes, counters.cancelled) == (1, 1, 1, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("behaviour", [faulty_cloud.right, faulty_cloud.black_hole, faulty_cloud.garbage])
def test_confident_light_answer_calls_the_hedge_off(tmp_path: Path, behaviour: faulty_cloud.Behaviour) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, hedge=Hedge()) as agent:
            agent.cloud.behaviour = behaviour
            gate = gated(agent)
            call = asyncio.ensure_future(agent.infer(bundles.SURE, **EXPECTED))
            await arrived(agent)
            gate.set()
            assert explanation(await call)["isthmus.route"] == "edge"
            counters, counted = agent.uplink.counters, agent.models.counters[MODEL]
            while counters.cancelled == 0:
                await asyncio.sleep(0)
            assert (counters.attempts, counters.hedged, counters.cancelled) == (1, 1, 1)
            assert (counters.successes, counters.failures, counters.skipped) == (0, 0, 0)
            assert (counted.routes["edge"].answers, counted.errors) == (1, 0)
            assert agent.uplink.breaker.state == "closed"

    asyncio.run(scenario())


def test_hedge_that_fails_is_a_fallback_like_any_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, hedge=Hedge()) as agent:
            gate = gated(agent)
            agent.cloud.behaviour = faulty_cloud.refusing(grpc.StatusCode.INTERNAL)
            for place, reason in enumerate(("internal", "internal", "internal", "breaker-open")):
                gate.clear()
                call = asyncio.ensure_future(agent.infer(bundles.HARD, **EXPECTED))
                await arrived(agent, min(place + 1, 3))
                gate.set()
                told = explanation(await call)
                assert (told["isthmus.route"], told["isthmus.detail"]) == ("fallback", reason)
            counters = agent.uplink.counters
            assert (counters.attempts, counters.failures, counters.skipped, counters.hedged) == (3, 3, 1, 3)
            assert explanation(await agent.infer(bundles.SURE, **EXPECTED))["isthmus.route"] == "edge"
            assert counters.skipped == 1, "a hedge that was neither needed nor tried is nothing"

    asyncio.run(scenario())


def test_request_that_fails_takes_its_hedge_with_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, hedge=Hedge()) as agent:
            gate = gated(agent)
            agent.cloud.behaviour = faulty_cloud.black_hole
            call = asyncio.ensure_future(agent.infer(bundles.HARD, **EXPECTED))
            await arrived(agent)
            call.cancel()  # the caller goes away
            async with asyncio.timeout(10):
                while agent.uplink.counters.cancelled == 0:
                    await asyncio.sleep(0.005)
            gate.set()
            assert agent.uplink.counters.attempts == 1

    asyncio.run(scenario())


def test_without_the_setting_nothing_is_hedged_and_a_hint_must_be_a_bool(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            assert explanation(await agent.infer(bundles.SURE, **EXPECTED))["isthmus.route"] == "edge"
            assert (agent.cloud.requests, agent.uplink.counters.hedged) == ([], 0)
            with pytest.raises(InferenceServerException, match=r"isthmus\.hedge: expected a bool, got 'yes'"):
                await agent.infer(bundles.SURE, parameters={"isthmus.hedge": "yes"})

    asyncio.run(scenario())


def test_escalations_of_late_are_expected_to_go_on() -> None:
    hedge = Hedge(above=0.5)
    assert not hedge.expects("a", route=None, hint=None)
    for _ in range(14):
        hedge.note("a", escalates=True)
    assert hedge.expects("a", route=None, hint=None)
    assert not hedge.expects("b", route=None, hint=None), "each model has its own share"
    hedge.note("a", escalates=False)
    assert not hedge.expects("a", route=None, hint=None)


def test_what_the_caller_says_goes_first() -> None:
    hedge = Hedge(above=0.0)
    hedge.note("a", escalates=True)
    assert not hedge.expects("a", route=None, hint=False)
    assert not hedge.expects("a", route="edge", hint=True)
    assert hedge.expects("a", route="cloud", hint=None)
