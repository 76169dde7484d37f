"""Devices that start from different versions all come to the newest, each by the cheapest way that there is for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edge.outcome import Outcome
from edge.state import Order
from isthmus.errors import UnavailableError
from tests.edge import bundles
from tests.edge.registry import Registry
from tests.edge.test_soak import Device

NEWEST = 7
NINETY_DAYS_S = 90 * 86_400.0


@pytest.mark.slow
def test_devices_from_anywhere_converge_by_the_cheapest_path(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry", ())
    for version in range(1, NEWEST + 1):  # weights of some size, so that a delta pays
        registry.publish(version, lambda folder, number: bundles.build_bundle(folder, number, fault="slow"))

    async def converge(name: str, start: int | None) -> Outcome:
        device = Device(tmp_path / name, registry)
        device.x = bundles.SURE
        if start is not None:
            assert (await device.updater.update(Order(version=start))).active
        if name == "offline":
            registry.fail["delta"] = UnavailableError("the link is gone")
            with pytest.raises(UnavailableError):
                await device.updater.update(Order(version=NEWEST - 1))
            del registry.fail["delta"]
            await device.updater.probation.stop()
            device.models.swap("triage", None)
            device.time.seconds += NINETY_DAYS_S
            device.boot()
            await device.updater.start()
        outcome = await device.updater.update(Order(version=NEWEST))
        assert await device.right(NEWEST)
        assert (device.state.current, device.state.newest) == (NEWEST, NEWEST)
        await device.updater.probation.stop()
        device.models.swap("triage", None)
        return outcome

    async def scenario() -> None:
        starts = {"fresh": None, "one behind": NEWEST - 1, "five behind": NEWEST - 5, "offline": NEWEST - 3}
        found = {name: await converge(name, start) for name, start in starts.items()}
        moved = {name: outcome.bytes_fetched for name, outcome in found.items()}
        full = found["fresh"].bytes_full
        assert moved["fresh"] == full
        model = "variants/onnxruntime-fp32/model.onnx"
        for name in ("one behind", "five behind", "offline"):
            methods = {file.path: file.method for file in found[name].files}
            assert methods[model] == "delta"
            assert moved[name] < full / 100
        print({"full": full, **moved})  # noqa: T201 - figures for whoever runs it with -s

    asyncio.run(scenario())
