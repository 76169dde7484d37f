"""Which requests were answered late and acknowledged: a client's late retry of one is not computed again.

One file of records that only grows until it is written anew: 16 bytes that stand for the request (a keyed digest, so
the file tells no ids), 8 bytes for the time until which it is remembered, 8 bytes of check. A record that a power cut
tore fails its check; the file is written anew at every start, so nothing is ever appended to a torn one.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

import structlog

from edge.deferred.disk import Disk
from edge.deferred.entries import TEMPORARY
from edge.deferred.sealing import Sealer

FILE: Final = "settled"
_RECORD: Final = struct.Struct(">16sQ8s")

log = structlog.get_logger(__name__)


class Settled:
    """The requests that are done.

    Args:
        disk: Holds the file.
        sealer: Makes the digests.
        limit: Most requests that are remembered; the oldest are forgotten first.
        now_ms: Wall clock.
    """

    def __init__(self, disk: Disk, sealer: Sealer, *, limit: int, now_ms: int) -> None:
        self._disk = disk
        self._sealer = sealer
        self._limit = limit
        data = disk.read(FILE) if FILE in disk.names() else b""
        self._until = {tag: until for tag, until in self._parse(data) if until > now_ms}
        self._records = 0  # in the file
        self._torn = True  # what is in the file may end within a record
        try:
            self._rewrite(now_ms)
        except OSError as error:  # a full disk, for one: the next `add` tries again
            log.warning("memory of acknowledged requests cannot be written", error=str(error))

    def __len__(self) -> int:
        return len(self._until)

    def __contains__(self, key: str) -> bool:
        return self._sealer.tag(key.encode()) in self._until

    def add(self, until_ms: Mapping[str, int], *, now_ms: int) -> None:
        """Remember requests; they are on the disk when this returns.

        Raises:
            OSError: The disk cannot take them; none is remembered.
        """
        added = {self._sealer.tag(key.encode()): until for key, until in until_ms.items()}
        if self._torn or self._records > 2 * self._limit:
            self._rewrite(now_ms)
        self._torn = True
        self._disk.append(FILE, b"".join(self._record(tag, until) for tag, until in added.items()))
        self._torn = False
        self._records += len(added)
        for tag, until in added.items():
            self._until.pop(tag, None)  # to the end: the newest is forgotten last
            self._until[tag] = until
        for tag in list(self._until)[: max(0, len(self._until) - self._limit)]:
            del self._until[tag]

    def _parse(self, data: bytes) -> list[tuple[bytes, int]]:
        whole = len(data) // _RECORD.size * _RECORD.size
        records = [(tag, until) for tag, until, _ in _RECORD.iter_unpack(data[:whole])]
        checks = [check for _, _, check in _RECORD.iter_unpack(data[:whole])]
        return [record for record, check in zip(records, checks, strict=True) if self._check(*record) == check]

    def _rewrite(self, now_ms: int) -> None:
        self._until = {tag: until for tag, until in self._until.items() if until > now_ms}
        temporary = FILE + TEMPORARY
        self._disk.remove([temporary])
        self._disk.write(temporary, b"".join(self._record(tag, until) for tag, until in self._until.items()))
        self._disk.rename(temporary, FILE)
        self._disk.sync()
        self._records = len(self._until)
        self._torn = False

    def _record(self, tag: bytes, until_ms: int) -> bytes:
        return _RECORD.pack(tag, until_ms, self._check(tag, until_ms))

    def _check(self, tag: bytes, until_ms: int) -> bytes:
        return self._sealer.tag(tag + until_ms.to_bytes(8, "big"))[:8]
