"""What was counted and is not in the database yet, on the disk: a gateway that is killed loses nothing of it.

A journal is a folder with one folder for each run of a gateway, and in it numbered segments. Each count is one write to
the end of the newest segment, before the answer leaves: what the kernel has taken, SIGKILL does not take back. (A power
cut may, for as long as segments live: until the next commit to the database.) A segment ends when its counts are handed
to the database; it is removed once they are there. The database remembers the last segment of each run that it has
taken in the same transaction as the counts, so a segment is taken once, whenever the gateway is killed.

Form of a segment: entries of a kind (1 byte), a CRC-32 of kind and content (4) and a length (2), little-endian, then
    K  number (4), then a JSON list: the key that this number stands for from here on
    C  number (4), outcome (1), bytes in, bytes out, calls, microseconds of the calls (8 each): one request
Reading stops at the first entry that is not whole.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import structlog

_HEAD: Final = struct.Struct("<cIH")
_NUMBER: Final = struct.Struct("<I")

log = structlog.get_logger(__name__)


class Key(NamedTuple):
    """What counts are kept by; `hour` is the Unix time at which it began."""

    hour: int
    tenant: str
    device: str
    model: str
    version: int


@dataclass(slots=True)
class Counts:
    """What became of requests. Each has one outcome; see `cloud.metering` for what they mean."""

    answered: int = 0
    cached: int = 0
    refused: int = 0
    limited: int = 0
    failed: int = 0
    cancelled: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    calls: int = 0
    call_us: int = 0

    @property
    def requests(self) -> int:
        """Return the number of requests."""
        return self.answered + self.cached + self.refused + self.limited + self.failed + self.cancelled

    def add(self, other: Counts) -> None:
        """Add other counts to these."""
        self.answered += other.answered
        self.cached += other.cached
        self.refused += other.refused
        self.limited += other.limited
        self.failed += other.failed
        self.cancelled += other.cancelled
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.calls += other.calls
        self.call_us += other.call_us

    def count(self, outcome: int, bytes_in: int, bytes_out: int, calls: int, call_us: int) -> None:
        """Add one request; `outcome` is the place of its outcome in OUTCOMES."""
        name = OUTCOMES[outcome]
        setattr(self, name, getattr(self, name) + 1)
        self.bytes_in += bytes_in
        self.bytes_out += bytes_out
        self.calls += calls
        self.call_us += call_us


OUTCOMES: Final = ("answered", "cached", "refused", "limited", "failed", "cancelled")
_COUNT: Final = struct.Struct("<IB4Q")
Usage = dict[Key, Counts]


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the journal of one run that is on its way to the database."""

    run: str
    number: int
    path: Path

    def remove(self) -> None:
        """Remove it: the database has its counts."""
        self.path.unlink(missing_ok=True)


class Journal:
    """The journal of this run.

    Args:
        folder: Where journals are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run = uuid.uuid4().hex
        self._number = 0
        self._file = -1
        self._keys: dict[Key, int] = {}
        self.errors = 0  # counts that could not be written; they are in memory until the next commit

    def open(self) -> None:
        """Begin the first segment.

        Raises:
            OSError: The folder cannot be written to.
        """
        (self._folder / self._run).mkdir(parents=True, mode=0o700)
        self._begin()

    def _begin(self) -> None:
        path = self._path(self._number + 1)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._number += 1
        self._keys.clear()

    def _path(self, number: int) -> Path:
        return self._folder / self._run / f"{number:012d}"

    def write(self, key: Key, outcome: int, bytes_in: int, bytes_out: int, calls: int, call_us: int) -> None:
        """Add one request, as Counts.count does."""
        number = self._keys.get(key)
        data = b""
        if number is None:
            number = self._keys[key] = len(self._keys)
            data = _entry(b"K", _NUMBER.pack(number) + json.dumps(key).encode())
        data += _entry(b"C", _COUNT.pack(number, outcome, bytes_in, bytes_out, calls, call_us))
        try:
            if os.write(self._file, data) == len(data):
                return
        except OSError as error:
            if not self.errors:
                log.exception("usage cannot be written to the disk: a kill would lose it", error=error.errno)
        self.errors += 1
        self._file = self._without(self._file)

    def _without(self, file: int) -> int:
        """After a write that went wrong, what follows it in the file could not be read: no more of it."""
        if file >= 0:
            os.close(file)
        return -1

    def rotate(self) -> Segment:
        """End the newest segment and begin another; return the one that ended.

        Raises:
            OSError: No other one can be begun; the newest goes on.
        """
        ended, file = Segment(self._run, self._number, self._path(self._number)), self._file
        self._begin()
        self._without(file)
        return ended

    def close(self) -> None:
        """Remove the newest segment, which must hold nothing, and the run's folder once it is empty."""
        self._file = self._without(self._file)
        self._path(self._number).unlink(missing_ok=True)
        _remove_if_empty(self._folder / self._run)

    def left_over(self) -> Iterator[tuple[Segment, Usage]]:
        """Yield the segments that earlier runs left, with their counts, oldest first in each run."""
        if not self._folder.is_dir():
            return
        for run in sorted(self._folder.iterdir()):
            if run.name == self._run:
                continue
            for path in sorted(path for path in run.iterdir() if path.name.isdecimal()):
                yield Segment(run.name, int(path.name), path), read_segment(path.read_bytes())
            shutil.rmtree(run, ignore_errors=True)


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def _entry(kind: bytes, content: bytes) -> bytes:
    return _HEAD.pack(kind, zlib.crc32(kind + content), len(content)) + content


def read_segment(data: bytes) -> Usage:
    """Return the counts of a segment, up to the first entry that is not whole."""
    usage: Usage = {}
    keys: dict[int, Key] = {}
    place = 0
    while place + _HEAD.size <= len(data):
        kind, crc, length = _HEAD.unpack_from(data, place)
        content = data[place + _HEAD.size : place + _HEAD.size + length]
        if len(content) < length or zlib.crc32(kind + content) != crc:
            break
        if kind == b"K":
            keys[_NUMBER.unpack_from(content)[0]] = Key(*json.loads(content[_NUMBER.size :]))
        else:
            number, *count = _COUNT.unpack(content)
            usage.setdefault(keys[number], Counts()).count(*count)
        place += _HEAD.size + length
    return usage
