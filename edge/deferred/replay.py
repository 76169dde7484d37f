"""What an earlier run left in the folder, and what of it still counts.

A crash can leave any of these, and each is recognised:

- a file whose writing was not finished: it has a temporary name, and is removed
- a result beside the request that it ends: the result counts
- two results of one request, when the disk failed in between: the later one counts
- a result that was acknowledged, or a request that was: they are among the settled ones, and are removed

What cannot be read, or is no file of the store, is set aside.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import structlog

from edge.deferred import sequences, settled
from edge.deferred.disk import Disk
from edge.deferred.entries import (
    TEMPORARY,
    H,
    Kind,
    RequestHeader,
    ResultHeader,
    file_name,
    parse_name,
    read_header,
)
from edge.deferred.index import Pending, Result
from edge.deferred.sealing import Sealer
from edge.deferred.settled import Settled
from edge.deferred.wish import QueueName
from isthmus.errors import TrustError

BLOCK: Final = 4096  # bytes: what a small file takes on usual file systems

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Found:
    """What counts, by number; and the highest number of any file."""

    pending: list[Pending] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    highest: int = 0


def replay(disk: Disk, sealer: Sealer, done: Settled, *, now: float, now_ms: int) -> Found:
    """Return what counts in the folder, and remove what does not.

    Args:
        disk: The folder.
        sealer: The device's key.
        done: The requests that were acknowledged.
        now: Monotonic seconds.
        now_ms: Wall clock.

    Raises:
        OSError: The folder cannot be read, or what does not count cannot be removed.
    """
    return _Replay(disk, sealer, done, now, now_ms).run()


def key_of(queue: QueueName, request_id: str) -> str:
    """Return what names a request among the settled ones."""
    return f"{queue.owner}\0{queue.name}\0{request_id}"


def charged(size: int) -> int:
    """Return the bytes of the quota that a file of this size is charged."""
    return -(-size // BLOCK) * BLOCK


class _Replay:
    def __init__(self, disk: Disk, sealer: Sealer, done: Settled, now: float, now_ms: int) -> None:
        self._disk = disk
        self._sealer = sealer
        self._done = done
        self._now = now
        self._now_ms = now_ms

    def run(self) -> Found:
        numbers = self._sort()
        results = self._results(numbers["result"])
        return Found(
            pending=self._requests(numbers["request"], results),
            results=sorted(results.values(), key=lambda result: result.number),
            highest=max((*numbers["request"], *numbers["result"], 0)),
        )

    def _sort(self) -> dict[Kind, list[int]]:
        numbers: dict[Kind, list[int]] = {"request": [], "result": []}
        for name in self._disk.names():
            parsed = parse_name(name)
            if parsed is not None:
                numbers[parsed[1]].append(parsed[0])
            elif name.endswith(TEMPORARY):
                self._disk.remove([name])
            elif name not in (sequences.FILE, settled.FILE):
                log.warning("not a deferred request; set aside", file=name)
                self._disk.set_aside(name)
        return numbers

    def _results(self, numbers: list[int]) -> dict[int, Result]:
        """Return the results that count, by the request that each ends."""
        kept: dict[int, Result] = {}
        for number in numbers:
            name = file_name(number, "result")
            header = self._header(name, ResultHeader)
            if header is None:
                continue
            queue = QueueName(header.owner, header.queue)
            if key_of(queue, header.id) in self._done:
                self._disk.remove([file_name(header.request, "request"), name])
                continue
            if header.request in kept:
                self._disk.remove([file_name(kept[header.request].number, "result")])
            kept[header.request] = Result(
                number=number,
                queue=queue,
                id=header.id,
                ttl_s=header.ttl_s,
                due=self._due(header),
                charge=0 if header.reason else charged(self._disk.size(name)),
                request=header.request,
                notice=bool(header.reason),
            )
        return kept

    def _requests(self, numbers: list[int], results: dict[int, Result]) -> list[Pending]:
        names = {(result.queue, result.id) for result in results.values()}
        kept: list[Pending] = []
        for number in numbers:
            name = file_name(number, "request")
            header = None if number in results else self._header(name, RequestHeader)
            if header is None:
                if number in results:
                    self._disk.remove([name])
                continue
            queue = QueueName(header.owner, header.queue)
            if (queue, header.id) in names or key_of(queue, header.id) in self._done:
                self._disk.remove([name])
                continue
            names.add((queue, header.id))
            kept.append(
                Pending(
                    number=number,
                    queue=queue,
                    id=header.id,
                    ttl_s=header.ttl_s,
                    due=self._due(header),
                    charge=charged(max(self._disk.size(name), header.answer_bytes)),
                    priority=header.priority,
                )
            )
        return kept

    def _header(self, name: str, kind: type[H]) -> H | None:
        try:
            return read_header(self._disk, self._sealer, name, kind)
        except FileNotFoundError:  # removed above, with the result that ends it
            return None
        except (TrustError, OSError) as error:
            log.warning("deferred entry cannot be read; set aside", file=name, error=str(error))
            self._disk.set_aside(name)
            return None

    def _due(self, header: RequestHeader | ResultHeader) -> float:
        left_ms = header.stored_ms + header.ttl_s * 1000 - self._now_ms
        return self._now + min(max(left_ms, 0), header.ttl_s * 1000) / 1000
