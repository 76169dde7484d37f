"""Writes the audit log: callers put records into a queue, one thread puts them on the disk.

Rules:
1. `write` returns once its record is on the disk (written, fsync) and the head beside it is signed; `note` returns at
   once, and its record gets there with the next group, at most `LINGER_S` later. Records that wait together share one
   fsync. The event loop never waits for the disk.
2. Records first, head second: what the head speaks of is on the disk.
3. What cannot be written is taken back whole: the file is cut to its last good end, `write` fails, notes are counted,
   and the count is recorded as soon as the disk takes records again.
4. Every `checkpoint_records` records, and `checkpoint_s` after the last one, a signed checkpoint goes into the chain.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

import structlog
from cryptography.hazmat.primitives.asymmetric import ed25519

from isthmus.errors import ConfigError, UnavailableError
from security.audit.reading import segment_name
from security.audit.records import Event, Head, Link, sign_head
from security.audit.tail import Tail, adopt, lock_chain
from security.keyfiles import make_private_folder, replace_file, sync_folder

LINGER_S: Final = 0.2
UNWRITABLE: Final = "audit-unavailable"
_GROUP: Final = 512  # records of one fsync
_TEXT_AGAIN_S: Final = 60.0  # between two complaints in the log

log = structlog.get_logger(__name__)


class Trail(Protocol):
    """Where records go."""

    def note(self, event: Event) -> None:
        """Record it soon; a record that cannot be written is counted."""
        ...

    async def write(self, event: Event) -> None:
        """Record it now, or raise UnavailableError."""
        ...

    async def ready(self) -> None:
        """Raise UnavailableError when what would be recorded now could not be."""
        ...


class NoTrail:
    """Of a process that keeps no audit log."""

    def note(self, event: Event) -> None:
        """Keep nothing."""

    async def write(self, event: Event) -> None:
        """Keep nothing."""

    async def ready(self) -> None:
        """Be ready."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Bounds of a log."""

    segment_bytes: int = 16 << 20
    checkpoint_records: int = 1000
    checkpoint_s: float = 60.0
    queue: int = 10_000  # records that may wait for the disk
    min_free_bytes: int = 0  # of the disk; below this it counts as full


@dataclass(slots=True)
class Counters:
    """Since the process started."""

    written: int = 0
    lost: int = 0
    failures: int = 0


@dataclass(slots=True)
class _Waiting:
    event: Event
    at: datetime
    done: Future[None] | None = field(default=None)


