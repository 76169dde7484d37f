"""The variants of a first version, measured where they will run; what goes wrong costs the measurement and no more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edge.audition import Audition, Measure
from edge.bench import Choice, Timing, hardware, measure_variants, read_choice, write_choice
from edge.bootstrap import _choose
from edge.conditions import PostponedError
from edge.config import EdgeSettings, UpdateSettings
from edge.identity import DeviceHome
from edge.model import ServedModels
from edge.state import Order
from edge.trial import Terms
from edge.updater import Updater
from isthmus.bundle import Manifest, open_bundle
from isthmus.errors import UnavailableError
from isthmus.settings import load_settings
from tests.edge import bundles
from tests.edge.registry import Registry, make_updater

MODEL, FIRST, SECOND = "triage", "onnxruntime-fp32", "openvino-fp32"
INSTALL = load_settings(EdgeSettings, None, {"choose_by": "install"}).value


@dataclass
class Stopwatch:
    """Ranks the second variant first, whatever the load of this machine; the variants are really there."""

    measured: list[list[str]] = field(default_factory=list)

    def __call__(self, folder: Path) -> tuple[Manifest, list[Timing]]:
        manifest, timings = measure_variants(folder, rounds=1)
        here = {timing.variant: timing for timing in timings if timing.latency_ms is not None}
        self.measured.append(sorted(here))
        return manifest, [here[name] for name in (SECOND, FIRST) if name in here]


@dataclass
class Device:
    home: Path
    registry: Registry
    models: ServedModels
    updater: Updater

    async def install(self, version: int) -> str:
        outcome = await self.updater.update(Order(version=version))
        assert outcome.active, outcome
        assert [path.name for path in (self.slot(version) / "variants").iterdir()] == [outcome.variant]
        return outcome.variant

    def slot(self, version: int) -> Path:
        return self.home / "models" / "slots" / str(version)

    @property
    def choice(self) -> Choice | None:
        return read_choice(self.home, MODEL)


def with_device(
    tmp_path: Path, scenario: Callable[[Device], Awaitable[None]], measure: Measure = measure_variants, **parts: Any
) -> None:
    async def run() -> None:
        home = tmp_path / "device"
        home.mkdir()
        registry, models = Registry(tmp_path / "registry", (1, 2)), ServedModels((MODEL,))
        updater = make_updater(
            home / "models",
            registry,
            models,
            choose=partial(_choose, INSTALL, DeviceHome(home)),
            audition=Audition(home, MODEL, measure=measure),
            **parts,
        )
        try:
            await scenario(Device(home, registry, models, updater))
        finally:
            models.swap(MODEL, None)

    asyncio.run(run())


def test_the_variant_that_was_fastest_here_stays(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        variant = await device.install(1)
        choice = device.choice
        assert choice is not None
        assert (choice.variant, choice.version, choice.hardware) == (variant, 1, hardware())
        assert choice.latency_ms is not None
        assert choice.latency_ms > 0

    with_device(tmp_path, scenario, partial(measure_variants, rounds=2))


def test_it_is_measured_once_and_later_versions_bring_one_variant(tmp_path: Path) -> None:
    stopwatch = Stopwatch()

    async def scenario(device: Device) -> None:
        assert await device.install(1) == SECOND
        assert await device.install(2) == SECOND
        assert stopwatch.measured == [[FIRST, SECOND]]

    with_device(tmp_path, scenario, stopwatch)


def test_a_variant_that_cannot_be_brought_takes_no_part(tmp_path: Path) -> None:
    stopwatch = Stopwatch()

    async def scenario(device: Device) -> None:
        manifest = open_bundle(device.registry.folder(1))
        (lost,) = [entry for path, entry in manifest.files.items() if path.endswith(f"{SECOND}/model.bin")]
        del device.registry._blobs[lost.sha256]
        assert await device.install(1) == FIRST
        assert stopwatch.measured == []
        assert device.choice is None  # one variant alone is no comparison
        assert await device.install(2) == SECOND
        assert stopwatch.measured == [[FIRST, SECOND]]

    with_device(tmp_path, scenario, stopwatch)


def test_a_measurement_that_killed_the_process_is_not_repeated(tmp_path: Path) -> None:
    class KilledError(BaseException):
        pass

    measured: list[Path] = []

    def kill(folder: Path) -> Any:
        measured.append(folder)
        raise KilledError

    async def scenario(device: Device) -> None:
        with pytest.raises(KilledError):
            await device.updater.update(Order(version=1))
        assert await device.install(1) == FIRST
        assert await device.install(2) == FIRST
        assert len(measured) == 1
        assert device.choice == Choice(variant=FIRST, version=1, hardware=hardware())

    with_device(tmp_path, scenario, kill)


def test_bytes_that_cost_money_and_a_full_disk_are_reasons_not_to_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopwatch = Stopwatch()

    async def metered(device: Device) -> None:
        assert await device.install(1) == FIRST

    async def narrow(device: Device) -> None:
        free = iter([1 << 30, 1 << 10])  # before the update, and before what else is wanted
        monkeypatch.setattr(device.updater._store, "free_bytes", lambda: next(free))
        assert await device.install(1) == FIRST

    for name, scenario in (("metered", metered), ("narrow", narrow)):
        (tmp_path / name).mkdir()
        settings = UpdateSettings(trial=Terms(), metered=name == "metered", metered_max_bytes=1 << 30)
        with_device(tmp_path / name, scenario, stopwatch, settings=settings)
    assert stopwatch.measured == []


def test_nothing_is_measured_outside_the_maintenance_window(tmp_path: Path) -> None:
    stopwatch = Stopwatch()
    now = datetime(2026, 1, 1, 12, 0)  # noqa: DTZ001 - windows are local time

    async def scenario(device: Device) -> None:
        with pytest.raises(PostponedError, match="maintenance window"):
            await device.updater.update(Order(version=1))
        assert stopwatch.measured == []

    with_device(
        tmp_path, scenario, stopwatch, settings=UpdateSettings(trial=Terms(), window="01:00-05:00"), now=lambda: now
    )


def test_other_hardware_and_other_variants_are_reasons_to_measure_again(tmp_path: Path) -> None:
    bundles.build_bundle(tmp_path / "bundle")
    manifest = open_bundle(tmp_path / "bundle")
    audition = Audition(tmp_path, MODEL)

    def others() -> list[str]:
        return [variant.id for variant in audition.others(manifest, manifest.variants[0])]

    assert others() == [SECOND]
    write_choice(tmp_path, MODEL, Choice(variant=FIRST, latency_ms=1.0, version=1, hardware=hardware()))
    assert others() == []
    write_choice(tmp_path, MODEL, Choice(variant=FIRST, latency_ms=1.0, version=1, hardware="another machine"))
    assert others() == [SECOND]
    write_choice(tmp_path, MODEL, Choice(variant="gone", latency_ms=1.0, version=1, hardware=hardware()))
    assert others() == [SECOND]
    only_first = Audition(tmp_path, MODEL, installed=lambda runtime: runtime == "onnxruntime")
    assert only_first.others(manifest, manifest.variants[0]) == []


def test_a_link_that_breaks_postpones_and_what_came_is_not_brought_again(tmp_path: Path) -> None:
    stopwatch = Stopwatch()

    async def scenario(device: Device) -> None:
        late = device.registry.entry(1, f"variants/{SECOND}/model.xml")

        def break_off(data: bytes) -> bytes:
            raise UnavailableError("connection lost")

        device.registry.tamper[late.sha256] = break_off
        with pytest.raises(UnavailableError):
            await device.updater.update(Order(version=1))
        came = device.registry.calls.count("blob")
        del device.registry.tamper[late.sha256]
        assert await device.install(1) == SECOND
        files = list(open_bundle(device.registry.folder(1)).files_below("variants/"))
        assert device.registry.calls.count("blob") - came < len(files)
        assert stopwatch.measured == [[FIRST, SECOND]]

    with_device(tmp_path, scenario, stopwatch)
