"""Kept answers: whose, for how long, and in how much memory."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np

from cloud.heavy import HeavyId
from cloud.redis_cache import RedisCache
from cloud.redis_quotas import connect
from cloud.response_cache import MemoryCache, cache_key
from isthmus.oip import set_parameter
from isthmus.oip_head import RequestHead, read_head
from isthmus.tensors import encode_request
from tests.cloud.conftest import eventually
from tests.cloud.redis_server import redis_process

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


def test_clouds_share_what_redis_keeps_for_as_long_as_it_may_be(redis_address: str) -> None:
    async def story() -> None:
        client = connect(redis_address, timeout_s=60)
        await client.flushall()
        first, second = RedisCache(client), RedisCache(connect(redis_address, timeout_s=60))
        assert await first.get("a", b"k") is None
        await first.put("a", b"k", b"answer", 600)
        await first.put("a", b"huge", b"x" * (5 << 20), 600)

        async def shared() -> bool:
            return await second.get("a", b"k") == b"answer"

        await eventually(shared, "the other cloud has it")
        assert await second.get("a", b"huge") is None
        another = RedisCache(connect(redis_address, timeout_s=60), of=b"another cloud, whose a@1 is another model")
        assert await another.get("a", b"k") is None
        await another.close()
        (name,) = await client.keys("*")
        assert b"answer" not in name.removeprefix(b"isthmus:answer:")
        assert 0 < await client.ttl(name) <= 600
        await first.close()
        await second.close()

    asyncio.run(story())


def test_a_redis_that_is_not_there_costs_nothing_and_is_asked_again(tmp_path: Path) -> None:
    now = 100.0

    async def story() -> None:
        nonlocal now
        address = f"unix://{tmp_path / 'redis.sock'}"
        cache = RedisCache(connect(address, timeout_s=60), clock=lambda: now)
        began = time.monotonic()
        for number in range(200):
            assert await cache.get("a", b"%d" % number) is None
            await cache.put("a", b"%d" % number, b"answer", 60)
        assert time.monotonic() - began < 20
        now += 10
        with redis_process(tmp_path):
            await cache.put("a", b"k", b"answer", 60)

            async def kept() -> bool:
                return await cache.get("a", b"k") == b"answer"

            await eventually(kept, "Redis is asked again")
            await cache.close()

    asyncio.run(story())
