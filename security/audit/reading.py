"""The chains in a folder: their files in order, and the search for records. Nothing here trusts what it reads.

CHAIN-000001.jsonl CHAIN-000002.jsonl ...  records; a new file when one is large enough
CHAIN.head                                 signed statement about the newest record
CHAIN.lock                                 held by the process that writes the chain
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from isthmus.errors import NotFoundError
from security.audit.records import EVENT, MAX_LINE, moment

_SEGMENT: Final = re.compile(r"([0-9a-f]{16})-([0-9]{6})\.jsonl")
_HEAD: Final = re.compile(r"([0-9a-f]{16})\.head")


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of a chain."""

    chain: str
    number: int
    path: Path


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a segment, without its end."""

    file: str
    number: int  # from 1
    data: bytes
    whole: bool  # whether it has its end
    offset: int


def segment_name(chain: str, number: int) -> str:
    """Return the name of a chain's file."""
    return f"{chain}-{number:06d}.jsonl"


def chains_of(folder: Path) -> dict[str, list[Segment]]:
    """Return the segments of each chain, in order; a chain of which only the head is left has none.

    Raises:
        NotFoundError: There is no such folder.
    """
    if not folder.is_dir():
        raise NotFoundError(f"there is no audit log in {folder}", hint="isthmus cloud serve writes HOME/state/audit")
    chains: dict[str, list[Segment]] = {}
    for path in sorted(folder.iterdir()):
        if match := _SEGMENT.fullmatch(path.name):
            chains.setdefault(match[1], []).append(Segment(match[1], int(match[2]), path))
        elif match := _HEAD.fullmatch(path.name):
            chains.setdefault(match[1], [])
    return dict(sorted(chains.items()))


def read_lines(segment: Segment) -> Iterator[Line]:
    """Yield a segment's lines; one that is too long comes in pieces, each of which is malformed."""
    offset = 0
    with segment.path.open("rb") as file:
        number = 0
        while data := file.readline(MAX_LINE + 2):
            number += 1
            whole = data.endswith(b"\n")
            yield Line(segment.path.name, number, data[:-1] if whole else data, whole, offset)
            offset += len(data)


@dataclass(frozen=True, slots=True)
class Query:
    """What records are looked for; an empty field asks for nothing."""

    action: str = ""  # part of it
    subject: str = ""
    tenant: str | None = None  # "" asks for records that are nobody's
    decision: str = ""
    reason: str = ""
    model: str = ""
    version: int = 0
    device: str = ""
    rollout: str = ""
    request_id: str = ""
    since: datetime | None = None
    until: datetime | None = None

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether a record is one of those."""
        for field in fields(self):
            wanted = getattr(self, field.name)
            if field.name in ("action", "tenant", "since", "until") or not wanted:
                continue
            if record.get(field.name) != wanted:
                return False
        at = str(record.get("at", ""))
        return (
            self.action.lower() in str(record.get("action", "")).lower()
            and (self.tenant is None or record.get("tenant", "") == self.tenant)
            and (self.since is None or at >= moment(self.since))
            and (self.until is None or at < moment(self.until))
        )


def search(folder: Path, query: Query, *, all_kinds: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the matching records of all chains by time; lines that are none are left to `verify`.

    Args:
        folder: The log.
        query: What is looked for.
        all_kinds: Also checkpoints and what the log says of itself.

    Raises:
        NotFoundError: There is no such folder.
    """
    streams = [_records(segments) for segments in chains_of(folder).values()]
    for record in heapq.merge(*streams, key=lambda record: str(record.get("at", ""))):
        if (all_kinds or record.get("kind") == EVENT) and query.matches(record):
            yield record


def _records(segments: list[Segment]) -> Iterator[dict[str, Any]]:
    for segment in segments:
        for line in read_lines(segment):
            try:
                record = json.loads(line.data) if line.whole else None
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record
