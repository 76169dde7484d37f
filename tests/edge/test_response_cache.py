"""A cached answer is the answer that the same request got before, and nothing else ever is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as sync_triton

from edge.metrics import AgentCollector, agent_registry
from edge.model import LiveModel
from edge.response_cache import ResponseCache, cache_key
from isthmus.oip import service_pb2
from isthmus.tensors import Array
from tests.edge import bundles, faulty_cloud
from tests.edge.serving import MODEL, explanation, open_variant, serving

LIMIT = 1 << 20


def test_same_bytes_get_the_same_answer_with_their_own_id(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, cache=ResponseCache(LIMIT)) as agent:
            for x, route, reason in ((bundles.SURE, "edge", "confident"), (bundles.HARD, "cloud", "uncertain")):
                first = await agent.infer(x, request_id="first")
                again = await agent.infer(x, request_id="again")
                assert again.get_response().id == "again"
                np.testing.assert_array_equal(again.as_numpy("logits"), first.as_numpy("logits"))
                told = explanation(again)
                assert told.pop("isthmus.cached") is True
                assert told == explanation(first)
                assert (told["isthmus.route"], told["isthmus.reason"]) == (route, reason)
            counters = agent.models.counters[MODEL]
            assert {route: (count.answers, count.cached) for route, count in counters.routes.items()} == {
                "edge": (2, 1),
                "cloud": (2, 1),
                "fallback": (0, 0),
            }
            assert counters.routes["cloud"].reasons == {"uncertain": 2}
            assert (counters.light_inferences, counters.cache_misses, len(agent.cloud.requests)) == (2, 2, 1)

    asyncio.run(scenario())


def test_what_differs_is_computed(tmp_path: Path) -> None:
    label = [sync_triton.InferRequestedOutput("label")]
    requests: list[tuple[Array, dict[str, Any]]] = [
        (bundles.SURE, {}),
        (bundles.SURE + np.float32(1e-6) * np.array([[0, 0, 1]], np.float32), {}),
        (np.concatenate([bundles.SURE, bundles.SURE]), {}),
        (bundles.SURE, {"outputs": label}),
        (bundles.SURE, {"parameters": {"isthmus.route": "edge"}}),
        (bundles.SURE, {"parameters": {"isthmus.route": "cloud"}}),
    ]

    async def scenario() -> None:
        async with serving(tmp_path, cache=ResponseCache(LIMIT)) as agent:
            for x, options in requests:
                assert "isthmus.cached" not in explanation(await agent.infer(x, **options))
            for x, options in requests:
                answer = await agent.infer(x, **options)
                assert explanation(answer)["isthmus.cached"] is True
                wanted = ["label"] if "outputs" in options else ["logits", "label"]
                assert [output.name for output in answer.get_response().outputs] == wanted

    asyncio.run(scenario())


def test_fallbacks_and_errors_are_not_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, cache=ResponseCache(LIMIT)) as agent:
            agent.cloud.behaviour = faulty_cloud.garbage
            assert explanation(await agent.infer(bundles.HARD))["isthmus.route"] == "fallback"
            agent.cloud.behaviour = faulty_cloud.right
            told = explanation(await agent.infer(bundles.HARD))
            assert (told["isthmus.route"], "isthmus.cached" in told) == ("cloud", False)

    asyncio.run(scenario())


def test_new_version_and_new_record_begin_with_nothing(tmp_path: Path) -> None:
    bundles.build_bundle(tmp_path / "2", 2)
    bundles.build_bundle(tmp_path / "1b", 1, record=bundles.calibration(1, threshold=0.7))

    async def scenario() -> None:
        async with serving(tmp_path, cache=ResponseCache(LIMIT)) as agent:
            for folder, version in (("bundle", 1), ("2", 2), ("1b", 1)):
                agent.models.swap(MODEL, open_variant(tmp_path / folder))
                for cached in (False, True):
                    told = explanation(await agent.infer(bundles.SURE))
                    assert ("isthmus.cached" in told, told["isthmus.edge_version"]) == (cached, version)

    asyncio.run(scenario())


def test_hits_and_misses_are_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        cache = ResponseCache(LIMIT)
        async with serving(tmp_path, cache=cache) as agent:
            for _ in range(3):
                await agent.infer(bundles.SURE)
            registry = agent_registry(AgentCollector("device-1", agent.models, agent.uplink, {}, cache))
            labels = {"model": MODEL, "route": "edge"}
            assert registry.get_sample_value("isthmus_cache_hits_total", labels) == 2
            assert registry.get_sample_value("isthmus_cache_misses_total", {"model": MODEL}) == 1
            assert registry.get_sample_value("isthmus_cache_bytes") == cache.bytes > 0

    asyncio.run(scenario())


def response(size: int) -> Any:
    return service_pb2.ModelInferResponse(raw_output_contents=[bytes(size)])


def test_least_recently_used_go_first() -> None:
    cache = ResponseCache(3 * 1600)
    for key in (b"a", b"b", b"c"):
        cache.offer(key, response(1000), "edge", "confident")
    assert cache.get(b"a") is not None
    cache.offer(b"d", response(1000), "edge", "confident")
    assert [cache.get(key) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert len(cache) == 3
    assert cache.bytes <= 3 * 1600


def test_size_is_kept_right() -> None:
    cache = ResponseCache(10_000)
    for i in range(200):
        cache.offer(str(i % 7).encode(), response(100 * (i % 40)), "cloud", "uncertain")
        assert cache.bytes == sum(len(answer.response) + 512 for answer in cache._answers.values()) <= 10_000
    before = cache.bytes
    cache.offer(b"large", response(10_000), "cloud", "uncertain")
    assert cache.get(b"large") is None
    assert cache.bytes == before


@pytest.mark.parametrize(
    ("route", "reason", "kept"),
    [
        ("edge", "confident", True),
        ("edge", "requested", True),
        ("edge", "budget-spent", False),  # true of that moment only
        ("cloud", "uncertain", True),
        ("fallback", "breaker-open", False),
    ],
)
def test_only_what_will_do_again_is_kept(route: Any, reason: str, kept: bool) -> None:
    cache = ResponseCache(LIMIT)
    cache.offer(b"key", response(10), route, reason)
    assert (cache.get(b"key") is not None) is kept


def test_keys_tell_tensors_apart(tmp_path: Path) -> None:
    bundles.build_bundle(tmp_path)
    live: LiveModel = open_variant(tmp_path)
    a, b = np.arange(4, dtype=np.float32).reshape(2, 2), np.arange(4, 8, dtype=np.float32).reshape(2, 2)
    inputs: list[dict[str, Array]] = [
        {"x": a},
        {"x": b},
        {"y": a},
        {"x": a.reshape(4, 1)},
        {"x": a.view(np.int32)},
        {"x": a, "y": b},
        {"x": b, "y": a},
        {"x": np.concatenate([a, b])},
        {"x": a.T},
    ]
    keys = {cache_key(live, ["logits"], None, given) for given in inputs}
    assert len(keys) == len(inputs)
    assert cache_key(live, ["a", "b"], None, {"x": a, "y": b}) == cache_key(live, ["b", "a"], None, {"y": b, "x": a})
    live.retire()
