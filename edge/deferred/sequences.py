"""Numbers of requests and results: each larger than all before it, whatever was removed and wherever power was lost.

Numbers are reserved on the disk in blocks before the first of a block is used, so a start that cannot know which of a
block were used skips the rest of it. The store's name changes when the file is lost: sequences then start anew, and
clients must not take them for those that they remember.
"""

from __future__ import annotations

import secrets
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from edge.deferred.disk import Disk
from edge.deferred.entries import TEMPORARY
from edge.deferred.sealing import Sealer
from isthmus.errors import TrustError

FILE: Final = "sequences"
_BLOCK: Final = 1024  # numbers

log = structlog.get_logger(__name__)


class _State(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    store: str
    reserved: int  # numbers below may have been used


class Sequences:
    """The next number.

    Args:
        disk: Holds the file.
        sealer: Seals it.
        highest: The highest number that a file of the store has.
    """

    def __init__(self, disk: Disk, sealer: Sealer, *, highest: int) -> None:
        self._disk = disk
        self._sealer = sealer
        state = self._read()
        self.store = secrets.token_hex(8) if state is None else state.store
        self._reserved = 0 if state is None else state.reserved
        self._next = max(self._reserved, highest + 1)
        if state is None:
            try:
                self._reserve()
            except OSError as error:  # a full disk, for one: `next` tries again
                log.warning("sequences of deferred requests cannot be reserved", error=str(error))

    def next(self) -> int:
        """Return a number that was never used.

        Raises:
            OSError: The disk cannot take a reservation.
        """
        if self._next >= self._reserved:
            self._reserve()
        self._next += 1
        return self._next - 1

    def _reserve(self) -> None:
        state = _State(store=self.store, reserved=self._next + _BLOCK)
        temporary = FILE + TEMPORARY
        self._disk.remove([temporary])
        self._disk.write(temporary, self._sealer.seal(state.model_dump_json().encode(), FILE.encode()))
        self._disk.rename(temporary, FILE)
        self._disk.sync()
        self._reserved = state.reserved

    def _read(self) -> _State | None:
        if FILE not in self._disk.names():
            return None
        try:
            return _State.model_validate_json(self._sealer.open(self._disk.read(FILE), FILE.encode()))
        except (TrustError, ValidationError) as error:
            log.warning("sequences of deferred requests are damaged and start anew", error=str(error))
            self._disk.set_aside(FILE)
            return None
