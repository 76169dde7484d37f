"""Counting: every request once, whatever becomes of it, of the gateway, and of the database."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from cloud import database as db
from cloud.journal import OUTCOMES, Counts, Journal, Key, read_segment
from cloud.metering import Meter
from cloud.usage_rows import Question, UsageTable
from isthmus.errors import InputError, IsthmusError, NotFoundError, QuotaError, UnavailableError
from isthmus.status import TOO_LATE
from security.tokens import Claims
from tests.cloud.conftest import eventually

HOUR = 1_800_000_000


def claims(subject: str = "camera", tenant: str = "acme") -> Claims:
    return Claims(subject, frozenset(), frozenset("*"), datetime.now(UTC), tenant=tenant)


class Clock:
    def __init__(self) -> None:
        self.now = float(HOUR)

    def __call__(self) -> float:
        return self.now


class Unwilling(UsageTable):
    """A database that does not answer for a while, or whose answer gets lost."""

    def __init__(self, database: db.Database) -> None:
        super().__init__(database)
        self.away = self.deaf = False

    def add(self, segment: Any, usage: Any) -> None:
        if self.away:
            raise OperationalError("commit", {}, Exception("gone"))
        super().add(segment, usage)
        if self.deaf:
            raise OperationalError("commit", {}, Exception("was it committed?"))


@pytest.fixture
def table(database: db.Database) -> Unwilling:
    return Unwilling(database)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "metering"


def meter(table: UsageTable, folder: Path, clock: Clock | None = None) -> Meter:
    return Meter(table, Journal(folder), clock=clock or Clock())


def usage(table: UsageTable, *by: str, **where: Any) -> dict[tuple[Any, ...], Counts]:
    return dict(table.read(Question(by=by, **where)))


def ask(counter: Meter, error: BaseException | None = None, *, sent: bool = True, who: Claims | None = None) -> None:
    with suppress(BaseException), counter.call(who or claims(), 100) as call:
        call.resolved("triage", 3)
        if sent:
            call.sent()
        if error is not None:
            raise error
        call.answered(40)


def test_every_end_of_a_request_has_one_outcome(table: UsageTable, folder: Path) -> None:
    ends: dict[str, list[BaseException]] = {
        "refused": [InputError("x"), NotFoundError("x")],
        "limited": [QuotaError("x"), QuotaError("x", reason="too-many-requests"), InputError("x", reason="too-large")],
        "failed": [UnavailableError("x"), IsthmusError("x"), RuntimeError("a defect")],
        "cancelled": [
            asyncio.CancelledError(),
            UnavailableError("x", reason=TOO_LATE),
            UnavailableError("x", reason=TOO_LATE),
        ],
    }

    async def story() -> None:
        counter = meter(table, folder)
        await counter.start()
        for errors in ends.values():
            for error in errors:
                ask(counter, error, sent=False)
        ask(counter)
        with counter.call(claims(), 7) as call:
            call.resolved("triage", 3)
            call.cached(5)
        with pytest.raises(InputError), counter.call(claims(), 9):
            raise InputError("not even a request")
        await counter.close()

    asyncio.run(story())
    found = usage(table, "model", "version")
    assert found["", 0].refused == 1
    counts = found["triage", 3]
    assert {name: getattr(counts, name) for name in OUTCOMES} == {
        "answered": 1, "cached": 1, "refused": 2, "limited": 3, "failed": 3, "cancelled": 3,
    }  # fmt: skip
    assert (counts.bytes_in, counts.bytes_out, counts.calls) == (100 * 12 + 7, 45, 1)
    assert counts.requests == 13
    assert not list(folder.iterdir())  # a clean stop leaves nothing


def test_hours_tenants_and_devices_are_kept_apart_and_add_up(table: UsageTable, folder: Path) -> None:
    clock = Clock()

    async def story() -> None:
        counter = meter(table, folder, clock)
        await counter.start()
        for hour in range(3):
            clock.now = HOUR + hour * 3600 + 1800
            for subject, tenant, times in (("a", "acme", 1), ("b", "acme", 2), ("a", "other", 4)):
                for _ in range(times):
                    ask(counter, who=claims(subject, tenant))
            await counter.flush()
        await counter.close()

    asyncio.run(story())

    def requests(*by: str, **where: Any) -> dict[Any, int]:
        return {group: counts.requests for group, counts in usage(table, *by, **where).items()}

    assert requests() == {(): 21}
    assert requests("tenant") == {("acme",): 9, ("other",): 12}
    assert requests("tenant", "device") == {("acme", "a"): 3, ("acme", "b"): 6, ("other", "a"): 12}
    assert requests("hour", tenant="acme") == {(HOUR + 3600 * hour,): 3 for hour in range(3)}
    assert requests("device", tenant="acme", since=HOUR + 3600, until=HOUR + 7200) == {("a",): 1, ("b",): 2}
    assert requests("version", model="triage", device="b") == {(3,): 6}
    assert requests(model="nothing") == {(): 0}


def test_two_gateways_add_up(table: UsageTable, folder: Path) -> None:
    async def story() -> None:
        one, other = meter(table, folder / "one"), meter(table, folder / "other")
        await one.start()
        await other.start()
        for _ in range(5):
            for counter in (one, other, one):
                ask(counter)
            await asyncio.gather(one.flush(), other.flush())
        await one.close()
        await other.close()

    asyncio.run(story())
    assert usage(table)[()].requests == 15


def test_a_database_that_is_away_costs_nothing(table: Unwilling, folder: Path) -> None:
    async def story() -> None:
        counter = meter(table, folder)
        await counter.start()
        table.away = True
        for _ in range(3):
            ask(counter)
            with pytest.raises(SQLAlchemyError):
                await counter.flush()
        table.away = False
        ask(counter)
        await counter.flush()
        assert usage(table)[()].requests == 4
        assert sum(counts.requests for counts in counter.totals().values()) == 4
        await counter.close()

    asyncio.run(story())


def test_a_commit_whose_answer_was_lost_is_counted_once(table: Unwilling, folder: Path) -> None:
    async def story() -> None:
        counter = meter(table, folder)
        await counter.start()
        ask(counter)
        table.deaf = True
        with pytest.raises(SQLAlchemyError):
            await counter.flush()
        ask(counter)
        table.deaf = False
        await counter.flush()
        await counter.close()

    asyncio.run(story())
    assert usage(table)[()].requests == 2


@pytest.mark.parametrize("when", ["never flushed", "flushed", "committed but not removed", "database away"])
def test_what_a_killed_gateway_leaves_is_counted_once(table: Unwilling, folder: Path, when: str) -> None:
    async def killed() -> None:
        counter = meter(table, folder)
        await counter.start()
        ask(counter)
        if when == "flushed":
            await counter.flush()
        if when != "never flushed":
            table.deaf, table.away = when == "committed but not removed", when == "database away"
            with suppress(SQLAlchemyError):
                await counter.flush()
            table.deaf = table.away = False
        ask(counter)

    async def next_one() -> None:
        counter = meter(table, folder)
        await counter.start()
        ask(counter)
        await counter.close()

    asyncio.run(killed())
    asyncio.run(next_one())
    assert usage(table)[()].requests == 3
    assert not list(folder.iterdir())


def test_a_disk_that_is_full_loses_nothing_but_to_a_kill(
    table: Unwilling, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    async def story() -> None:
        counter = meter(table, folder)
        await counter.start()
        ask(counter)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
            ask(counter)
        ask(counter)
        assert counter.journal_errors == 2
        await counter.flush()
        ask(counter)
        assert counter.journal_errors == 2  # the next segment is well again
        await counter.close()

    asyncio.run(story())
    assert usage(table)[()].requests == 4


KEYS = st.builds(
    Key, st.integers(0, 2**40), st.text(max_size=5), st.text(max_size=5), st.text(max_size=5), st.integers(0, 2**50)
)
ENTRIES = st.lists(
    st.tuples(
        KEYS, st.integers(0, 5), st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 9), st.integers(0, 9)
    )
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=ENTRIES, cut=st.integers(0, 200), flip=st.integers(0, 10_000))
def test_a_segment_reads_back_up_to_what_is_torn(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Any], cut: int, flip: int
) -> None:
    journal = Journal(tmp_path_factory.mktemp("journal"))
    journal.open()
    wanted: list[dict[Key, Counts]] = [{}]
    for key, *count in entries:
        journal.write(key, *count)
        after = {
            known: Counts(**{n: getattr(c, n) for n in Counts.__dataclass_fields__}) for known, c in wanted[-1].items()
        }
        after.setdefault(key, Counts()).count(*count)
        wanted.append(after)
    segment = journal.rotate()
    data = segment.path.read_bytes()
    assert read_segment(data) == wanted[-1]
    assert read_segment(data[: max(len(data) - cut, 0)]) in wanted
    if data:
        torn = bytearray(data)
        torn[flip % len(data)] ^= 0x40
        found = read_segment(bytes(torn))
        assert found in wanted
        assert found != wanted[-1]
    segment.remove()
    journal.close()


def test_what_is_old_is_forgotten(table: UsageTable, folder: Path) -> None:
    clock = Clock()

    async def story() -> None:
        counter = Meter(table, Journal(folder), flush_s=0.01, keep_days=2, clock=clock)
        await counter.start()
        for day in range(4):
            clock.now = HOUR + day * 86400.0
            ask(counter)
        await counter.flush()
        running = asyncio.create_task(counter.run())

        async def is_forgotten() -> bool:
            return await asyncio.to_thread(lambda: usage(table)[()].requests == 3)

        await eventually(is_forgotten, "what is older than two days is gone")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await counter.close()

    asyncio.run(story())
    assert {hour for (hour,) in usage(table, "hour")} == {HOUR + day * 86400 for day in (1, 2, 3)}


def test_totals_are_those_since_the_start(table: UsageTable, folder: Path) -> None:
    async def story() -> None:
        counter = meter(table, folder)
        await counter.start()
        ask(counter)
        await counter.flush()
        ask(counter)
        ask(counter, who=claims("door"))
        totals = counter.totals()
        assert {key: counts.answered for key, counts in totals.items()} == {("acme", "triage", 3): 3}
        assert counter.totals() == totals
        await counter.close()

    asyncio.run(story())
