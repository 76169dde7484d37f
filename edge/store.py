"""Installed versions of one model on the device's disk, safe against power cuts.

    state.json                     edge.state: which version serves, the one before it, the step of an update
    slots/<version>/               manifest.json and the variant's files; complete, never changed
    slots/.partial-<version>/      a version that is being fetched

The rules: a slot appears by one rename, after every byte in it is on the disk; state.json changes by one rename,
after the slot that it names is on the disk; a slot disappears only when state.json no longer names it. So at any
instant the state names whole slots. The slot before the current one stays until the next version is activated: it is
what the device goes back to. At start everything that the state does not name is removed, except the newest
partial slot, whose fetch can go on.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from edge.state import Became, Last, Progress, State, Step
from isthmus.bundle import MANIFEST, Manifest, parse_manifest
from isthmus.digests import check_file
from isthmus.errors import BundleError, UnavailableError

# What says nothing about the file: rights, and limits of this process or machine.
_NO_VERDICT: Final = frozenset({errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_PARTIAL: Final = ".partial-"
_FAILURES: Final = 16  # versions that are remembered
_VERSION: Final = re.compile(r"[1-9][0-9]{0,15}")


class SlotStore:
    """The slots of one model.

    Args:
        folder: DEVICE/models/<model>; made when it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writing = threading.RLock()  # an update and a trial may both have something to note
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

    def has(self, version: int) -> bool:
        """Return whether a version's whole slot is here."""
        return self.slot(version).is_dir()

    def free_bytes(self) -> int:
        """Return what may still be written to this disk."""
        found = os.statvfs(self._slots)
        return found.f_bavail * found.f_frsize

    def partial_bytes(self, version: int) -> int:
        """Return what is here of a version that is being fetched."""
        folder = self._slots / f"{_PARTIAL}{version}"
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

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

    def enter(self, progress: Progress) -> None:
        """Remember the step that begins now."""
        self._write(progress=progress)

    def activate(self, version: int, variant: str, progress: Progress | None = None, last: Last | None = None) -> None:
        """Make an installed version the one that serves; the one before it is kept, older ones go.

        Args:
            version: Has a whole slot.
            variant: The installed one.
            progress: Of its trial; None keeps it for good at once.
            last: What became of the update.
        """
        with self._writing:
            state = self.state
            before, variant_before = state.current, state.variant
            if version == state.current:
                before, variant_before = state.previous, state.previous_variant
            kept = State(
                current=version,
                previous=before,
                newest=state.newest if progress is not None else max(version, state.newest),
                variant=variant,
                previous_variant=variant_before,
                failed={number: reason for number, reason in state.failed.items() if number != version},
                attempts={number: attempt for number, attempt in state.attempts.items() if number != version},
                progress=progress,
                last=last or state.last,
                proven=False,
            )
            self._write_state(kept)
            self._clean()

    def commit(self, last: Last) -> None:
        """Keep the version that serves for good; the one before it stays as the last good one."""
        self._write(newest=max(self.state.current, self.state.newest), progress=None, last=last)

    def roll_back(self, last: Last) -> None:
        """Give up the version that serves: the previous one becomes current."""
        state = self.state
        self._go_back(last, **_failed(state, state.current, last.reason, last.attempt))

    def _go_back(self, last: Last, **changes: object) -> None:
        state = self.state
        self._write(
            current=state.previous,
            variant=state.previous_variant or state.variant,
            previous=0,
            previous_variant="",
            progress=None,
            last=last,
            proven=True,
            crashes=0,
            **changes,
        )
        self._clean()

    def leave(self, last: Last | None = None) -> None:
        """Nothing is under way any more; what was fetched stays."""
        self._write(progress=None, last=last or self.state.last)

    def refuse(self, version: int, reason: str, last: Last | None = None) -> None:
        """Remember that a version was refused, and remove it."""
        told = last or self.state.last
        attempt = 0 if last is None else last.attempt
        self._write(progress=None, last=told, **_failed(self.state, version, reason, attempt))
        self.drop_partial(version)
        self._clean()

    def fall_back(self, reason: str) -> None:
        """Give up the current version, which cannot be opened: the previous one, if any, becomes current.

        A disk may have spoilt it: the version may be brought again.
        """
        last = Last(version=self.state.current, became=Became.ROLLED_BACK, reason=reason)
        self._go_back(last)

    def begin_run(self) -> int:
        """Note that the agent starts; return how often in a row it has died with the version that serves."""
        state = self.state
        if state.stopped:
            progress = None if state.progress is None else state.progress.model_copy(update={"crashes": 0})
            self._write(stopped=False, crashes=0, progress=progress)
        elif not state.proven and state.current and not _died_with_another(state):
            self._write(crashes=state.crashes + 1)
        return self.state.crashes

    def end_run(self) -> None:
        """Note that the agent ends in an orderly way."""
        if self._unsafe():
            self._write(stopped=True)

    def prove(self, version: int) -> None:
        """Note that a version does not kill the process, if it serves still."""
        with self._writing:
            if not self.state.proven and self.state.current == version:
                self._write(proven=True, crashes=0)

    def _unsafe(self) -> bool:
        return not self.state.proven or self.state.progress is not None

    def _write(self, **changes: object) -> None:
        with self._writing:
            self._write_state(self.state.model_copy(update=changes))

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
        with self._writing:
            for path in self._folder.glob("*.tmp"):
                path.unlink()
            coming = 0 if self.state.progress is None else self.state.progress.order.version
            kept = {str(version) for version in (self.state.current, self.state.previous, coming) if version}
            partials = sorted(self._slots.glob(f"{_PARTIAL}*"), key=_partial_version)
            for path in self._slots.iterdir():
                if path.name not in kept and path not in partials[-1:]:
                    shutil.rmtree(path)


def _partial_version(path: Path) -> int:
    version = path.name.removeprefix(_PARTIAL)
    return int(version) if _VERSION.fullmatch(version) else 0


def _died_with_another(state: State) -> bool:
    """Return whether the process died while it tried a version that does not serve: that is counted there."""
    return state.progress is not None and state.progress.step in (Step.SELF_TEST, Step.SHADOW)


def _failed(state: State, version: int, reason: str, attempt: int) -> dict[str, object]:
    """Return the memory of failures with one more, the newest versions of it."""
    failed = dict(sorted((dict(state.failed) | {version: reason}).items())[-_FAILURES:])
    known = dict(state.attempts) | {version: attempt}
    return {"failed": failed, "attempts": {number: known[number] for number in failed if known.get(number)}}


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
