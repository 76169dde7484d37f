"""Kept answers: whose, for how long, and in how much memory."""

from __future__ import annotations

import asyncio

import numpy as np

from cloud.heavy import HeavyId
from cloud.response_cache import MemoryCache, cache_key
from isthmus.oip import set_parameter
from isthmus.oip_head import RequestHead, read_head
from isthmus.tensors import encode_request

ONE, TWO = HeavyId("triage", 1), HeavyId("triage", 2)


def head(value: float = 1.0, request_id: str = "r", **parameters: str | int) -> RequestHead:
    request = encode_request("triage", {"x": np.full((1, 4), value, np.float32)}, request_id=request_id)
    for name, given in parameters.items():
        set_parameter(request, name.replace("__", "."), given)
    return read_head(request.SerializeToString())


def test_equal_requests_of_a_tenant_to_a_version_have_one_key() -> None:
    key = cache_key("a", ONE, head())
    assert key == cache_key("a", ONE, head(request_id="other"))
    assert key == cache_key("a", ONE, head(request_id=""))
    assert key == cache_key("a", ONE, head(timeout=5, priority=1, isthmus__key="k"))
    others = [
        cache_key("b", ONE, head()), cache_key("a", TWO, head()), cache_key("a", ONE, head(2.0)),
        cache_key("a", ONE, head(mode="fast")), cache_key("a", HeavyId("triag", 1), head()),
        cache_key("atriage", HeavyId("", 1), head()),
    ]  # fmt: skip
    assert len({key, *others}) == len(others) + 1


def test_answers_age_and_are_their_tenants_own() -> None:
    now = 100.0
    cache = MemoryCache(10_000, clock=lambda: now)

    async def story() -> None:
        nonlocal now
        await cache.put("a", b"k", b"answer", 10)
        assert await cache.get("a", b"k") == b"answer"
        assert await cache.get("b", b"k") is None
        now += 10
        assert await cache.get("a", b"k") is None
        assert cache.bytes == 0

    asyncio.run(story())


def test_memory_is_bounded_and_the_tenant_that_holds_most_gives_way() -> None:
    cache = MemoryCache(10_000)

    async def story() -> None:
        await cache.put("small", b"k", b"x" * 500, 60)
        for number in range(50):
            await cache.put("large", b"%d" % number, b"x" * 700, 60)
            assert cache.bytes <= 10_000
            await cache.get("large", b"0") if number < 5 else None
        assert await cache.get("small", b"k") is not None
        assert await cache.get("large", b"49") is not None
        assert await cache.get("large", b"10") is None
        await cache.put("large", b"huge", b"x" * 5000, 60)
        assert await cache.get("large", b"huge") is None  # it would drive out everything else
        for number in range(50):
            await cache.put("large", b"same", b"x" * number, 60)
        assert await cache.get("large", b"same") == b"x" * 49

    asyncio.run(story())
