"""What the store keeps, in which order, within which bounds, and what it does with files that are not its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.deferred.disk import Disk
from edge.deferred.replay import BLOCK
from edge.deferred.store import Ending, Limits, NewRequest, ReadRequest
from edge.deferred.wish import QueueName, Wish
from tests.edge.deferred.simulated_disk import SimulatedDisk
from tests.edge.deferred.stores import QUEUE, ROOMY, Machine, new, results


def test_request_comes_back_as_it_was_stored_after_a_restart() -> None:
    machine = Machine()
    assert machine.open().put([new("a", size=5)]) == [None]
    store = machine.open()
    assert store.knows(QUEUE, "a")
    assert store.counters.found_pending == 1
    entry = store.index.take()
    assert entry is not None
    assert store.read_request(entry.number) == ReadRequest(template=b"template of a", request=b"qqqqq")
    assert store.index.take() is None  # nobody else gets it
    store.index.give_back(entry.number)
    assert store.index.take() is entry


def test_same_request_is_stored_once() -> None:
    machine = Machine()
    store = machine.open()
    assert store.put([new("a"), new("a")]) == [None, None]
    assert store.put([new("a")]) == [None]
    assert (store.counters.stored, store.index.pending_count) == (1, 1)
    store.end([Ending(1, answer=b"better")])
    assert store.put([new("a")]) == [None]
    assert results(store) == [("a", "better")]
    assert store.acknowledge(QUEUE, 2) == 1
    for opened in (store, machine.open()):
        assert opened.put([new("a")]) == [None]
        assert (opened.counters.stored, opened.index.pending_count) == (1 if opened is store else 0, 0)


def test_acknowledged_request_is_forgotten_after_its_life() -> None:
    machine = Machine()
    store = machine.open()
    store.put([new("a", ttl_s=100)])
    store.end([Ending(1, answer=b"better")])
    store.acknowledge(QUEUE, 2)
    machine.clock.seconds += 101
    assert not machine.open().knows(QUEUE, "a")


def test_request_without_an_answer_may_come_again() -> None:
    store = Machine().open()
    store.put([new("a")])
    store.end([Ending(1, reason="refused", message="no")])
    assert results(store) == [("a", "refused")]
    store.acknowledge(QUEUE, 10)
    assert not store.knows(QUEUE, "a")
    assert store.put([new("a")]) == [None]
    assert store.counters.stored == 2


def test_same_id_in_two_queues_is_two_requests() -> None:
    store = Machine().open()
    other, owned = QueueName("", "other"), QueueName("app", "default")
    store.put([new("a"), new("a", queue=other), new("a", queue=owned)])
    assert store.counters.stored == 3
    assert [count.queue for count in store.index.counts("")] == ["default", "other"]
    assert [count.pending for count in store.index.counts("app")] == [1]


def test_highest_priority_goes_first_and_then_the_oldest() -> None:
    store = Machine().open()
    store.put([new("a", priority=3), new("b", priority=7), new("c", priority=3), new("d", priority=9)])
    order = []
    while (entry := store.index.take()) is not None:
        order.append(entry.id)
    assert order == ["d", "b", "a", "c"]


def test_lower_priority_gives_way_when_there_is_no_room() -> None:
    store = Machine(limits=Limits(bytes=1 << 20, entries=3)).open()
    store.put([new("low", priority=1), new("lower-new", priority=0), new("mid", priority=5)])
    assert store.put([new("peer", priority=0)]) == ["quota"]
    assert store.put([new("mid-2", priority=5)]) == [None]
    assert store.put([new("mid-3", priority=5)]) == [None]
    assert store.put([new("mid-4", priority=5)]) == ["quota"]
    assert results(store) == [("lower-new", "evicted"), ("low", "evicted")]
    assert (store.counters.evicted, store.index.pending_count) == (2, 3)


def test_request_on_its_way_does_not_give_way() -> None:
    store = Machine(limits=Limits(bytes=1 << 20, entries=1)).open()
    store.put([new("low", priority=0)])
    store.index.take()
    assert store.put([new("high", priority=9)]) == ["quota"]


def test_bytes_are_bounded_and_room_for_the_answer_is_kept() -> None:
    store = Machine(limits=Limits(bytes=3 * BLOCK, entries=100)).open()
    wish = Wish(queue=QUEUE, id="a", priority=5, ttl_s=60)
    assert store.put([new("big", size=3 * BLOCK)]) == ["too-large"]
    large_answer = NewRequest(wish=wish, request=b"", template=b"", answer_bytes=2 * BLOCK)
    assert store.put([large_answer, new("b"), new("c")]) == [None, None, "quota"]
    assert store.index.bytes == 3 * BLOCK
    store.end([Ending(1, answer=b"x" * BLOCK)])
    assert store.put([new("c")]) == ["quota"]
    store.acknowledge(QUEUE, 10)
    assert store.put([new("c")]) == [None]


def test_request_that_outlives_its_time_ends_as_expired() -> None:
    machine = Machine()
    store = machine.open()
    store.put([new("short", ttl_s=10), new("long", ttl_s=100)])
    machine.clock.seconds += 11
    store.expire()
    assert results(store) == [("short", "expired")]
    assert store.index.pending_count == 1
    store = machine.open()  # the wall clock goes on counting while the agent is down
    machine.clock.seconds += 90
    store.expire()
    assert results(store) == [("long", "expired")]  # a result lives as long as its request did


def test_result_that_nobody_reads_lives_as_long_as_a_request() -> None:
    machine = Machine()
    store = machine.open()
    store.put([new("a", ttl_s=10)])
    machine.clock.seconds += 9
    store.end([Ending(1, answer=b"better")])
    machine.clock.seconds += 9
    store.expire()
    assert results(store) == [("a", "better")]
    machine.clock.seconds += 2
    store.expire()
    assert results(store) == []
    assert (store.counters.dropped, store.index.bytes) == (1, 0)


@pytest.mark.parametrize("jump_s", [-(10**8), 10**8])
def test_wall_clock_that_jumps_ends_no_life_while_the_agent_runs(jump_s: int) -> None:
    machine = Machine()
    store = machine.open()
    store.put([new("a", ttl_s=10)])
    machine.clock.epoch_ms += jump_s * 1000
    store.expire()
    assert store.index.pending_count == 1
    if jump_s < 0:  # found again with a clock from before it was stored: its life starts anew, and is no longer
        store = machine.open()
        machine.clock.seconds += 11
        store.expire()
        assert results(store) == [("a", "expired")]


def test_ends_without_answer_are_bounded() -> None:
    machine = Machine(limits=Limits(bytes=1 << 20, entries=5))
    store = machine.open()
    for number in range(5):
        store.put([new(f"r{number}", ttl_s=100 + number)])
    machine.limits = Limits(bytes=1 << 20, entries=2)
    store = machine.open()
    machine.clock.seconds += 110
    store.expire()
    assert [request_id for request_id, _ in results(store)] == ["r3", "r4"]
    assert store.counters.dropped == 3


def test_purge_forgets_one_queue() -> None:
    machine = Machine()
    store = machine.open()
    other = QueueName("", "other")
    store.put([new("a"), new("b"), new("c", queue=other)])
    store.end([Ending(1, answer=b"better")])
    assert store.purge(QUEUE) == (1, 1)
    assert store.purge(QUEUE) == (0, 0)
    for opened in (store, machine.open()):
        assert [count.queue for count in opened.index.counts("")] == ["other"]
        assert not opened.knows(QUEUE, "a")


@pytest.mark.parametrize("operation", ["write", "rename", "sync"])
def test_full_disk_costs_the_promise_and_nothing_else(operation: str) -> None:
    machine = Machine(disk=SimulatedDisk())
    store = machine.open()
    assert isinstance(machine.disk, SimulatedDisk)
    machine.disk.refuses = {operation}
    assert store.put([new("a"), new("b")]) == ["disk", "disk"]
    assert not store.knows(QUEUE, "a")
    machine.disk.refuses = set()
    assert store.put([new("a")]) == [None]
    machine.disk.refuses = {operation}
    entry = store.index.take()
    assert entry is not None
    with pytest.raises(OSError, match="no space"):
        store.end([Ending(entry.number, answer=b"better")])
    assert (store.index.pending_count, results(store)) == (1, [])
    machine.disk.refuses = set()
    store.end([Ending(entry.number, answer=b"better")])
    assert results(store) == [("a", "better")]
    assert results(machine.open()) == [("a", "better")]


def test_acknowledgement_that_the_disk_refuses_can_be_said_again() -> None:
    machine = Machine(disk=SimulatedDisk())
    store = machine.open()
    assert isinstance(machine.disk, SimulatedDisk)
    store.put([new("a")])
    store.end([Ending(1, answer=b"better")])
    machine.disk.refuses = {"append"}
    with pytest.raises(OSError, match="no space"):
        store.acknowledge(QUEUE, 2)
    assert results(store) == [("a", "better")]
    machine.disk.refuses = set()
    assert store.acknowledge(QUEUE, 2) == 1
    assert machine.open().knows(QUEUE, "a")


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


CHANGES = {
    "flipped": flipped,
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "header flipped": lambda data: data[:30] + bytes([data[30] ^ 1]) + data[31:],
    "foreign": lambda data: b"not an entry at all",
    "absurd length": lambda data: data[:4] + b"\xff\xff\xff\xff" + data[8:],
}


@pytest.mark.parametrize("change", CHANGES)
def test_altered_request_is_set_aside(change: str) -> None:
    machine = Machine(disk=SimulatedDisk())
    assert isinstance(machine.disk, SimulatedDisk)
    machine.open().put([new("a"), new("b")])
    machine.disk.alter("000000000001.request", CHANGES[change])
    store = machine.open()
    while (entry := store.index.take()) is not None:  # a body is looked at when it is sent
        if store.read_request(entry.number) is not None:
            store.end([Ending(entry.number, answer=b"better")])
    assert machine.disk.aside == ["000000000001.request"]
    in_time = [("a", "damaged")] if change in ("flipped",) else []
    assert sorted(results(store)) == sorted([*in_time, ("b", "better")])


@pytest.mark.parametrize("change", CHANGES)
def test_altered_result_is_not_delivered(change: str) -> None:
    machine = Machine(disk=SimulatedDisk())
    assert isinstance(machine.disk, SimulatedDisk)
    store = machine.open()
    store.put([new("a")])
    store.end([Ending(1, answer=b"better")])
    machine.disk.alter("000000000002.result", CHANGES[change])
    assert results(store) == [("a", "damaged")]
    assert ("a", "better") not in results(machine.open())


def test_entry_opens_under_its_own_name_only() -> None:
    machine = Machine(disk=SimulatedDisk())
    assert isinstance(machine.disk, SimulatedDisk)
    machine.open().put([new("a")])
    machine.disk.rename("000000000001.request", "000000000007.request")
    assert machine.open().index.pending_count == 0
    assert machine.disk.aside == ["000000000007.request"]


def test_another_key_reads_nothing_and_breaks_nothing() -> None:
    machine = Machine(disk=SimulatedDisk())
    assert isinstance(machine.disk, SimulatedDisk)
    first = machine.open()
    first.put([new("a")])
    machine.key = bytes(32)
    store = machine.open()
    assert store.id != first.id
    assert store.index.pending_count == 0
    assert machine.disk.aside == ["000000000001.request", "sequences"]
    assert store.put([new("b")]) == [None]


def test_sequences_never_come_twice_even_when_all_is_acknowledged() -> None:
    machine = Machine()
    seen: list[int] = []
    for number in range(5):
        store = machine.open()
        store.put([new(f"r{number}")])
        entry = store.index.take()
        assert entry is not None
        store.end([Ending(entry.number, answer=b"better")])
        sequence = store.index.next_result(QUEUE, 0)
        assert sequence is not None
        store.acknowledge(QUEUE, sequence)
        seen.append(sequence)
    assert seen == sorted(set(seen))


def test_real_folder_tells_nothing_and_belongs_to_its_owner(tmp_path: Path) -> None:
    folder = tmp_path / "deferred"
    machine = Machine(disk=Disk(folder), limits=ROOMY)
    store = machine.open()
    store.put([new("secret-id", queue=QueueName("", "secret-queue"))])
    store.put([new("other-secret")])
    store.end([Ending(1, answer=b"secret answer")])
    (folder / "README").write_text("somebody else's")
    store = Machine(disk=Disk(folder)).open()
    assert results(store, queue=QueueName("", "secret-queue")) == [("secret-id", "secret answer")]
    assert (folder / "aside" / "README").exists()
    assert folder.stat().st_mode & 0o077 == 0
    for path in folder.glob("0*"):
        assert path.stat().st_mode & 0o077 == 0
        for word in (b"secret", b"template", b"qqq"):
            assert word not in path.read_bytes()
            assert word.decode() not in path.name
