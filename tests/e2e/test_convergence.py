"""Devices that start from anywhere converge on the target by the cheapest path: real cloud, registry, deltas, TUF."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud.bootstrap import Cloud
from edge.outcome import Outcome
from security.repository import CloudRepository
from tests.cloud.conftest import eventually
from tests.cloud.workspaces import Workspace, make_workspace, serving
from tests.e2e.devices import GRAPH, WEIGHTS, CloudDevice, fine_tuned_bundle, right_logits
from tests.edge.bundles import SURE

pytestmark = pytest.mark.slow

TARGET = 6
NINETY_DAYS = timedelta(days=90)


class Site:
    """A cloud with an operator, and what its clock shows to devices."""

    def __init__(self, folder: Path, workspace: Workspace, cloud: Cloud) -> None:
        self.folder, self.workspace, self.cloud = folder, workspace, cloud
        self.passed = timedelta(0)

    def now(self) -> datetime:
        return datetime.now(UTC) + self.passed

    async def ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        def work() -> Any:
            with self.workspace.client(self.cloud) as client:
                return getattr(client, method)(*arguments, **named)

        return await asyncio.to_thread(work)

    async def publish(self, version: int) -> dict[str, Any]:
        bundle = fine_tuned_bundle(self.folder / f"bundle-{version}", version)
        return dict(await self.ask("publish", bundle, self.workspace.operator))

    async def enrol(self, name: str) -> CloudDevice:
        device = CloudDevice(self.folder / name, self.now)
        code = str((await self.ask("invite", name))["code"])
        await device.enrol(self.cloud.address, code, self.workspace.trust)
        return device

    async def leave_at(self, name: str, version: int) -> CloudDevice:
        """A device that took a version, said so, and has been away since."""
        device = await self.enrol(name)
        async with device.online():
            assert (await device.follow(version)).active
            await self.until_shown(name, version, "active")
        return device

    async def until_shown(self, name: str, version: int, state: str) -> dict[str, Any]:
        """Wait until `isthmus device show` tells that a version is in a state on a device; return what it tells."""
        shown: dict[str, Any] = {}

        async def is_known() -> bool:
            shown.update((await self.ask("device", name))["models"][0])
            return bool((shown["version"], shown["state"]) == (version, state))

        await eventually(is_known, f"the cloud knows that version {version} is {state} on {name}")
        return shown


def test_devices_from_anywhere_converge_by_the_cheapest_path(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")

    async def story() -> None:
        async with serving(workspace, delta_bases=1) as cloud:
            site = Site(tmp_path, workspace, cloud)
            devices: dict[str, CloudDevice] = {}
            stays = {1: "five-behind", 3: "offline", 5: "one-behind"}
            for version in range(1, TARGET + 1):
                record = await site.publish(version)
                if version in stays:
                    devices[stays[version]] = await site.leave_at(stays[version], version)
            # From the version before, and from those that devices run.
            prepared = {row["from_version"]: row for row in record["deltas"] if row["file"] == WEIGHTS}
            assert set(prepared) == {1, 3, 5}

            site.passed = NINETY_DAYS
            async with devices["offline"].online():
                outcome = await devices["offline"].follow(TARGET)
                assert (outcome.active, outcome.final, outcome.reason) == (False, False, "freeze")
            again = CloudRepository(workspace.home, clock=site.now)  # what the cloud does by itself in ninety days
            assert again.refresh_if_due(site.now())
            devices["fresh"] = await site.enrol("fresh")
            found = {name: await converged(site, name, device) for name, device in devices.items()}
            check_paths(found, {version: row["delta_bytes"] for version, row in prepared.items()})

    asyncio.run(story())


async def converged(site: Site, name: str, device: CloudDevice) -> Outcome:
    async with device.online():
        outcome = await device.follow(TARGET)
        assert outcome.active, outcome
        version, logits = await device.answer(SURE)
        assert version == TARGET
        assert np.allclose(logits, right_logits(TARGET, SURE), atol=1e-4)
        assert (await site.until_shown(name, TARGET, "active"))["serving"] == TARGET
    return outcome


def check_paths(found: dict[str, Outcome], deltas: dict[int, int]) -> None:
    full = found["fresh"].bytes_full
    assert found["fresh"].bytes_fetched == full
    assert {file.method for file in found["fresh"].files} == {"full"}
    for name, version in (("one-behind", 5), ("offline", 3), ("five-behind", 1)):
        files = {file.path: file for file in found[name].files}
        assert (files[WEIGHTS].method, files[WEIGHTS].bytes_fetched) == ("delta", deltas[version])
        assert (files[GRAPH].method, files[GRAPH].bytes_fetched) == ("kept", 0)
        assert all(file.bytes_fetched <= file.bytes_full for file in files.values())
        assert found[name].bytes_fetched < 0.8 * full
        assert found[name].bytes_full == full
    print({"full": full} | {name: outcome.bytes_fetched for name, outcome in found.items()})  # noqa: T201 - for -s
