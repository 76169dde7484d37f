"""A signed model that is bad is refused on the device, and the operator reads the reason in the cloud."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge.state import Became
from isthmus.bundle import Ceilings
from tests.cloud.workspaces import make_workspace, serving
from tests.e2e.devices import CloudDevice, servable
from tests.e2e.test_convergence import Site
from tests.edge import bundles
from tests.edge.test_faults import golden_nan

pytestmark = pytest.mark.slow

VARIANT = "onnxruntime-fp32"
Build = Callable[[Path, int], object]


def made_with(**changes: Any) -> Build:
    return lambda folder, version: bundles.build_bundle(folder, version, **changes)


def shows_its_fault(fault: str) -> Build:
    return lambda folder, version: made_with(fault=fault, golden=golden_nan(version))(folder, version)


def of_another_runtime(folder: Path, version: int) -> None:
    bundles.build_bundle(folder, version)
    (folder / "variants" / VARIANT / "model.onnx").write_bytes(
        (folder / "variants" / "openvino-fp32" / "model.xml").read_bytes()
    )


def with_another_record(folder: Path, version: int) -> None:
    record = bundles.calibration(version).model_copy(update={"output": "scores"})
    bundles.build_bundle(folder, version, record=record)


BAD = (
    (shows_its_fault("nan"), "golden-not-finite"),
    (shows_its_fault("wrong"), "golden-mismatch"),
    (made_with(fault="slow", ceilings=Ceilings(latency_ms=0.2)), "too-slow"),
    (made_with(fault="large", ceilings=Ceilings(memory_bytes=5_000_000)), "too-large"),
    (of_another_runtime, "cannot-open"),
    (with_another_record, "calibration-mismatch"),
)


def test_the_reason_of_each_bad_model_is_shown_by_the_cloud(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")

    async def story() -> None:
        async with serving(workspace, delta_bases=0, used_bases=0) as cloud:
            site = Site(tmp_path, workspace, cloud)

            async def publish(version: int, build: Build) -> None:
                build(tmp_path / str(version), version)
                await site.ask("publish", servable(tmp_path / str(version)), workspace.operator)

            await publish(1, bundles.build_bundle)
            device = CloudDevice(tmp_path / "camera-1", variant=VARIANT)
            code = str((await site.ask("invite", "camera-1"))["code"])
            await device.enrol(cloud.address, code, workspace.trust)
            async with device.online():
                assert (await device.follow(1)).active
                for version, (build, reason) in enumerate(BAD, 2):
                    await publish(version, build)
                    outcome = await device.follow(version)
                    assert (outcome.became, outcome.reason) == (Became.REFUSED, reason)
                    assert (await device.answer(bundles.SURE))[0] == 1
                    shown = await site.until_shown("camera-1", version, "refused")
                    assert (shown["reason"], shown["detail"], shown["serving"]) == (reason, outcome.detail, 1)
            history = (await site.ask("device", "camera-1"))["history"]
            told = {row["model"]: row["reason"] for row in history if row["what"] == "refused"}
            assert told == {f"triage@{version}": reason for version, (_, reason) in enumerate(BAD, 2)}

    asyncio.run(story())
