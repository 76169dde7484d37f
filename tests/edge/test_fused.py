"""Fused answers: what both models say together, where the calibration record says that this is better."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from isthmus.fusion import fuse
from tests.edge import bundles, faulty_cloud
from tests.edge.serving import FUSION_WEIGHT, explanation, fuse_answers, serving

HEAVY = np.array([[0.0, 0.1, 3.0]], np.float32)


def test_an_escalated_request_is_answered_by_both(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            fuse_answers(agent.models)
            agent.cloud.behaviour = faulty_cloud.answering_logits(HEAVY)
            result = await agent.infer(bundles.HARD)
            told = explanation(result)
            assert (told["isthmus.route"], told["isthmus.fused"]) == ("cloud", True)
            light = bundles.HARD @ bundles.weights(1)
            both = fuse(light, HEAVY, temperature=1.0, light_weight=FUSION_WEIGHT)
            np.testing.assert_allclose(result.as_numpy("logits"), both, rtol=1e-5)

    asyncio.run(scenario())


def test_who_asks_for_the_cloud_gets_the_clouds_own_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            fuse_answers(agent.models)
            agent.cloud.behaviour = faulty_cloud.answering_logits(HEAVY)
            result = await agent.infer(bundles.HARD, parameters={"isthmus.route": "cloud"})
            assert "isthmus.fused" not in explanation(result)
            np.testing.assert_array_equal(result.as_numpy("logits"), HEAVY)

    asyncio.run(scenario())


def test_a_model_with_further_outputs_is_not_fused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            fuse_answers(agent.models, outputs=2)
            result = await agent.infer(bundles.HARD)
            assert "isthmus.fused" not in explanation(result)

    asyncio.run(scenario())
