"""Prepares the deltas of a new bundle version, in a process of its own.

Coding takes seconds to minutes of computing; the gateway's requests must not wait behind it. Each delta is applied
once, and kept only when it gives the right bytes and is smaller than the file itself. Without one a device fetches
the file.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog

from cloud.blobs import Blobs, Deltas
from isthmus.bundle import Manifest
from isthmus.delta import apply_delta, make_delta
from isthmus.errors import DeltaError, DigestMismatchError

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedDelta:
    """A delta that devices can fetch."""

    path: str
    from_version: int
    delta_bytes: int
    full_bytes: int


@dataclass(frozen=True, slots=True)
class _Pair:
    path: str
    from_version: int
    old: str  # digests
    new: str
    length: int  # of the new file
    old_layout: str | None  # digest of the description that belongs to the weights
    new_layout: str | None


@dataclass(frozen=True, slots=True)
class _Job:
    old: Path
    new: Path
    old_layout: Path | None
    new_layout: Path | None
    out: Path
    sha256: str
    length: int


async def prepare_deltas(blobs: Blobs, deltas: Deltas, new: Manifest, bases: Iterable[Manifest]) -> list[PreparedDelta]:
    """Make the deltas from the files of `bases` to the changed files of `new`; those that exist are kept."""
    pairs = [pair for base in bases for pair in _changed_files(base, new)]
    todo = [pair for pair in pairs if not await asyncio.to_thread(deltas.has, pair.old, pair.new)]
    if todo:
        await _make(blobs, deltas, todo)
    return await asyncio.to_thread(
        lambda: [
            PreparedDelta(pair.path, pair.from_version, deltas.length(pair.old, pair.new), pair.length)
            for pair in pairs
            if deltas.has(pair.old, pair.new)
        ]
    )


async def _make(blobs: Blobs, deltas: Deltas, pairs: Sequence[_Pair]) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-")))
        jobs = [
            _Job(
                stack.enter_context(blobs.as_path(pair.old)),
                stack.enter_context(blobs.as_path(pair.new)),
                stack.enter_context(blobs.as_path(pair.old_layout)) if pair.old_layout else None,
                stack.enter_context(blobs.as_path(pair.new_layout)) if pair.new_layout else None,
                folder / str(number),
                pair.new,
                pair.length,
            )
            for number, pair in enumerate(pairs)
        ]
        process = multiprocessing.get_context("spawn").Process(target=_work, args=(jobs,), daemon=True)
        process.start()
        try:
            await asyncio.to_thread(process.join)
        finally:
            process.kill()  # when this publish is cancelled nobody wants the rest
        if process.exitcode:
            log.error("the process that makes deltas died; devices fetch whole files", exit_code=process.exitcode)
        for pair, job in zip(pairs, jobs, strict=True):
            if job.out.is_file():
                await asyncio.to_thread(deltas.store, pair.old, pair.new, job.out)
            else:
                log.info("no delta for this file", path=pair.path, from_version=pair.from_version)


def _changed_files(old: Manifest, new: Manifest) -> Iterable[_Pair]:
    changed = {
        path: (old.files[path].sha256, entry)
        for variant in new.variants
        for path, entry in new.device_files(variant.id).items()
        if path in old.files and old.files[path].sha256 != entry.sha256
    }
    for path, (base, entry) in changed.items():
        layouts = _layout(old, path), _layout(new, path)
        yield _Pair(path, old.version, base, entry.sha256, entry.length, *layouts)


def _layout(manifest: Manifest, path: str) -> str | None:
    """Return the digest of the OpenVINO description beside a weight file."""
    xml = manifest.files.get(path.removesuffix(".bin") + ".xml") if path.endswith(".bin") else None
    return xml.sha256 if xml else None


def _work(jobs: Sequence[_Job]) -> None:
    """Leave a checked delta in `out` of each job that is worth it; runs in a process of its own."""
    os.nice(10)
    for job in jobs:
        made, rebuilt = job.out.with_suffix(".made"), job.out.with_suffix(".rebuilt")
        try:
            length = make_delta(job.old, job.new, made, old_layout=job.old_layout, new_layout=job.new_layout).length
            apply_delta(job.old, made, rebuilt, sha256=job.sha256, length=job.length)
        except (DeltaError, DigestMismatchError):
            continue
        rebuilt.unlink()
        if length < job.length:
            made.replace(job.out)
