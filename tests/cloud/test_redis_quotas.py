"""Redis as the counter of several gateways: what it keeps and for how long, and what happens without it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cloud.quota_store import Grant, Refusal
from cloud.quotas import Limits, Rule, Scope, parse_rate
from cloud.redis_quotas import RedisQuotas, connect
from tests.cloud.conftest import eventually
from tests.cloud.redis_server import redis_process


def rule(device: str = "", **limits: Any) -> Rule:
    if "rate" in limits:
        limits["rate"] = parse_rate(limits["rate"])
    return Rule(Scope("acme", device), Limits(**limits))


@asynccontextmanager
async def gateway(address: str, **settings: Any) -> AsyncIterator[tuple[RedisQuotas, Any]]:
    client = connect(address, timeout_s=60)
    await client.flushall()
    store = RedisQuotas(client, **settings)
    try:
        yield store, client
    finally:
        await store.close()


async def take(store: RedisQuotas, *rules: Rule) -> bool:
    return isinstance(await store.take(rules, 10), Grant)


def test_redis_own_clock_counts(redis_address: str) -> None:
    async def story() -> None:
        async with gateway(redis_address) as (store, client):
            quota = rule(rate="20/s", burst=5)
            began = await client.time()
            admitted = 0
            while admitted < 25:
                admitted += await take(store, quota)
            ended = await client.time()
            elapsed = (ended[0] - began[0]) + (ended[1] - began[1]) / 1e6
            assert elapsed >= 1.0  # twenty beyond the burst take a second at least
            assert admitted <= 5 + 20 * elapsed

    asyncio.run(story())


def test_keys_live_as_long_as_they_are_needed(redis_address: str) -> None:
    async def story() -> None:
        async with gateway(redis_address) as (store, client):
            await store.take((rule(rate="10/s", burst=100),), 0)
            await store.take((rule("b", rate="1/min", burst=10),), 0)
            await store.take((rule("c", rate="0/s", burst=10),), 0)
            await store.take((rule("d", concurrency=3),), 0)
            lives = {key.decode(): await client.pttl(key) for key in await client.keys()}
            by_device = {name.split(":")[3]: life for name, life in lives.items()}
            assert set(by_device) == {"", "b", "c", "d"}
            assert 0 < by_device[""] <= 102  # a tenth of a second until it is full again
            assert 0 < by_device["b"] <= 60_001
            assert by_device["c"] == -1  # it never is
            assert 0 < by_device["d"] <= 30_000
            assert all("{acme}" in name for name in lives)

    asyncio.run(story())


def test_leases_of_a_gateway_that_died_end_by_themselves(redis_address: str) -> None:
    async def story() -> None:
        quota = rule(concurrency=2)
        async with gateway(redis_address, lease_s=0.3) as (dead, _):
            assert await take(dead, quota)
            assert await take(dead, quota)
            living = RedisQuotas(connect(redis_address, timeout_s=60))
            assert isinstance(await living.take((quota,), 0), Refusal)

            async def has_room() -> bool:
                return await take(living, quota)

            await eventually(has_room, "the leases have ended")
            await living.close()

    asyncio.run(story())


def test_leases_of_a_gateway_that_died_end_beside_those_of_one_that_lives(redis_address: str) -> None:
    async def story() -> None:
        quota = rule(concurrency=2)
        async with gateway(redis_address, lease_s=0.3) as (dead, _):
            living = RedisQuotas(connect(redis_address, timeout_s=60))
            assert await take(living, quota)
            assert await take(dead, quota)

            async def has_room() -> bool:
                return await take(living, quota)

            await eventually(has_room, "the lease of the dead one has ended")
            assert not await take(living, quota)  # and its own have not
            await living.close()

    asyncio.run(story())


def test_leases_of_requests_that_run_are_renewed(redis_address: str) -> None:
    async def story() -> None:
        quota = rule(concurrency=1)
        async with gateway(redis_address, lease_s=0.4) as (store, client):
            renewing = asyncio.create_task(store.renew())
            grant = await store.take((quota,), 0)
            assert isinstance(grant, Grant)
            began = (await client.time())[0]
            while (await client.time())[0] < began + 2:  # several lives of a lease
                assert not await take(store, quota)
            await store.release(grant)
            assert await take(store, quota)
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)

    asyncio.run(story())


def test_without_redis_requests_are_counted_here_and_then_there_again(tmp_path: Path) -> None:
    seconds = [100.0]

    async def story() -> None:
        quota = rule(rate="0/s", burst=3, concurrency=10)
        with redis_process(tmp_path) as (address, process):
            store = RedisQuotas(connect(address, timeout_s=60), seconds=lambda: seconds[0])
            held = await store.take((quota,), 0)
            assert isinstance(held, Grant)
            process.kill()
            process.wait(30)
            assert [await take(store, quota) for _ in range(5)] == [True, True, True, False, False]
            assert (store.up, store.failures, store.local_requests) == (False, 1, 5)
            await held.store.release(held)  # its lease went with Redis
            seconds[0] += 2
            assert not await take(store, quota)
            assert (store.failures, store.local_requests) == (2, 6)
        with redis_process(tmp_path) as (again, _):
            assert again == address
            seconds[0] += 2
            assert [await take(store, quota) for _ in range(5)] == [True, True, True, False, False]
            assert (store.up, store.failures, store.local_requests) == (True, 2, 6)
            await store.close()

    asyncio.run(story())


def test_a_caller_that_goes_away_while_redis_is_asked_leaves_no_place_taken(redis_address: str) -> None:
    async def story() -> None:
        quota = rule(concurrency=3)
        async with gateway(redis_address) as (store, client):
            for _ in range(20):  # cancelled at whatever point it has come to
                taking = [asyncio.create_task(store.take((quota,), 0)) for _ in range(5)]
                await asyncio.sleep(0)
                await asyncio.sleep(0.001)
                for task in taking:
                    task.cancel()
                for outcome in await asyncio.gather(*taking, return_exceptions=True):
                    if isinstance(outcome, Grant):
                        await store.release(outcome)

            async def free() -> bool:
                return not await client.keys()  # a set without members is gone

            await eventually(free, "no request is counted as running")
            assert [await take(store, quota) for _ in range(4)] == [True, True, True, False]

    asyncio.run(story())


def test_a_redis_that_hangs_is_left_alone(tmp_path: Path) -> None:
    async def story() -> None:
        writers: list[asyncio.StreamWriter] = []

        async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)

        server = await asyncio.start_unix_server(silent, tmp_path / "silent.sock")
        store = RedisQuotas(connect(f"unix://{tmp_path / 'silent.sock'}"), seconds=lambda: 5.0)
        began = asyncio.get_running_loop().time()
        assert [await take(store, rule(rate="0/s", burst=2)) for _ in range(100)].count(True) == 2
        assert asyncio.get_running_loop().time() - began < 20  # one wait, not a hundred
        assert store.failures == 1
        await store.close()
        server.close()
        for writer in writers:
            writer.close()
            await writer.wait_closed()

    asyncio.run(story())


@pytest.mark.parametrize("tries", [200])
def test_two_gateways_admit_no_more_than_one(redis_address: str, tries: int) -> None:
    async def story() -> None:
        quotas = (rule(rate="0/s", burst=77), rule("camera", rate="0/s", burst=60))
        async with gateway(redis_address) as (one, _):
            other = RedisQuotas(connect(redis_address, timeout_s=60))
            admitted = await asyncio.gather(*(take(store, *quotas) for store in (one, other) for _ in range(tries)))
            assert sum(admitted) == 60
            assert (
                sum(await asyncio.gather(*(take(store, quotas[0]) for store in (one, other) for _ in range(50)))) == 17
            )
            await other.close()

    asyncio.run(story())
