"""Brings the files of a version into its partial slot, each by the cheapest way that works.

For each file, in order: what an earlier attempt left; the same file of an installed slot (a hard link); a delta from
the installed file of that name; the whole blob. A file gets its own name only after its bytes have the right digest.
A delta that is none costs its bytes, not the update: the whole blob is always there to be had.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import structlog

from edge.plan import FilePlan
from isthmus.bundle import FileEntry
from isthmus.delta import apply_apart
from isthmus.digests import check_file
from isthmus.errors import DeltaError, DigestMismatchError, NotFoundError

Method = Literal["kept", "delta", "full"]

log = structlog.get_logger(__name__)


class Fetcher(Protocol):
    """The registry (edge.fetcher.RegistryFetcher)."""

    async def blob(self, sha256: str, path: Path, *, length: int) -> int:
        """Fetch a blob to `path`, after what is there; return the bytes that moved."""
        ...

    async def delta(self, from_sha256: str, to_sha256: str, path: Path, *, limit: int) -> int:
        """Fetch a delta to `path`, after what is there; return the bytes that moved."""
        ...


@dataclass(frozen=True, slots=True)
class FileResult:
    """How one file came."""

    path: str
    method: Method
    bytes_fetched: int
    bytes_full: int


async def bring_file(fetcher: Fetcher, plan: FilePlan, *, base: Path, partial: Path) -> FileResult:
    """Bring one file.

    Args:
        fetcher: The registry.
        plan: What is wanted.
        base: Slot that holds the plan's installed file.
        partial: Folder of the partial slot.

    Raises:
        DigestMismatchError: What the registry sends is not the file that was signed for.
        NotFoundError: The registry does not have the file.
        UnavailableError: The registry cannot be reached; what came is kept for the next attempt.
    """
    target = partial / plan.path
    target.parent.mkdir(parents=True, exist_ok=True)
    full = plan.wanted.length
    if await asyncio.to_thread(_holds, target, plan.wanted):
        return FileResult(plan.path, "full", 0, full)
    if plan.base == plan.wanted and await asyncio.to_thread(_keep, base / plan.path, target, plan.wanted):
        return FileResult(plan.path, "kept", 0, full)
    spent = 0
    if plan.base is not None and plan.base != plan.wanted:
        rebuilt, spent = await _rebuild(fetcher, plan, plan.base, base / plan.path, target)
        if rebuilt:
            return FileResult(plan.path, "delta", spent, full)
    return FileResult(plan.path, "full", spent + await _download(fetcher, plan, target), full)


async def _rebuild(fetcher: Fetcher, plan: FilePlan, old: FileEntry, base: Path, target: Path) -> tuple[bool, int]:
    delta = target.with_name(f"{target.name}.delta-{old.sha256[:12]}")
    wanted, moved = plan.wanted, 0
    try:
        moved = await fetcher.delta(old.sha256, wanted.sha256, delta, limit=wanted.length)
        await apply_apart(base, delta, target, sha256=wanted.sha256, length=wanted.length)
    except NotFoundError:
        rebuilt = False
    except (DeltaError, DigestMismatchError, OSError) as error:  # a base that cannot be read is not needed either
        log.warning("delta not used", path=plan.path, error=str(error))
        rebuilt = False
    else:
        rebuilt = True
    delta.unlink(missing_ok=True)
    return rebuilt, moved


async def _download(fetcher: Fetcher, plan: FilePlan, target: Path) -> int:
    part = target.with_name(target.name + ".part")
    wanted, moved = plan.wanted, 0
    while True:
        resumed = part.exists()
        try:
            moved += await fetcher.blob(wanted.sha256, part, length=wanted.length)
            await asyncio.to_thread(_check, part, wanted, plan.path)
        except DigestMismatchError:
            part.unlink(missing_ok=True)
            if resumed:  # a power cut may have spoilt what was there: not the registry's fault yet
                continue
            raise
        part.replace(target)
        return moved


def _check(path: Path, wanted: FileEntry, what: str) -> None:
    check_file(path, sha256=wanted.sha256, length=wanted.length, what=what)


def _holds(path: Path, wanted: FileEntry) -> bool:
    if not path.is_file():
        return False
    try:
        _check(path, wanted, path.name)
    except DigestMismatchError:
        path.unlink()
        return False
    return True


def _keep(installed: Path, target: Path, wanted: FileEntry) -> bool:
    try:
        try:
            os.link(installed, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(installed, target)
        return _holds(target, wanted)
    except OSError as error:  # an installed file that cannot be read is fetched again
        log.warning("installed file not kept", path=target.name, error=str(error))
        target.unlink(missing_ok=True)
        return False
