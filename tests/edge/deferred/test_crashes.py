"""The store killed, or without power, in the middle of any operation, any number of times.

A client plays along: it asks for requests to be kept, asks again when it got no answer, reads results after its cursor
and acknowledges them. Whatever happens, it sees a result for each promise, and none twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.deferred.store import DeferredStore, Ending, Limits
from tests.edge.deferred.simulated_disk import Killed, SimulatedDisk
from tests.edge.deferred.stores import QUEUE, Clock, Machine, new

pytestmark = pytest.mark.slow
STEPS = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.just("retry"), st.integers(0, 30), st.integers(0, 9)),
    st.tuples(st.just("answer"), st.integers(1, 3), st.just(0)),
    st.tuples(st.just("refuse"), st.just(0), st.just(0)),
    st.tuples(st.just("read"), st.integers(1, 3), st.just(0)),
    st.tuples(st.just("acknowledge"), st.just(0), st.just(0)),
    st.tuples(st.just("wait"), st.integers(1, 400), st.just(0)),
)
LIFE_S = 1000


@dataclass
class Client:
    promised: set[str] = field(default_factory=set)
    asked: dict[str, float] = field(default_factory=dict)  # when first
    seen: dict[str, list[str]] = field(default_factory=dict)
    store: str = ""
    cursor: int = 0

    def read(self, store: DeferredStore) -> bool:
        """Read one result as a subscriber does."""
        after = self.cursor if self.store == store.id else 0
        sequence = store.index.next_result(QUEUE, after)
        if sequence is None:
            return False
        result = store.read_result(sequence)
        assert result is not None
        self.seen.setdefault(result.id, []).append(result.reason or "answer")
        self.store, self.cursor = store.id, sequence
        return True

    def may_ask_again(self, request_id: str, now: float) -> bool:
        # An id is remembered for a request's life; one that ended without an answer starts anew when it comes again.
        ended = "answer" not in self.seen.get(request_id, ["answer"])
        return not ended and now < self.asked[request_id] + LIFE_S


def act(store: DeferredStore, client: Client, machine: Machine, step: tuple[str, int, int]) -> None:
    name, number, other = step
    if name in ("put", "retry"):
        if name == "put":
            ids = [f"r{len(client.asked) + i}" for i in range(1 + number % 3)]
        else:
            candidates = list(client.asked)[number : number + 2]
            ids = [request_id for request_id in candidates if client.may_ask_again(request_id, machine.clock())]
        client.asked |= {request_id: machine.clock() for request_id in ids if request_id not in client.asked}
        batch = [new(request_id, priority=other, ttl_s=LIFE_S, size=number * 900) for request_id in ids]
        verdicts = store.put(batch)
        client.promised |= {request_id for request_id, verdict in zip(ids, verdicts, strict=True) if verdict is None}
    elif name in ("answer", "refuse"):
        entries = [entry for _ in range(max(number, 1)) if (entry := store.index.take()) is not None]
        for entry in entries:
            assert store.read_request(entry.number) is not None
        endings = [
            Ending(entry.number, answer=b"better") if name == "answer" else Ending(entry.number, reason="refused")
            for entry in entries
        ]
        store.end(endings)
    elif name == "read":
        for _ in range(number):
            client.read(store)
    elif name == "acknowledge":
        if client.store == store.id:
            store.acknowledge(QUEUE, client.cursor)
    else:
        machine.clock.seconds += number
        store.expire()


def check_counts(store: DeferredStore) -> None:
    c, index = store.counters, store.index
    ended = c.answered + c.refused + c.expired + c.evicted + c.damaged
    assert c.stored + c.found_pending == ended + c.purged_pending + index.pending_count
    assert ended + c.found_results == c.acknowledged + c.dropped + c.purged_results + index.result_count
    assert index.bytes >= 0


def finish(store: DeferredStore, client: Client) -> None:
    while (entry := store.index.take()) is not None:
        store.end([Ending(entry.number, answer=b"better")])
    while client.read(store):
        pass
    check_counts(store)
    store.acknowledge(QUEUE, client.cursor)
    assert store.index.result_count == 0
    assert store.index.bytes == 0
    assert store.index.notices == 0


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.lists(STEPS, max_size=12), st.integers(0, 60), st.booleans()), max_size=6), st.data())
def test_every_promise_is_kept_once_whatever_crashes(
    runs: list[tuple[list[tuple[str, int, int]], int, bool]], data: st.DataObject
) -> None:
    disk = SimulatedDisk()
    machine = Machine(disk=disk, limits=Limits(bytes=10 * 4096, entries=1000))
    client = Client()
    for steps, budget, power_cut in runs:
        disk.steps_left = budget
        try:
            store = machine.open()
            for step in steps:
                act(store, client, machine, step)
                check_counts(store)
        except Killed:
            pass
        disk = disk.after_power_cut(lambda: data.draw(st.booleans())) if power_cut else disk.after_kill()
        machine.disk = disk
    store = machine.open()
    assert not disk.aside  # a crash alone makes nothing that cannot be read
    finish(store, client)
    assert all(len(outcomes) == 1 for outcomes in client.seen.values()), client.seen
    if machine.clock.seconds < Clock().seconds + LIFE_S:  # else the client may have been away for too long
        assert client.promised <= client.seen.keys()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 200), st.booleans(), st.data())
def test_one_crash_anywhere_costs_nothing(kill_after: int, power_cut: bool, data: st.DataObject) -> None:
    """One straight story: twelve requests, their answers, their acknowledgement, with one crash somewhere."""
    disk = SimulatedDisk()
    machine = Machine(disk=disk)
    client = Client()
    steps = [("put", 2, 5)] * 4 + [("answer", 3, 0), ("read", 2, 0), ("acknowledge", 0, 0)] * 4
    disk.steps_left = kill_after
    try:
        store = machine.open()
        for step in steps:
            act(store, client, machine, step)
        disk.steps_left = None
    except Killed:
        machine.disk = disk.after_power_cut(lambda: data.draw(st.booleans())) if power_cut else disk.after_kill()
        store = machine.open()
    for request_id in list(client.asked):  # the client asks for all again, as after lost answers
        client.promised |= {request_id}
        assert store.put([new(request_id)]) == [None]
    finish(store, client)
    assert {request_id: len(outcomes) for request_id, outcomes in client.seen.items()} == dict.fromkeys(
        client.promised, 1
    )
