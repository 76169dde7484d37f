"""Quotas that several gateways share, counted in Redis. The only file of quotas that knows Redis.

One script run decides about a request: atomic, by Redis' own clock, in whole numbers that a double holds exactly. Keys
of one tenant lie in one slot of a Redis cluster. A bucket's key expires when it would be full again, so what is not
used takes no memory; a bucket that never refills has no expiry.

A running request is a member of a sorted set, whose score is when its lease ends. A gateway renews the leases that it
holds; those of a gateway that died end by themselves.

While Redis does not answer, requests are counted in this process instead: with n gateways up to n times as much is
admitted as was meant. The other choice, to refuse everything, would make Redis the weakest part of inference.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import structlog

from cloud.quota_store import Grant, MemoryQuotas, Refusal
from cloud.quotas import Kind, Rule
from isthmus.errors import ConfigError, MissingExtraError

LEASE_S: Final = 30.0
_RENEW_S: Final = 5.0
TIMEOUT_S: Final = 1.0  # of one answer; Redis needs a tenth of a millisecond
_AWAY_S: Final = 1.0  # how long Redis is left alone after it failed
_CONNECTIONS: Final = 8  # and so as many questions at a time; the others wait here, not in Redis
_LOCAL: Final = ("localhost", "127.0.0.1", "::1")

# ARGV: lease, end of its life in ms from now, microseconds now or "" (keys only expire by Redis' own clock), then for
# each key its kind and numbers.
_TAKE: Final = """
local now = tonumber(ARGV[3])
if not now then local t = redis.call('TIME'); now = t[1] * 1000000 + t[2] end
local place, index, wait = 4, 0, -2
local left = {}
local function refuse(at, us)
  if wait == -2 or (wait ~= -1 and (us == -1 or us > wait)) then index, wait = at, us end
end
for i, key in ipairs(KEYS) do
  if ARGV[place] == 'c' then
    redis.call('ZREMRANGEBYSCORE', key, '-inf', math.floor(now / 1000))
    if redis.call('ZCARD', key) >= tonumber(ARGV[place + 1]) then refuse(i, -1) end
    place = place + 2
  else
    local gain, capacity, cost = tonumber(ARGV[place + 1]), tonumber(ARGV[place + 2]), tonumber(ARGV[place + 3])
    place = place + 4
    local level, known = capacity, redis.call('HMGET', key, 'level', 'at')
    if known[1] then
      level = math.min(capacity, tonumber(known[1]) + math.max(now - tonumber(known[2]), 0) * gain)
    end
    if level < cost then
      refuse(i, (cost > capacity or gain == 0) and -1 or math.ceil((cost - level) / gain))
    end
    left[i] = {level - cost, gain, capacity}
  end
end
if index > 0 then return {index, wait} end
for i, key in ipairs(KEYS) do
  if left[i] then
    local level, gain, capacity = left[i][1], left[i][2], left[i][3]
    redis.call('HSET', key, 'level', string.format('%.0f', level), 'at', string.format('%.0f', now))
    if gain > 0 and ARGV[3] == '' then
      redis.call('PEXPIRE', key, string.format('%.0f', math.ceil((capacity - level) / gain / 1000) + 1))
    end
  else
    redis.call('ZADD', key, string.format('%.0f', math.floor(now / 1000) + ARGV[2]), ARGV[1])
    if redis.call('PTTL', key) < tonumber(ARGV[2]) then redis.call('PEXPIRE', key, ARGV[2]) end
  end
end
return {0, 0}
"""
# KEYS: sets of leases; ARGV: end of their lives in ms from now, then one lease for each key.
_RENEW: Final = """
local t = redis.call('TIME')
local till = string.format('%.0f', math.floor(t[1] * 1000 + t[2] / 1000) + ARGV[1])
for i, key in ipairs(KEYS) do
  redis.call('ZADD', key, till, ARGV[i + 1])
  if redis.call('PTTL', key) < tonumber(ARGV[1]) then redis.call('PEXPIRE', key, ARGV[1]) end
end
"""

log = structlog.get_logger(__name__)


def connect(address: str, *, ca: Path | None = None, plaintext: bool = False, timeout_s: float = TIMEOUT_S) -> Any:
    """Return a client of the Redis at `redis://`, `rediss://` (TLS 1.3) or `unix://`; it connects when it is used.

    Raises:
        ConfigError: The address is none, or the way there would be plain text over a network.
        MissingExtraError: Redis' client is not installed.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ConfigError(
            f"expected redis://, rediss:// or unix://, got an address of {parts.scheme[:20]!r}",
            hint="for example rediss://isthmus:PASSWORD@redis.example:6379/0",
        )
    if parts.scheme == "redis" and not plaintext and parts.hostname not in _LOCAL:
        raise ConfigError(
            f"the link to Redis at {parts.hostname} would be plain text over a network",
            hint="use rediss://, or set redis_plaintext where the network itself is private",
        )
    try:
        from redis import asyncio as redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ModuleNotFoundError as error:
        raise MissingExtraError("the client of Redis", "redis") from error
    secure: dict[str, Any] = {}
    if parts.scheme == "rediss":
        import ssl

        secure = {"ssl_min_version": ssl.TLSVersion.TLSv1_3} | ({"ssl_ca_certs": str(ca)} if ca else {})
    try:
        pool = redis.ConnectionPool.from_url(
            address, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0), **secure
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"not an address of Redis: {error}", hint="redis://HOST:PORT/0 or unix:///PATH") from error
    # No second try: whether the first one was counted cannot be told, and it would be counted twice.
    return redis.Redis.from_pool(pool)