class AuditLog:
    """One chain, written by this process.

    Args:
        folder: Made when it is missing.
        key: Signs heads and checkpoints.
        terms: Bounds.
        keys: Public keys that signed earlier heads.
        clock: The time.

    Raises:
        ConfigError: The folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        key: ed25519.Ed25519PrivateKey,
        *,
        keys: Mapping[str, ed25519.Ed25519PublicKey],
        terms: Terms | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._folder, self._key, self._clock, self._terms = folder, key, clock, terms or Terms()
        self._waiting: deque[_Waiting] = deque()
        self._condition = threading.Condition()
        self._closing = False
        self._urgent = 0  # callers that wait
        self._since_checkpoint, self._checkpoint_at = 0, time.monotonic()
        self._complained_at = -_TEXT_AGAIN_S
        self._failing = False  # as of the last try
        self._unrecorded = 0  # lost since the last record of a loss
        self.counters = Counters()
        try:
            make_private_folder(folder)
            tail, wrong = adopt(folder, keys)
            tail = tail or self._begin()
            self._lock, self._link, self._segment = tail.lock, tail.link, tail.segment
            self._file = self._open()
        except OSError as error:
            raise ConfigError(
                f"cannot write the audit log in {folder}: {error.strerror}",
                hint="the cloud's user must own the folder; audit_folder names another one",
            ) from error
        if tail.mended is not None:
            self.note(tail.mended)
        for text in wrong:
            self.note(Event("audit.chain-left", "done", reason="not-sound", detail={"chain": text}))
        self.note(Event("audit.started", "done", detail={"pid": os.getpid()}))
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    @property
    def folder(self) -> Path:
        """Return where it is."""
        return self._folder

    @property
    def chain(self) -> str:
        """Return the name of the chain that this process writes."""
        return self._link.chain

    def note(self, event: Event) -> None:
        """See `Trail.note`."""
        with self._condition:
            if self._closing or len(self._waiting) >= self._terms.queue:
                self._lose(1)
                return
            self._waiting.append(_Waiting(event, self._clock()))
            self._condition.notify()

    async def write(self, event: Event) -> None:
        """See `Trail.write`.

        Raises:
            UnavailableError: It cannot be written.
        """
        done: Future[None] = Future()
        with self._condition:
            if self._closing or len(self._waiting) >= self._terms.queue:
                raise _unwritable()
            self._waiting.append(_Waiting(event, self._clock(), done))
            self._urgent += 1
            self._condition.notify()
        await asyncio.shield(asyncio.wrap_future(done))

    async def ready(self) -> None:
        """See `Trail.ready`; after a failure it tries again.

        Raises:
            UnavailableError: It cannot be written.
        """
        if self._failing:
            await self.write(Event("audit.resumed", "done"))

    def close(self) -> None:
        """Write what waits, a last checkpoint and the head; nothing can be recorded afterwards."""
        self.note(Event("audit.stopped", "done"))
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()
        self._file.close()
        self._lock.close()

    # -- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            group, closing = self._take()
            done = [waiting.done for waiting in group if waiting.done is not None]
            before = self._link
            try:
                if group or self._checkpoint_is_due():
                    self._write_group(group, last=closing)
            except Exception as error:  # a disk that refuses, or a defect: nobody may wait for ever
                self._failed(error, len(group) - len(done) if self._link is before else 0)
                for future in done:
                    future.set_exception(_unwritable())
            else:
                for future in done:
                    future.set_result(None)
            if closing and not group:
                return

    def _take(self) -> tuple[list[_Waiting], bool]:
        with self._condition:
            if not self._waiting and not self._closing:
                self._condition.wait(self._terms.checkpoint_s)
            until = time.monotonic() + LINGER_S
            while not self._urgent and not self._closing and self._waiting and len(self._waiting) < _GROUP:
                if (left_s := until - time.monotonic()) <= 0:
                    break
                self._condition.wait(left_s)
            group = [self._waiting.popleft() for _ in range(min(len(self._waiting), _GROUP))]
            for waiting in group:
                if waiting.done is not None:
                    waiting.done.set_running_or_notify_cancel()
                    self._urgent -= 1
            return group, self._closing

    def _write_group(self, group: list[_Waiting], *, last: bool) -> None:
        self._check_space()
        link, lines, unrecorded = self._link, [], self._unrecorded
        if unrecorded:
            lost = Event("audit.lost", "done", reason="not-writable", detail={"records": unrecorded})
            line, link = link.extend(lost.to_body(), self._clock())
            lines.append(line)
        for waiting in group:
            line, link = link.extend(waiting.event.to_body(), waiting.at)
            lines.append(line)
        checkpoint = self._checkpoint_is_due(len(lines)) or (last and self._since_checkpoint + len(lines) > 0)
        if checkpoint:
            line, link = link.extend(sign_head(link, self._key, self._clock()).to_body(), self._clock())
            lines.append(line)
        self._append(b"".join(line + b"\n" for line in lines))
        self._link, self._failing = link, False
        with self._condition:
            self._unrecorded -= unrecorded
        self.counters.written += len(lines)
        self._since_checkpoint = 0 if checkpoint else self._since_checkpoint + len(lines)
        if checkpoint:
            self._checkpoint_at = time.monotonic()
        self._write_head(sign_head(link, self._key, self._clock()))
        if self._file.tell() >= self._terms.segment_bytes:
            self._rotate()

    def _append(self, data: bytes) -> None:
        end = self._file.tell()
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._file.fileno(), view) :]
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), end)  # makes it shorter, which a full disk allows
            self._file.seek(end)
            raise
        self._file.seek(0, os.SEEK_END)

    def _write_head(self, head: Head) -> None:
        replace_file(self._folder / f"{self._link.chain}.head", head.to_json(), mode=0o600)

    def _checkpoint_is_due(self, more: int = 0) -> bool:
        records = self._since_checkpoint + more
        late = time.monotonic() - self._checkpoint_at >= self._terms.checkpoint_s
        return records >= self._terms.checkpoint_records or (late and records > 0)

    def _check_space(self) -> None:
        if not self._terms.min_free_bytes:
            return
        disk = os.statvfs(self._folder)
        free = disk.f_bavail * disk.f_frsize
        if free < self._terms.min_free_bytes:
            raise OSError(f"expected {self._terms.min_free_bytes} bytes free, got {free}")

    def _rotate(self) -> None:
        full, self._segment = self._file, self._segment + 1
        self._file = self._open()
        full.close()

    def _open(self) -> Any:
        path = self._folder / segment_name(self._link.chain, self._segment)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        file = os.fdopen(descriptor, "r+b", buffering=0)
        file.seek(0, os.SEEK_END)
        sync_folder(self._folder)
        return file

    def _begin(self) -> Tail:
        chain = secrets.token_hex(8)
        lock = lock_chain(self._folder, chain)
        if lock is None:
            raise OSError(f"the new chain {chain} is locked")
        head = sign_head(Link(chain), self._key, self._clock())  # before its first record: a chain has a head
        replace_file(self._folder / f"{chain}.head", head.to_json(), mode=0o600)
        return Tail(Link(chain), 1, lock)

    # -- failing ------------------------------------------------------------------------------------------------

    def _failed(self, error: Exception, notes: int) -> None:
        with self._condition:
            self._lose(notes)
        self.counters.failures += 1
        self._failing = True
        if time.monotonic() - self._complained_at >= _TEXT_AGAIN_S:
            self._complained_at = time.monotonic()
            log.error("audit log not written: administrative calls are refused until it is", error=str(error))

    def _lose(self, records: int) -> None:
        self.counters.lost += records
        self._unrecorded += records


def _unwritable() -> UnavailableError:
    return UnavailableError(
        "the audit log cannot be written, so this was not done",
        hint="the cloud's log says why; a full disk, most likely",
        reason=UNWRITABLE,
    )
