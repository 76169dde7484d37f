"""The end of a chain that a process takes over: checked, and mended where a crash broke it off.

The writer puts records on the disk first and the signed head after them, so the head never speaks of what is not there.
What a crash leaves is therefore a chain that is sound up to the head at least, and perhaps half a record behind it:
that rest is cut off, and its size and hash are recorded. Anything else is no crash. Such a chain is left as it is, for
`verify` to name what is wrong with it, and the process begins another one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import structlog
from cryptography.hazmat.primitives.asymmetric import ed25519

from isthmus.errors import InputError, TrustError
from security.audit.reading import Segment, chains_of, read_lines
from security.audit.records import GENESIS, Event, Link, Value, check_head, parse_head, parse_line

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Tail:
    """Where to go on."""

    link: Link
    segment: int  # number of the newest file
    lock: BinaryIO
    mended: Event | None = None


def adopt(folder: Path, keys: Mapping[str, ed25519.Ed25519PublicKey]) -> tuple[Tail | None, list[str]]:
    """Take over a chain that no process writes.

    Returns:
        Its end, None where there is none to go on with; and what is wrong with chains that were left alone.

    Raises:
        OSError: The disk refuses.
    """
    wrong: list[str] = []
    for chain, segments in chains_of(folder).items():
        lock = lock_chain(folder, chain)
        if lock is None:
            continue
        try:
            return _open_end(folder, chain, segments, keys, lock), wrong
        except TrustError as error:
            lock.close()
            log.critical("audit chain left as it is; isthmus audit verify says more", chain=chain, error=error.message)
            wrong.append(f"{chain}: {error.message}")
    return None, wrong


def lock_chain(folder: Path, chain: str) -> BinaryIO | None:
    """Return the held lock of a chain, None when another process holds it."""
    descriptor = os.open(folder / f"{chain}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    file = os.fdopen(descriptor, "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _open_end(
    folder: Path,
    chain: str,
    segments: list[Segment],
    keys: Mapping[str, ed25519.Ed25519PublicKey],
    lock: BinaryIO,
) -> Tail:
    try:
        head = parse_head((folder / f"{chain}.head").read_bytes())
    except FileNotFoundError as error:
        raise TrustError("its head is gone", reason="truncated") from error
    check_head(head, keys)
    if not segments and head.chain == chain and head.seq < 0:  # a crash as soon as it was begun
        return Tail(head.link, 1, lock)
    if not segments:
        raise TrustError("its files are gone", reason="truncated")
    link, cut = _follow(chain, segments)
    if head.chain != chain or head.seq > link.seq:
        raise TrustError(f"its head is record {head.seq}, its last one {link.seq}", reason="truncated")
    mended = None if cut is None else _cut(segments[-1], cut)
    return Tail(link, segments[-1].number, lock, mended)


def _follow(chain: str, segments: list[Segment]) -> tuple[Link, int | None]:
    """Return the end of the sound part of the newest file, and from where on its bytes are no records."""
    link = _before(chain, segments)
    for line in read_lines(segments[-1]):
        try:
            record = parse_line(line.data) if line.whole else None
        except InputError:
            record = None
        if record is None or record["chain"] != chain or (record["seq"], record["prev"]) != (link.seq + 1, link.hash):
            return link, line.offset
        link = Link(chain, record["seq"], record["hash"])
    return link, None


def _before(chain: str, segments: list[Segment]) -> Link:
    """Return the link that the newest file continues: the last record of the file before it."""
    if len(segments) == 1:
        return Link(chain, -1, GENESIS)
    last = None
    for line in read_lines(segments[-2]):
        last = line
    try:
        record = parse_line(last.data if last is not None else b"")
    except InputError as error:
        raise TrustError("a file before its newest does not end with a record", reason="edited") from error
    return Link(chain, record["seq"], record["hash"])


def _cut(segment: Segment, offset: int) -> Event:
    with segment.path.open("r+b") as file:
        file.seek(offset)
        rest = file.read()
        file.truncate(offset)
        os.fsync(file.fileno())
    log.warning("audit log mended: it broke off in a record", file=segment.path.name, bytes=len(rest))
    detail: dict[str, Value] = {
        "file": segment.path.name,
        "bytes": len(rest),
        "sha256": hashlib.sha256(rest).hexdigest(),
    }
    return Event("audit.mended", "done", reason="broken-off", detail=detail)
