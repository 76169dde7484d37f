"""Stores for tests: fixed clocks, small limits, requests made from an id."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge.deferred.disk import Disk
from edge.deferred.sealing import Sealer
from edge.deferred.store import DeferredStore, Limits, NewRequest
from edge.deferred.wish import QueueName, Wish
from tests.edge.deferred.simulated_disk import SimulatedDisk

KEY = bytes(range(32))
QUEUE = QueueName("", "default")
ROOMY = Limits(bytes=1 << 20, entries=100)


@dataclass
class Clock:
    seconds: float = 1000.0
    epoch_ms: int = 1_700_000_000_000

    def now_ms(self) -> int:
        return self.epoch_ms + int(self.seconds * 1000)

    def __call__(self) -> float:
        return self.seconds


@dataclass
class Machine:
    """A store that can be closed and opened again over what is on its disk."""

    disk: Disk = field(default_factory=SimulatedDisk)
    limits: Limits = ROOMY
    clock: Clock = field(default_factory=Clock)
    key: bytes = KEY

    def open(self) -> DeferredStore:
        return DeferredStore(self.disk, Sealer(self.key), self.limits, clock=self.clock, now_ms=self.clock.now_ms)


def new(
    request_id: str, *, priority: int = 5, ttl_s: int = 3600, queue: QueueName = QUEUE, size: int = 10
) -> NewRequest:
    wish = Wish(queue=queue, id=request_id, priority=priority, ttl_s=ttl_s)
    return NewRequest(wish=wish, request=b"q" * size, template=b"template of " + request_id.encode(), answer_bytes=10)


def results(store: DeferredStore, after: int = 0, queue: QueueName = QUEUE) -> list[tuple[str, str]]:
    """Return id, and answer or reason, of all results of a queue."""
    found = []
    while (sequence := store.index.next_result(queue, after)) is not None:
        result = store.read_result(sequence)
        assert result is not None
        found.append((result.id, result.reason or result.answer.decode()))
        after = sequence
    return found
