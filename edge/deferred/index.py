"""What the store knows without looking at the disk: which requests wait, which results, in which order.

Plain data and no I/O. One lock, held for no longer than a look-up, lets the event loop ask while the writer changes it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock

from edge.deferred.wish import QueueName


@dataclass(slots=True)
class Entry:
    """A file of the store."""

    number: int
    queue: QueueName
    id: str
    ttl_s: int
    due: float  # on the monotonic clock: when its life ends
    charge: int  # bytes of the quota


@dataclass(slots=True)
class Pending(Entry):
    """A request that waits."""

    priority: int
    busy: bool = False  # on its way to the cloud


@dataclass(slots=True)
class Result(Entry):
    """A result that waits to be acknowledged; its number is its sequence."""

    request: int  # number of the request that it ends
    notice: bool  # the end of a request without an answer


@dataclass(frozen=True, slots=True)
class QueueCount:
    """What one queue holds."""

    queue: str
    pending: int
    results: int
    first_sequence: int  # of the results; 0 when there is none
    last_sequence: int


@dataclass(slots=True)
class _Queue:
    sequences: list[int] = field(default_factory=list)  # ascending
    pending: int = 0


class Index:
    """Requests and results by number, by name and in order."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._pending: dict[int, Pending] = {}
        self._results: dict[int, Result] = {}
        self._named: dict[tuple[QueueName, str], int] = {}
        self._queues: dict[QueueName, _Queue] = {}
        self._to_send: list[tuple[int, int]] = []  # heap of (-priority, number); may name what is gone
        self._dues: list[tuple[float, int]] = []  # heap; may name what is gone
        self.bytes = 0
        self.notices = 0

    def __contains__(self, name: tuple[QueueName, str]) -> bool:
        with self._lock:
            return name in self._named

    @property
    def pending_count(self) -> int:
        """Return how many requests wait."""
        return len(self._pending)

    @property
    def result_count(self) -> int:
        """Return how many results wait to be acknowledged."""
        return len(self._results)

    def add(self, entry: Pending | Result) -> None:
        """Take a file in; a result takes the place of the request of its name."""
        with self._lock:
            queue = self._queues.setdefault(entry.queue, _Queue())
            if isinstance(entry, Pending):
                self._pending[entry.number] = entry
                heapq.heappush(self._to_send, (-entry.priority, entry.number))
                queue.pending += 1
            else:
                self._results[entry.number] = entry
                queue.sequences.append(entry.number)
                self.notices += entry.notice
            self._named[entry.queue, entry.id] = entry.number
            self.bytes += entry.charge
            heapq.heappush(self._dues, (entry.due, entry.number))

    def drop(self, entry: Pending | Result) -> None:
        """Forget a file."""
        with self._lock:
            queue = self._queues[entry.queue]
            if isinstance(entry, Pending):
                del self._pending[entry.number]
                queue.pending -= 1
            else:
                del self._results[entry.number]
                queue.sequences.remove(entry.number)
                self.notices -= entry.notice
            if self._named.get((entry.queue, entry.id)) == entry.number:
                del self._named[entry.queue, entry.id]
            if not queue.pending and not queue.sequences:
                del self._queues[entry.queue]
            self.bytes -= entry.charge
            self._shrink()

    def pending(self, number: int) -> Pending | None:
        """Return a request that waits."""
        return self._pending.get(number)

    def result(self, sequence: int) -> Result | None:
        """Return a result that waits to be acknowledged."""
        return self._results.get(sequence)

    def take(self) -> Pending | None:
        """Return the request to send next, by priority and then age, and mark it busy."""
        with self._lock:
            while self._to_send:
                entry = self._pending.get(heapq.heappop(self._to_send)[1])
                if entry is not None and not entry.busy:
                    entry.busy = True
                    return entry
        return None

    def give_back(self, number: int) -> None:
        """Let a request be taken again."""
        with self._lock:
            entry = self._pending.get(number)
            if entry is not None and entry.busy:
                entry.busy = False
                heapq.heappush(self._to_send, (-entry.priority, entry.number))

    def may_send(self) -> bool:
        """Return whether a request waits that nobody sends."""
        with self._lock:
            while self._to_send and self._to_send[0][1] not in self._pending:
                heapq.heappop(self._to_send)
            return bool(self._to_send)

    def victim(self, priority: int) -> Pending | None:
        """Return the request to give up for one of this priority: the newest of the lowest priority, if lower."""
        lower = (entry for entry in self._pending.values() if entry.priority < priority and not entry.busy)
        return min(lower, key=lambda entry: (entry.priority, -entry.number), default=None)

    def next_result(self, queue: QueueName, after: int) -> int | None:
        """Return the first sequence after `after`."""
        with self._lock:
            sequences = self._queues[queue].sequences if queue in self._queues else []
            place = bisect_right(sequences, after)
            return sequences[place] if place < len(sequences) else None

    def results(self, queue: QueueName, up_to: int) -> list[Result]:
        """Return a queue's results with sequences up to `up_to`."""
        with self._lock:
            sequences = self._queues[queue].sequences if queue in self._queues else []
            return [self._results[number] for number in sequences[: bisect_right(sequences, up_to)]]

    def of_queue(self, queue: QueueName) -> list[Pending | Result]:
        """Return all that a queue holds."""
        with self._lock:
            everything: Iterator[Pending | Result] = iter((*self._pending.values(), *self._results.values()))
            return [entry for entry in everything if entry.queue == queue]

    def oldest_notices(self, excess: int) -> list[Result]:
        """Return the oldest results without an answer."""
        with self._lock:
            return [entry for _, entry in sorted(self._results.items()) if entry.notice][: max(0, excess)]

    def due(self, now: float) -> list[Pending | Result]:
        """Return what has reached the end of its life; each is returned once."""
        ended: list[Pending | Result] = []
        with self._lock:
            while self._dues and self._dues[0][0] <= now:
                number = heapq.heappop(self._dues)[1]
                entry = self._pending.get(number) or self._results.get(number)
                if entry is not None:
                    ended.append(entry)
        return ended

    def put_off(self, entry: Entry, due: float) -> None:
        """Let an entry live until `due`."""
        with self._lock:
            entry.due = due
            heapq.heappush(self._dues, (due, entry.number))

    def next_due(self) -> float | None:
        """Return when the next life ends; None when nothing is there."""
        with self._lock:
            return self._dues[0][0] if self._dues else None

    def counts(self, owner: str) -> list[QueueCount]:
        """Return what the queues of one caller hold, by name."""
        with self._lock:
            return [
                QueueCount(
                    queue=name.name,
                    pending=queue.pending,
                    results=len(queue.sequences),
                    first_sequence=queue.sequences[0] if queue.sequences else 0,
                    last_sequence=queue.sequences[-1] if queue.sequences else 0,
                )
                for name, queue in sorted(self._queues.items(), key=lambda item: item[0].name)
                if name.owner == owner
            ]

    def _shrink(self) -> None:
        if len(self._dues) > 2 * (len(self._pending) + len(self._results)) + 1024:
            self._dues = [(e.due, e.number) for e in (*self._pending.values(), *self._results.values())]
            heapq.heapify(self._dues)
        if len(self._to_send) > 2 * len(self._pending) + 1024:
            self._to_send = [(-e.priority, e.number) for e in self._pending.values() if not e.busy]
            heapq.heapify(self._to_send)