class RedisQuotas:
    """Counts in Redis, and in this process while that does not answer.

    Args:
        client: From `connect`.
        clock: Microseconds, in place of Redis' own clock.
        seconds: Monotonic, for when Redis is tried again.
    """

    def __init__(
        self,
        client: Any,
        *,
        clock: Callable[[], int] | None = None,
        seconds: Callable[[], float] = time.monotonic,
        lease_s: float = LEASE_S,
    ) -> None:
        from redis.exceptions import RedisError

        self._client, self._clock, self._seconds = client, clock, seconds
        self._errors = (RedisError, OSError, TimeoutError)
        self._take: Any = client.register_script(_TAKE)
        self._renew: Any = client.register_script(_RENEW)
        self._lease_ms = round(lease_s * 1000)
        self._local = MemoryQuotas()
        self._held: dict[str, tuple[str, ...]] = {}  # keys of the leases of requests that run
        self._slots = asyncio.Semaphore(_CONNECTIONS)
        self._abandoned: set[asyncio.Task[None]] = set()
        self._away_until = 0.0
        self._nothing = Grant(self)
        self.failures = 0  # times that Redis did not answer
        self.local_requests = 0  # requests that were counted here because of that

    @property
    def remote(self) -> bool:
        """Redis is another program."""
        return True

    @property
    def up(self) -> bool:
        """Return whether Redis counts now."""
        return self._seconds() >= self._away_until

    async def take(self, rules: Sequence[Rule], size: int) -> Grant | Refusal:
        """Count one request of `size` bytes against all `rules`, or against none of them."""
        await self._slots.acquire()
        if not self.up:
            self._slots.release()
            return await self._take_here(rules, size)
        asking = asyncio.create_task(self._take_shared(rules, size), name="redis-quotas")
        asking.add_done_callback(lambda _: self._slots.release())
        try:
            return await asyncio.shield(asking)
        except self._errors as error:
            self._fail(error)
        except asyncio.CancelledError:  # whether Redis has counted it is known when its answer is here
            abandoned = asyncio.create_task(self._give_back(asking), name="redis-lease")
            self._abandoned.add(abandoned)
            abandoned.add_done_callback(self._abandoned.discard)
            raise
        return await self._take_here(rules, size)

    async def _take_here(self, rules: Sequence[Rule], size: int) -> Grant | Refusal:
        self.local_requests += 1
        return await self._local.take(rules, size)

    async def _give_back(self, asking: asyncio.Task[Grant | Refusal]) -> None:
        """Release what was taken for a caller that has gone away: its place is for others at once."""
        try:
            outcome = await asking
        except self._errors as error:
            self._fail(error)
        else:
            if isinstance(outcome, Grant):
                await self.release(outcome)

    async def _take_shared(self, rules: Sequence[Rule], size: int) -> Grant | Refusal:
        keys: list[str] = []
        numbers: list[int | str] = []
        parts: list[tuple[Rule, Kind]] = []
        held: tuple[str, ...] = ()
        for rule in rules:
            for part in rule.parts:
                keys.append(part.key)
                parts.append((rule, part.kind))
                if part.kind == "concurrency":
                    held += (part.key,)
                    numbers += ("c", part.most)
                else:
                    cost = part.cost if part.kind == "requests" else part.cost * size
                    numbers += ("b", part.gain, part.capacity, cost)
        lease = uuid.uuid4().hex if held else ""
        now = "" if self._clock is None else self._clock()
        index, wait_us = await self._take(keys=keys, args=[lease, self._lease_ms, now, *numbers])
        if index:
            rule, kind = parts[index - 1]
            return Refusal(rule, kind, None if wait_us < 0 else wait_us)
        if not held:
            return self._nothing
        self._held[lease] = held
        return Grant(self, lease, held)

    async def release(self, grant: Grant) -> None:
        """Note that the request has ended, before its caller hears of it: the next one may follow at once."""
        if self._held.pop(grant.lease, None) is None or not self.up:
            return
        try:
            async with self._slots, self._client.pipeline(transaction=False) as pipeline:
                for key in grant.keys:
                    pipeline.zrem(key, grant.lease)
                await pipeline.execute()
        except self._errors as error:  # the lease ends by itself
            self._fail(error)

    async def renew(self) -> None:
        """Prolong the leases of requests that still run, for ever."""
        while True:
            await asyncio.sleep(min(_RENEW_S, self._lease_ms / 4000))
            await self.renew_now()

    async def renew_now(self) -> None:
        """Prolong the leases of requests that still run."""
        held = [(key, lease) for lease, keys in self._held.items() for key in keys]
        for start in range(0, len(held), 500):
            some = held[start : start + 500]
            try:
                await self._renew(keys=[key for key, _ in some], args=[self._lease_ms, *(lease for _, lease in some)])
            except self._errors as error:
                self._fail(error)
                return

    async def close(self) -> None:
        """Close the connections, once what goes away is not counted any more."""
        await asyncio.gather(*self._abandoned, return_exceptions=True)
        with contextlib.suppress(*self._errors):
            await self._client.aclose()

    def _fail(self, error: BaseException) -> None:
        self.failures += 1
        if self.up:
            log.warning("Redis does not answer; quotas are counted in this process alone", error=type(error).__name__)
        self._away_until = self._seconds() + _AWAY_S
