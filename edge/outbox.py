"""Reports that the cloud has not taken yet, and their numbers; both survive a restart.

One small file, written before a report is sent. Numbers grow for ever: the file reserves a block of them, so that most
reports cost no write of their own. Of each version of a model the newest report is kept, of all of them the newest
few: what became of a version is worth keeping, how far an update was is not.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Final

import structlog
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ConfigDict, ValidationError

from edge.store import write_atomically
from isthmus.v1 import fleet_pb2

_BLOCK: Final = 1000  # numbers
_MOST: Final = 64  # reports

log = structlog.get_logger(__name__)


class _File(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    reserved: int = 0  # numbers below it may have been given
    unsent: tuple[str, ...] = ()  # serialized reports, base64


class Outbox:
    """The reports of one device.

    Args:
        path: The file; None keeps all in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        kept = _read(path)
        self._next = self._reserved = kept.reserved
        self._reports: dict[tuple[str, int], fleet_pb2.ReportRequest] = {}
        for text in kept.unsent:
            try:
                report = fleet_pb2.ReportRequest.FromString(base64.b64decode(text, validate=True))
            except (ValueError, DecodeError):
                continue
            self._reports[report.model, report.version] = report
        self._written = self._final()

    def put(self, report: fleet_pb2.ReportRequest) -> None:
        """Number a report and keep it until it is sent; it replaces one of the same version."""
        self._next += 1
        report.number = self._next
        self._reports.pop((report.model, report.version), None)
        self._reports[report.model, report.version] = report
        while len(self._reports) > _MOST:
            del self._reports[next(iter(self._reports))]

    def waiting(self) -> list[fleet_pb2.ReportRequest]:
        """Return what is to be sent, oldest first."""
        return list(self._reports.values())

    def sent(self, report: fleet_pb2.ReportRequest) -> None:
        """Forget a report that the cloud has, unless a newer one has taken its place."""
        if self._reports.get((report.model, report.version)) is report:
            del self._reports[report.model, report.version]

    def prepare_write(self) -> bytes | None:
        """Return what the file should say from now on, None when it says that already."""
        final = self._final()
        if self._path is None or (final == self._written and self._next < self._reserved):
            return None
        self._written = final
        if self._next >= self._reserved:
            self._reserved = self._next + _BLOCK
        unsent = tuple(base64.b64encode(data).decode() for data in final)
        return _File(reserved=self._reserved, unsent=unsent).model_dump_json().encode() + b"\n"

    def write(self, data: bytes) -> None:
        """Write the file; blocks. A disk that takes no writes costs nothing but the memory of it."""
        if self._path is None:
            return
        try:
            write_atomically(self._path, data)
        except OSError as error:
            log.warning("cannot keep reports", error=str(error))

    def _final(self) -> tuple[bytes, ...]:
        passing = fleet_pb2.UPDATE_STATE_UPDATING
        return tuple(r.SerializeToString() for r in self._reports.values() if r.state != passing)


def _read(path: Path | None) -> _File:
    if path is None:
        return _File()
    try:
        return _File.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return _File()
