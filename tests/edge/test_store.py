"""Slots on disk: whatever instant the power goes, the device boots into a whole version."""

from __future__ import annotations

import asyncio
import errno
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge.model import ServedModels
from edge.outcome import Outcome
from edge.state import Order
from edge.store import SlotStore, check_slot, write_atomically
from isthmus.errors import BundleError, DigestMismatchError, UnavailableError
from tests.edge.registry import Registry, make_updater

VARIANT = "onnxruntime-fp32"


def fill(store: SlotStore, version: int) -> None:
    partial = store.partial(version)
    (partial / "variants").mkdir(exist_ok=True)
    (partial / "variants" / "model").write_bytes(b"model %d" % version)
    (partial / "manifest.json").write_bytes(b"manifest %d" % version)


def install(store: SlotStore, version: int) -> None:
    fill(store, version)
    store.seal(version)
    store.activate(version, VARIANT)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "slots").iterdir())


def test_current_and_previous_are_kept_and_older_ones_go(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    for version in (1, 2, 3):
        install(store, version)
    assert (store.state.current, store.state.previous, store.state.newest) == (3, 2, 3)
    assert names(tmp_path) == ["2", "3"]
    assert SlotStore(tmp_path).state == store.state
    assert (store.slot(3) / "variants" / "model").read_bytes() == b"model 3"


def test_start_removes_what_the_state_does_not_name(tmp_path: Path) -> None:
    install(SlotStore(tmp_path), 1)
    (tmp_path / "state.json.tmp").write_bytes(b"{")
    (tmp_path / "slots" / "7").mkdir()
    for version in (2, 10):
        (tmp_path / "slots" / f".partial-{version}").mkdir()
    SlotStore(tmp_path)
    assert names(tmp_path) == [".partial-10", "1"]
    assert not (tmp_path / "state.json.tmp").exists()


def test_refused_version_is_remembered_and_removed(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    install(store, 1)
    fill(store, 2)
    store.refuse(2, "golden-mismatch")
    assert names(tmp_path) == ["1"]
    assert SlotStore(tmp_path).state.failed == {2: "golden-mismatch"}
    install(store, 2)
    assert store.state.failed == {}


def test_memory_of_refusals_is_bounded(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    for version in range(1, 40):
        store.refuse(version, "digest-mismatch")
    assert sorted(store.state.failed) == list(range(24, 40))


def test_falling_back_makes_the_previous_version_current(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    install(store, 1)
    install(store, 2)
    store.fall_back("slot-broken")
    assert (store.state.current, store.state.previous, store.state.newest) == (1, 0, 2)
    assert names(tmp_path) == ["1"]
    store.fall_back("slot-broken")
    assert (store.state.current, names(tmp_path)) == (0, [])


@pytest.mark.parametrize("content", [b"", b"{", b'{"current": "x"}', b"\x00" * 64])
def test_broken_state_file_is_an_empty_device(tmp_path: Path, content: bytes) -> None:
    install(SlotStore(tmp_path), 1)
    (tmp_path / "state.json").write_bytes(content)
    assert SlotStore(tmp_path).state.current == 0


def test_unknown_fields_of_a_newer_agent_are_ignored(tmp_path: Path) -> None:
    SlotStore(tmp_path)
    (tmp_path / "state.json").write_bytes(b'{"current": 0, "later": [1]}')
    assert SlotStore(tmp_path).state.current == 0


def test_write_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    path.with_name("file.tmp").write_bytes(b"left over")
    write_atomically(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


class PowerCuts:
    """Copies the device's folder before everything that the process does to it."""

    WRITES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree", "shutil.copyfile")
    active: PowerCuts | None = None

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies = folder, copies
        self.count = 0
        self._copying = False

    def take(self) -> None:
        if self._copying:
            return
        self._copying = True
        try:
            shutil.copytree(self.folder, self.copies / f"{self.count:04d}")
            self.count += 1
        finally:
            self._copying = False


def _audit(event: str, arguments: tuple[Any, ...], kind: type[PowerCuts] = PowerCuts) -> None:
    cuts = kind.active  # not by the name of the class: that may be gone when Python ends
    if cuts is None or event not in kind.WRITES or cuts._copying:
        return
    if (
        event == "open"
        and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
        and not (
            arguments[1] is None and arguments[2] & 0o3  # os.open for writing
        )
    ):
        return
    if any(isinstance(argument, str | Path) and str(cuts.folder) in str(argument) for argument in arguments):
        cuts.take()


@contextmanager
def power_cuts(folder: Path, copies: Path) -> Iterator[PowerCuts]:
    if not getattr(sys, "_isthmus_power_cuts", False):  # an audit hook cannot be removed: one for all tests
        sys.addaudithook(_audit)
        sys._isthmus_power_cuts = True  # type: ignore[attr-defined]
    copies.mkdir()
    PowerCuts.active = PowerCuts(folder, copies)
    try:
        yield PowerCuts.active
    finally:
        PowerCuts.active = None


@pytest.mark.slow
def test_power_cut_before_any_write_of_an_update_boots_into_a_whole_version(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry", versions=(1, 2, 3))
    home, copies = tmp_path / "device", tmp_path / "copies"

    async def update_under_power_cuts() -> int:
        models = ServedModels(("triage",))
        updater = make_updater(home, registry, models)
        await updater.update(Order(version=1))
        await updater.update(Order(version=2))
        with power_cuts(home, copies) as cuts:
            await updater.update(Order(version=3))  # keeps files, applies deltas, drops version 1
        models.swap("triage", None)
        return cuts.count

    async def boot(copy: Path) -> tuple[int, Outcome]:
        models = ServedModels(("triage",))
        updater = make_updater(copy, registry, models)
        await updater.start()
        booted = models.version("triage")
        live = models.find("triage")
        check_slot(SlotStore(copy).slot(booted), live.variant.id)
        outcome = await updater.update(Order(version=3))
        models.swap("triage", None)
        return booted, outcome

    count = asyncio.run(update_under_power_cuts())
    assert count > 20
    seen = set()
    for copy in sorted(copies.iterdir()):
        booted, outcome = asyncio.run(boot(copy))
        seen.add(booted)
        assert outcome.active, outcome.detail
        assert names(copy) in (["2", "3"], ["3"])
    assert seen == {2, 3}


def test_check_slot_finds_every_kind_of_damage(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry", versions=(1,))
    slot = registry.folder(1)
    assert check_slot(slot, VARIANT).version == 1
    with pytest.raises(BundleError, match="no variant"):
        check_slot(slot, "nothere")
    model = slot / "variants" / VARIANT / "model.onnx"
    content = model.read_bytes()
    model.write_bytes(content[:-1] + b"x")
    with pytest.raises(DigestMismatchError, match="SHA-256"):
        check_slot(slot, VARIANT)
    model.write_bytes(content[:-1])
    with pytest.raises(DigestMismatchError, match="bytes"):
        check_slot(slot, VARIANT)
    model.unlink()
    with pytest.raises(BundleError):
        check_slot(slot, VARIANT)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_file_that_the_system_refuses_to_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    registry = Registry(tmp_path / "registry", versions=(1,))

    def refuse(path: Path, **kwargs: Any) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr("edge.store.check_file", refuse)
    with pytest.raises(UnavailableError):
        check_slot(registry.folder(1), VARIANT)
