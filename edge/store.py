"""Installed versions of one model on the device's disk, safe against power cuts.

    state.json                     which version serves, the one before it, and those that were refused
    slots/<version>/               manifest.json and the variant's files; complete, never changed
    slots/.partial-<version>/      a version that is being fetched

The rules: a slot appears by one rename, after every byte in it is on the disk; state.json changes by one rename,
after the slot that it names is on the disk; a slot disappears only when state.json no longer names it. So at any
instant the state names whole slots. At start everything that the state does not name is removed, except the newest
partial slot, whose fetch can go on.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from isthmus.bundle import MANIFEST, Manifest, parse_manifest
from isthmus.digests import check_file
from isthmus.errors import BundleError, UnavailableError

# What says nothing about the file: rights, and limits of this process or machine.
_NO_VERDICT: Final = frozenset({errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_PARTIAL: Final = ".partial-"
_VERSION: Final = re.compile(r"[1-9][0-9]{0,15}")


class State(BaseModel):
    """What state.json says."""

    model_config = ConfigDict(extra="ignore", frozen=True)  # a newer agent may have written more

    current: int = 0
    previous: int = 0
    newest: int = 0  # the highest version that ever served
    variant: str = ""
    failed: dict[int, str] = {}


class SlotStore:
    """The slots of one model.

    Args:
        folder: DEVICE/models/<model>; made when it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._slots = folder / "slots"
        self._slots.mkdir(parents=True, exist_ok=True)
        self.state = self._read_state()
        self._clean()

    def slot(self, version: int) -> Path:
        """Return the folder of an installed version."""
        return self._slots / str(version)

    def partial(self, version: int) -> Path:
        """Return the folder to fetch a version into; partial slots of other versions are dropped."""
        wanted = self._slots / f"{_PARTIAL}{version}"
        for folder in self._slots.glob(f"{_PARTIAL}*"):
            if folder != wanted:
                shutil.rmtree(folder)
        wanted.mkdir(exist_ok=True)
        return wanted

    def drop_partial(self, version: int) -> None:
        """Remove what was fetched of a version."""
        shutil.rmtree(self._slots / f"{_PARTIAL}{version}", ignore_errors=True)

    def seal(self, version: int) -> Path:
        """Turn a partial slot into an installed one; it does not serve yet."""
        partial, slot = self._slots / f"{_PARTIAL}{version}", self.slot(version)
        for path in sorted(partial.rglob("*")):
            _sync(path)
        _sync(partial)
        if slot.exists():  # what a version left that was refused, or that this start could not open
            shutil.rmtree(slot)
        partial.replace(slot)
        _sync(self._slots)
        return slot

    def activate(self, version: int, variant: str) -> None:
        """Make an installed version the one that serves; the one before it is kept, older ones go."""
        before = self.state.previous if version == self.state.current else self.state.current
        failed = {number: reason for number, reason in self.state.failed.items() if number != version}
        newest = max(version, self.state.newest)
        self._write_state(State(current=version, previous=before, newest=newest, variant=variant, failed=failed))
        self._clean()

    def refuse(self, version: int, reason: str) -> None:
        """Remember that a version was refused, and remove it."""
        failed = dict(self.state.failed) | {version: reason}
        newest = dict(sorted(failed.items())[-16:])
        self._write_state(self.state.model_copy(update={"failed": newest}))
        self.drop_partial(version)
        self._clean()

    def fall_back(self, reason: str) -> None:
        """Give up the current version: the previous one, if any, becomes current."""
        failed = dict(self.state.failed) | {self.state.current: reason}
        self._write_state(
            self.state.model_copy(update={"current": self.state.previous, "previous": 0, "failed": failed})
        )
        self._clean()

    def _read_state(self) -> State:
        path = self._folder / "state.json"
        try:
            return State.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return State()
        except ValidationError:
            # It is written atomically, so this is a broken disk: start without, and fetch again.
            return State()

    def _write_state(self, state: State) -> None:
        write_atomically(self._folder / "state.json", state.model_dump_json(indent=2).encode() + b"\n")
        self.state = state

    def _clean(self) -> None:
        for path in self._folder.glob("*.tmp"):
            path.unlink()
        kept = {str(version) for version in (self.state.current, self.state.previous) if version}
        partials = sorted(self._slots.glob(f"{_PARTIAL}*"), key=_partial_version)
        for path in self._slots.iterdir():
            if path.name not in kept and path not in partials[-1:]:
                shutil.rmtree(path)


def _partial_version(path: Path) -> int:
    version = path.name.removeprefix(_PARTIAL)
    return int(version) if _VERSION.fullmatch(version) else 0


def check_slot(slot: Path, variant: str) -> Manifest:
    """Return the slot's manifest after checking the variant's files against it.

    Raises:
        BundleError: The manifest is missing or malformed, or there is no such variant in it.
        DigestMismatchError: A file is not the one that the manifest names.
        UnavailableError: The system refuses to read a file that is there.
    """
    try:
        manifest = parse_manifest((slot / MANIFEST).read_bytes())
        for name, entry in manifest.device_files(variant).items():
            check_file(slot / name, sha256=entry.sha256, length=entry.length, what=name)
    except OSError as error:
        if error.errno in _NO_VERDICT:
            raise UnavailableError(f"slot {slot.name}: {error}", reason="disk") from error
        raise BundleError(f"slot {slot.name}: {error}", reason="slot-broken") from error
    return manifest


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace the file at `path`: after a power cut it holds either the old bytes or the new ones."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
