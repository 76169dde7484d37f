"""What was built before, by what it was built from: nothing is built twice.

A key is the SHA-256 of everything that an artefact depends on: digests of the source and data, the options, versions of
the tools, and this compiler's own code. An entry is a folder; it appears at once or not at all, and `seal.json` in it
has the digest of every file, so that a damaged entry is a miss and never a bundle.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from isthmus.digests import sha256_bytes, sha256_file, tree_digest

SEAL: Final = "seal.json"
LIMIT_BYTES: Final = 20 << 30
_UNFINISHED: Final = ".new-"
_ABANDONED_S: Final = 86_400.0  # no build takes so long
_KEEP_S: Final = 3600.0  # an entry that was used within the last hour stays, whatever the size


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder of entries.

    Args:
        folder: Made when it is missing.
        limit: Bytes; the entries that were not used for longest go first.
    """

    folder: Path
    limit: int = LIMIT_BYTES

    def find(self, stage: str, key: str) -> Path | None:
        """Return the entry's folder, or None when there is none that is whole."""
        entry = self._entry(stage, key)
        try:
            seal = json.loads((entry / SEAL).read_bytes())
            whole = seal == _seal(entry)
        except (OSError, ValueError):
            return None
        if not whole:
            shutil.rmtree(entry, ignore_errors=True)
            return None
        os.utime(entry / SEAL)
        return entry

    def get(self, stage: str, key: str, make: Callable[[Path], None]) -> Path:
        """Return the entry's folder; `make` fills an empty one when there is none yet."""
        found = self.find(stage, key)
        if found is not None:
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=_UNFINISHED) as scratch:
            work = Path(scratch) / "entry"
            work.mkdir()
            make(work)
            return self._keep(stage, key, work)

    def _keep(self, stage: str, key: str, work: Path) -> Path:
        (work / SEAL).write_text(json.dumps(_seal(work)))
        found = self.find(stage, key)  # another compilation was faster, and may be reading it
        if found is not None:
            return found
        entry = self._entry(stage, key)
        shutil.rmtree(entry, ignore_errors=True)
        work.rename(entry)
        return entry

    def _entry(self, stage: str, key: str) -> Path:
        return self.folder / f"{stage}-{key[:40]}"

    def prune(self, now: float) -> None:
        """Remove what killed compilations left, and the entries unused for longest until the rest fits the limit."""
        for left in self.folder.glob(f"{_UNFINISHED}*"):
            if now - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
        entries = [path for path in self.folder.iterdir() if (path / SEAL).is_file()]
        used = {entry: (entry / SEAL).stat().st_mtime for entry in entries}
        sizes = {entry: sum(file.stat().st_size for file in entry.rglob("*") if file.is_file()) for entry in entries}
        total = sum(sizes.values())
        for entry in sorted(entries, key=used.__getitem__):
            if total <= self.limit or now - used[entry] < _KEEP_S:
                return
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]


def _seal(entry: Path) -> dict[str, str]:
    files = sorted(path for path in entry.rglob("*") if path.is_file() and path != entry / SEAL)
    return {path.relative_to(entry).as_posix(): sha256_file(path) for path in files}


def key(**parts: object) -> str:
    """Return the key for these parts; anything that JSON can hold, paths as strings."""
    return sha256_bytes(json.dumps(parts, sort_keys=True, default=str).encode())


def tool_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the version of each installed distribution, "absent" for others."""
    return {name: _version(name) for name in sorted(set(names))}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Return the digest of this compiler's own code: with other code, an artefact may be another."""
    root = Path(__file__).parent
    return tree_digest({path.relative_to(root).as_posix(): sha256_file(path) for path in sorted(root.rglob("*.py"))})
