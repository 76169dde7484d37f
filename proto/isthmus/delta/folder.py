"""Deltas of folders: one container with an entry per file.

    offset  bytes  field
         0      4  magic "ISTF"
         4      1  format version, 1
         5      4  bytes of the packed list, little endian
         9      4  bytes of the list
        13      -  zstd frame, JSON: [{"path", "method", "sha256", "length", "bytes"}, ...]
         -      -  for each `delta` and `full` entry its file delta, `bytes` long, in the order of the list

`method` is `kept` (the old folder's file), `delta` (made from it), `full` or `removed`. A folder is its files: links,
empty folders and permissions are no part of it.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, Literal

import zstandard

from isthmus.delta.codec import apply_delta, make_delta
from isthmus.delta.container import MAX_FILE_BYTES
from isthmus.delta.segments import decompress
from isthmus.digests import check_file, check_sha256, sha256_file
from isthmus.errors import DeltaError, InputError

MAGIC: Final = b"ISTF"
_HEADER: Final = struct.Struct("<4sBII")
_MAX_LIST: Final = 1 << 24
_METHODS: Final = ("kept", "delta", "full", "removed")
Progress = Callable[[int, int], None]  # files done, files


@dataclass(frozen=True, slots=True)
class Entry:
    """What happens to one file."""

    path: str
    method: Literal["kept", "delta", "full", "removed"]
    sha256: str  # of the new file; of the old one where it is removed
    length: int
    bytes: int  # of the file delta; 0 where there is none


def _silent(_: int, __: int) -> None:
    return


def make_folder_delta(old: Path, new: Path, out: Path, progress: Progress = _silent) -> list[Entry]:
    """Write to `out` a delta that turns the files of `old` into those of `new`.

    Raises:
        InputError: A folder holds something that is neither a file nor a folder.
    """
    before, after = _files(old), _files(new)
    entries: list[Entry] = []
    with tempfile.TemporaryDirectory(prefix="isthmus-") as scratch:
        made = Path(scratch) / "delta"
        payload = Path(scratch) / "payload"
        with payload.open("wb") as file:
            for number, path in enumerate(after):
                entries.append(_entry(path, old if path in before else None, new, made))
                if entries[-1].bytes:
                    with made.open("rb") as part:
                        shutil.copyfileobj(part, file)
                progress(number + 1, len(after))
        for path in before:
            if path not in after:
                gone = old / path
                entries.append(Entry(path, "removed", sha256_file(gone), gone.stat().st_size, 0))
        listed = json.dumps([asdict(entry) for entry in entries], separators=(",", ":")).encode()
        packed = zstandard.ZstdCompressor(level=19).compress(listed)
        with out.open("wb") as file, payload.open("rb") as parts:
            file.write(_HEADER.pack(MAGIC, 1, len(packed), len(listed)) + packed)
            shutil.copyfileobj(parts, file)
    return entries


def _files(folder: Path) -> list[str]:
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InputError(f"expected files and folders, got {path}")
        if path.is_file():
            found.append(path.relative_to(folder).as_posix())
    return found


def _entry(path: str, old: Path | None, new: Path, made: Path) -> Entry:
    target = new / path
    digest, length = sha256_file(target), target.stat().st_size
    if old is None:
        return Entry(path, "full", digest, length, make_delta(None, target, made).length)
    if sha256_file(old / path) == digest:
        return Entry(path, "kept", digest, length, 0)
    return Entry(path, "delta", digest, length, make_delta(old / path, target, made).length)


def is_folder_delta(path: Path) -> bool:
    """Return whether a file says that it is the delta of a folder."""
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read_entries(file: BinaryIO) -> list[Entry]:
    """Read the list at the file's position; the first file delta follows.

    Raises:
        DeltaError: It is no folder delta, or its list is malformed.
    """
    header = file.read(_HEADER.size)
    if len(header) != _HEADER.size or header[:5] != MAGIC + b"\x01":
        raise DeltaError("expected a folder delta (magic ISTF, version 1), got something else")
    _, _, packed, length = _HEADER.unpack(header)
    if max(packed, length) > _MAX_LIST:
        raise DeltaError(f"expected a list of up to {_MAX_LIST} bytes")
    data = decompress(file.read(packed), length)
    try:
        if not data.startswith(b"["):
            raise DeltaError("expected a list of files")
        entries = [Entry(**entry) for entry in json.loads(data)]
        for entry in entries:
            _check(entry)
    except (ValueError, TypeError, RecursionError, InputError) as error:
        raise DeltaError("the list of a folder delta is malformed") from error
    if len({entry.path for entry in entries}) != len(entries):
        raise DeltaError("a folder delta names a path twice")
    return entries


def _check(entry: Entry) -> None:
    path = PurePosixPath(check_text(entry.path))
    if path.is_absolute() or ".." in path.parts or not path.parts or str(path) != entry.path:
        raise DeltaError(f"a folder delta names a path outside of the folder: {entry.path[:80]!r}")
    check_sha256(check_text(entry.sha256))
    for size in (entry.length, entry.bytes):
        if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
            raise DeltaError("a folder delta has a length out of bounds")
    if entry.method not in _METHODS or (entry.bytes > 0) != (entry.method in ("delta", "full")):
        raise DeltaError("a folder delta has an unknown method")


def check_text(value: object) -> str:
    """Return a text of the list.

    Raises:
        DeltaError: It is something else, or could end a path early.
    """
    if not isinstance(value, str) or "\0" in value or "\\" in value:
        raise DeltaError("a folder delta has a field of the wrong type")
    return value


def apply_folder_delta(old: Path, delta: Path, out: Path, progress: Progress = _silent) -> list[Entry]:
    """Rebuild into the new folder `out` what `delta` makes of `old`.

    Raises:
        DeltaError: The delta is malformed, or was made from another folder.
        DigestMismatchError: A file is not what the delta says.
        InputError: `out` exists.
    """
    if out.exists():
        raise InputError(f"expected a new folder, {out} exists")
    part = out.with_name(out.name + ".rebuilding")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        with delta.open("rb") as file:
            entries = read_entries(file)
            wanted = [entry for entry in entries if entry.method != "removed"]
            for number, entry in enumerate(wanted):
                _rebuild(entry, old, part, file)
                progress(number + 1, len(wanted))
            if file.read(1):
                raise DeltaError("the folder delta goes on after its last file")
        part.rename(out)
    except (FileExistsError, NotADirectoryError, IsADirectoryError, FileNotFoundError) as error:
        raise DeltaError(f"the folder delta does not fit the old folder ({error.strerror})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return entries


def _rebuild(entry: Entry, old: Path, part: Path, file: BinaryIO) -> None:
    target, base = part / entry.path, old / entry.path
    target.parent.mkdir(parents=True, exist_ok=True)
    if entry.method != "full" and not base.resolve().is_relative_to(old.resolve()):
        raise DeltaError("the old folder leads out of itself", reason="wrong-base")
    if entry.method == "kept":
        if not base.is_file() or base.stat().st_size != entry.length:
            raise DeltaError(f"the old folder has no such {entry.path}", reason="wrong-base")
        shutil.copyfile(base, target)
        check_file(target, sha256=entry.sha256, length=entry.length, what=entry.path)
        return
    with tempfile.NamedTemporaryFile(dir=part, prefix=".delta-") as copy:
        for chunk in _chunks(file, entry.bytes):
            copy.write(chunk)
        copy.flush()
        name = Path(copy.name)
        apply_delta(None if entry.method == "full" else base, name, target, sha256=entry.sha256, length=entry.length)


def _chunks(file: BinaryIO, length: int) -> Iterator[bytes]:
    while length:
        chunk = file.read(min(1 << 20, length))
        if not chunk:
            raise DeltaError("the folder delta ends within a file")
        length -= len(chunk)
        yield chunk
