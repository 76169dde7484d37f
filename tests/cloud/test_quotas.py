"""Quotas: what is counted, by both stores and against an oracle that computes with fractions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud.quota_store import Grant, MemoryQuotas, QuotaStore, Refusal
from cloud.quotas import Bucket, Defaults, Limits, QuotaBook, Rule, Scope, parse_rate, parse_size
from cloud.redis_quotas import RedisQuotas, connect
from isthmus.errors import ConfigError, InputError


@dataclass(slots=True)
class Clock:
    """Microseconds that pass when a test says so."""

    now: int = 1_800_000_000_000_000

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += round(seconds * 1e6)


@dataclass(frozen=True, slots=True)
class Stage:
    """A store, its clock and a loop to run it in."""

    runner: asyncio.Runner
    clock: Clock
    store: QuotaStore

    def take(self, *rules: Rule, size: int = 0) -> Grant | Refusal:
        return self.runner.run(self.store.take(rules, size))

    def admitted(self, *rules: Rule, tries: int, size: int = 0) -> int:
        async def story() -> int:
            return sum([isinstance(await self.store.take(rules, size), Grant) for _ in range(tries)])

        return self.runner.run(story())

    def release(self, grant: Grant | Refusal) -> None:
        assert isinstance(grant, Grant)
        self.runner.run(grant.store.release(grant))


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as running:
        yield running


@pytest.fixture(scope="module")
def redis_client(runner: asyncio.Runner, redis_address: str) -> Iterator[Any]:
    client = connect(redis_address, timeout_s=60)
    yield client
    runner.run(client.aclose())


@pytest.fixture(params=["memory", "redis"])
def stage(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Stage:
    """Each store in turn, empty."""
    clock = Clock()
    if request.param == "memory":
        return Stage(runner, clock, MemoryQuotas(clock))
    client = request.getfixturevalue("redis_client")
    runner.run(client.flushall())
    return Stage(runner, clock, RedisQuotas(client, clock=clock))


def rule(tenant: str = "acme", device: str = "", model: str = "", **limits: Any) -> Rule:
    for name in ("rate", "bytes_rate"):
        if name in limits:
            limits[name] = parse_rate(limits[name], sizes=name == "bytes_rate")
    return Rule(Scope(tenant, device, model), Limits(**limits))


def test_a_bucket_admits_its_burst_and_then_its_rate(stage: Stage) -> None:
    quota = rule(rate="100/s", burst=250)
    assert stage.admitted(quota, tries=1000) == 250
    for seconds, more in ((0.009999, 0), (0.000001, 1), (0.5, 50), (0.25, 25), (1000.0, 250)):
        stage.clock.advance(seconds)
        assert stage.admitted(quota, tries=500) == more


def test_what_is_left_of_a_microsecond_is_never_lost(stage: Stage) -> None:
    quota = rule(rate="7/min", burst=3)
    admitted = 0
    for _ in range(3000):
        stage.clock.advance(0.1)
        admitted += stage.admitted(quota, tries=1)
    assert admitted == 3 + int(Fraction(7, 60) * Fraction(2999, 10))  # in the first tenth of a second it was full


def test_a_refusal_says_when_the_request_could_pass(stage: Stage) -> None:
    quota = rule(rate="4/s", burst=1)
    assert isinstance(stage.take(quota), Grant)
    stage.clock.advance(0.1)
    refused = stage.take(quota)
    assert refused == Refusal(quota, "requests", 150_000)
    stage.clock.advance(0.149999)
    assert isinstance(stage.take(quota), Refusal)
    stage.clock.advance(0.000001)
    assert isinstance(stage.take(quota), Grant)
    never = rule("other", rate="0/s", burst=1)
    assert isinstance(stage.take(never), Grant)
    assert stage.take(never) == Refusal(never, "requests", None)


def test_all_quotas_admit_or_none_counts(stage: Stage) -> None:
    wide, narrow = rule(rate="1/h", burst=10), rule(device="camera", rate="1/h", burst=2)
    assert stage.admitted(wide, narrow, tries=100) == 2
    assert stage.admitted(wide, tries=100) == 8


def test_the_quota_that_lasts_longest_is_the_one_that_is_told(stage: Stage) -> None:
    quick, slow = rule(rate="1/s", burst=1), rule(device="camera", rate="1/min", burst=1)
    assert isinstance(stage.take(quick, slow), Grant)
    assert stage.take(quick, slow) == Refusal(slow, "requests", 60_000_000)
    assert stage.take(slow, quick) == Refusal(slow, "requests", 60_000_000)


def test_bytes_are_counted_by_themselves(stage: Stage) -> None:
    quota = rule(bytes_rate="1MB/s", bytes_burst=parse_size("3MB"))
    assert stage.admitted(quota, tries=10, size=1_000_000) == 3
    assert stage.take(quota, size=10) == Refusal(quota, "bytes", 10)
    stage.clock.advance(0.5)
    assert isinstance(stage.take(quota, size=500_000), Grant)
    assert stage.take(quota, size=4_000_000) == Refusal(quota, "bytes", None)
    assert isinstance(stage.take(quota, size=0), Grant)


def test_a_lease_ends_with_its_request(stage: Stage) -> None:
    quota, other = rule(concurrency=2), rule("other", concurrency=1)
    first, second = stage.take(quota), stage.take(quota)
    assert stage.take(quota) == Refusal(quota, "concurrency", None)
    assert isinstance(stage.take(other), Grant)
    stage.release(first)
    third = stage.take(quota)
    assert isinstance(stage.take(quota), Refusal)
    for grant in (second, third):
        stage.release(grant)
    stage.release(stage.take(quota))
    assert isinstance(stage.take(quota), Grant)


def test_what_runs_holds_no_lease_when_another_quota_refuses(stage: Stage) -> None:
    running, rate = rule(concurrency=1), rule(device="camera", rate="0/s", burst=0)
    assert isinstance(stage.take(running, rate), Refusal)
    assert isinstance(stage.take(running), Grant)


def test_a_changed_quota_starts_full_and_keeps_what_runs(stage: Stage) -> None:
    assert stage.admitted(rule(rate="1/h", burst=5), tries=9) == 5
    assert stage.admitted(rule(rate="2/h", burst=5), tries=9) == 5
    held = stage.take(rule(concurrency=1))
    assert isinstance(stage.take(rule(concurrency=1, rate="1/s")), Refusal)
    stage.release(held)


def test_names_of_any_kind_do_not_meet(stage: Stage) -> None:
    names = ("a", "a:b", "{a}", "a}:", "ä", "a b", "*")
    for tenant in names:
        for device in ("", *names):
            assert stage.admitted(rule(tenant, device, rate="0/s", burst=1), tries=2) == 1


@dataclass(slots=True)
class Oracle:
    """A bucket in fractions: what it should admit."""

    bucket: Bucket
    level: Fraction = field(init=False)
    at: int = 0

    def __post_init__(self) -> None:
        self.level = Fraction(self.bucket.burst)

    def move(self, now: int) -> None:
        gained = Fraction(self.bucket.gain, self.bucket.cost) * (now - self.at)
        self.level, self.at = min(Fraction(self.bucket.burst), self.level + gained), now

    def wait_us(self, amount: int) -> int | None:
        """0: passes now."""
        if amount <= self.level:
            return 0
        if amount > self.bucket.burst or not self.bucket.gain:
            return None
        missing = (amount - self.level) / Fraction(self.bucket.gain, self.bucket.cost)
        return -int(-missing // 1)


_RATES = st.builds(
    lambda count, period: f"{count}/{period}", st.integers(0, 5000), st.sampled_from(["s", "min", "h", "d"])
)
_LIMITS = st.builds(
    lambda rate, burst, bytes_rate, bytes_burst: Limits(parse_rate(rate), burst, parse_rate(bytes_rate), bytes_burst),
    _RATES, st.integers(0, 50), _RATES, st.integers(0, 5000),
)  # fmt: skip
_STEPS = st.lists(st.tuples(st.integers(0, 400_000_000), st.integers(0, 6000), st.booleans()), min_size=1, max_size=60)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wide=_LIMITS, narrow=_LIMITS, steps=_STEPS)
def test_decides_as_fractions_do(
    stage: Stage, wide: Limits, narrow: Limits, steps: list[tuple[int, int, bool]]
) -> None:
    scope = Scope(f"tenant-{stage.clock.now}")  # each example has buckets of its own
    rules = (Rule(scope, wide), Rule(Scope(scope.tenant, "camera"), narrow))
    oracles = [
        (each, kind, Oracle(bucket, at=stage.clock.now))
        for each in rules
        for kind, bucket in (("requests", each.limits.requests), ("bytes", each.limits.bytes))
        if bucket is not None
    ]
    for wait, size, both in steps:
        stage.clock.now += wait
        asked = rules if both else rules[:1]
        waits = []
        for each, kind, oracle in oracles:
            oracle.move(stage.clock.now)
            if each in asked:
                waits.append(oracle.wait_us(1 if kind == "requests" else size))
        outcome = stage.take(*asked, size=size)
        if isinstance(outcome, Refusal):
            assert outcome.wait_us == (None if None in waits else max(w for w in waits if w is not None))
            assert outcome.wait_us != 0
            continue
        assert not any(waits)
        for each, kind, oracle in oracles:
            if each in asked:
                oracle.level -= 1 if kind == "requests" else size
    stage.clock.now += 86_400_000_000


@pytest.mark.parametrize(
    ("text", "sizes", "per_second"),
    [
        ("100/s", False, Fraction(100)),
        ("100", False, Fraction(100)),
        ("30/min", False, Fraction(1, 2)),
        ("2.5/hour", False, Fraction(25, 36000)),
        ("10MB/s", True, Fraction(10_000_000)),
        ("1 KiB/s", True, Fraction(1024)),
        ("1GB/day", True, Fraction(10**9, 86400)),
    ],
)
def test_reads_rates(text: str, sizes: bool, per_second: Fraction) -> None:
    gain, cost = parse_rate(text, sizes=sizes).units
    assert Fraction(gain, cost) * 10**6 == per_second


@pytest.mark.parametrize("text", ["", "fast", "-1/s", "1/fortnight", "10MB/s", "1e3/s", "1/2", "nan/s", "٣/x", "1//s"])
def test_refuses_what_is_no_rate(text: str) -> None:
    with pytest.raises(InputError, match="expected a rate"):
        parse_rate(text)


def test_refuses_limits_that_cannot_be() -> None:
    for limits in (
        {"burst": 5},
        {"concurrency": -1},
        {"rate": "1/s", "burst": 2**53},
        {"rate": "0.000001/d", "burst": 10**6},
    ):
        with pytest.raises(InputError):
            rule(**limits)
    assert rule(rate="0.5/s").limits.requests == Bucket(1, 2_000_000, 1)


def test_the_most_specific_row_counts() -> None:
    book = QuotaBook(Defaults(tenant=rule(concurrency=100).limits, device=rule(concurrency=10).limits))
    limits = {n: rule(concurrency=n).limits for n in range(1, 9)}
    assert [(r.scope, r.limits.concurrency) for r in book.rules("acme", "cam", "m")] == [
        (Scope("acme"), 100), (Scope("acme", "cam"), 10),
    ]  # fmt: skip
    book.replace(
        {
            Scope("*", "*"): limits[1], Scope("acme", "*"): limits[2], Scope("acme", "cam"): limits[3],
            Scope("acme", "", "m"): limits[4], Scope("acme", "*", "m"): limits[5], Scope("acme"): Limits(),
        }
    )  # fmt: skip

    def found(tenant: str, device: str, model: str) -> list[int | None]:
        return [r.limits.concurrency for r in book.rules(tenant, device, model)]

    assert found("acme", "cam", "m") == [3, 4, 5]
    assert found("acme", "door", "n") == [2]
    assert found("other", "cam", "m") == [100, 1]
    assert [str(r.scope) for r in book.rules("acme", "door", "m")] == [
        "tenant acme, device door", "tenant acme, model m", "tenant acme, device door, model m",
    ]  # fmt: skip


def test_memory_forgets_buckets_that_are_full_again() -> None:
    clock = Clock()
    store = MemoryQuotas(clock)

    async def story() -> None:
        for number in range(10_500):
            await store.take((rule(device=f"d{number}", rate="1/s"),), 0)
            clock.advance(0.01)
        assert len(store._levels) < 1000
        assert isinstance(await store.take((rule(device="d10499", rate="1/s"),), 0), Refusal)

    asyncio.run(story())


@pytest.mark.parametrize(
    "address", ["http://x", "redis.example:6379", "redis://redis.example:6379/0", "redis://localhost:x"]
)
def test_refuses_addresses_of_redis_that_cannot_be(address: str) -> None:
    with pytest.raises(ConfigError):
        connect(address)


def test_a_way_to_redis_that_is_secure_or_allowed_is_taken() -> None:
    for address, plaintext in (
        ("rediss://redis.example", False),
        ("redis://redis.example", True),
        ("redis://[::1]", False),
    ):
        client: Any = connect(address, plaintext=plaintext)
        assert client.connection_pool.connection_kwargs
