"""Disks, links and registries that fail, and signed models that are bad: each ends on a whole version that answers."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge.store
from edge.state import Became, Order
from isthmus.bundle import Ceilings, index_files, parse_manifest
from isthmus.delta import make_delta
from isthmus.errors import NotFoundError, UnavailableError
from tests.edge import bundles
from tests.edge.test_soak import Device, spoil, with_device

pytestmark = pytest.mark.slow
MODEL_FILE = "variants/onnxruntime-fp32/model.onnx"
TENTHS = range(1, 10)


async def refused(device: Device, version: int, reason: str) -> None:
    outcome = await device.updater.update(Order(version=version))
    assert (outcome.became, outcome.reason) == (Became.REFUSED, reason)
    assert outcome.detail
    assert device.reports[-1] is outcome
    assert await device.right(1)
    assert sorted(path.name for path in (device.folder / "slots").iterdir()) == ["1"]
    await device.updater.probation.stop()
    device.boot()
    await device.updater.start()
    assert await device.right(1)


def cut(tenth: int) -> Callable[[bytes], bytes]:
    return lambda data: data[: len(data) * tenth // 10]


def flip(tenth: int) -> Callable[[bytes], bytes]:
    def flipped(data: bytes) -> bytes:
        at = len(data) * tenth // 10
        return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]

    return flipped


def reorder(tenth: int) -> Callable[[bytes], bytes]:
    def reordered(data: bytes) -> bytes:
        at = len(data) * tenth // 10
        return data[at:] + data[:at]

    return reordered


@pytest.mark.parametrize("spoilt", [cut, flip, reorder])
def test_a_blob_that_is_spoilt_at_any_tenth_is_refused(tmp_path: Path, spoilt: Callable[[int], Any]) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        device.registry.fail["delta"] = NotFoundError("no delta")
        for tenth in TENTHS:
            device.registry.tamper[device.registry.entry(2, MODEL_FILE).sha256] = spoilt(tenth)
            await refused(device, 2, "digest-mismatch")

    with_device(tmp_path, scenario)


@pytest.mark.parametrize("spoilt", [cut, flip, reorder])
def test_a_delta_that_is_spoilt_at_any_tenth_costs_its_bytes_and_no_more(
    tmp_path: Path, spoilt: Callable[[int], Any]
) -> None:
    async def scenario(device: Device) -> None:
        device.registry.floors[2] = 1
        await device.serve(1)
        for tenth in TENTHS:
            device.registry.tamper["delta"] = spoilt(tenth)
            assert (await device.updater.update(Order(version=2))).active
            assert await device.right(2)
            assert (await device.updater.update(Order(version=1))).active

    with_device(tmp_path, scenario)


def always(data: bytes) -> Callable[[bytes], bytes]:
    return lambda right: data


def test_a_delta_from_another_base_or_for_another_model_is_not_used(tmp_path: Path) -> None:
    def delta_between(old: bytes, new: bytes) -> bytes:
        for name, data in (("old", old), ("new", new)):
            (tmp_path / name).write_bytes(data)
        make_delta(tmp_path / "old", tmp_path / "new", tmp_path / "made")
        return (tmp_path / "made").read_bytes()

    async def scenario(device: Device) -> None:
        device.registry.publish(9)
        first, second, ninth = [(device.registry.folder(v) / MODEL_FILE).read_bytes() for v in (1, 2, 9)]
        await device.serve(1)
        device.registry.floors[2] = 1
        for wrong in (delta_between(ninth, second), delta_between(first, ninth), delta_between(b"", ninth * 9)):
            device.registry.tamper["delta"] = always(wrong)
            assert (await device.updater.update(Order(version=2))).active
            assert await device.right(2)
            assert (await device.updater.update(Order(version=1))).active

    with_device(tmp_path, scenario)


def golden_nan(version: int) -> dict[str, Any]:
    """Golden inputs that show the fault "nan"."""
    tensors = bundles.golden_tensors(version)
    tensors["input.x"][0, 0] = 7.0
    logits = tensors["input.x"] @ bundles.weights(version)
    for variant in bundles.VARIANTS:
        tensors[f"output.{variant}.logits"] = logits
        tensors[f"output.{variant}.label"] = logits.argmax(axis=1).astype(np.int64)
    return tensors


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fault": "nan", "golden": golden_nan(3)}, "golden-not-finite"),
        ({"fault": "wrong", "golden": golden_nan(3)}, "golden-mismatch"),
        ({"fault": "slow", "ceilings": Ceilings(latency_ms=0.2)}, "too-slow"),
        ({"fault": "large", "ceilings": Ceilings(memory_bytes=5_000_000)}, "too-large"),
        ({"record": bundles.calibration(2)}, "calibration-mismatch"),
    ],
)
def test_a_signed_but_bad_model_is_refused_with_its_own_reason(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        device.registry.fail["delta"] = NotFoundError("no delta")
        spoil(device, 3, **{"fault": "", **changes})
        await refused(device, 3, reason)

    with_device(tmp_path, scenario)


def test_a_model_of_another_runtime_is_refused(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        folder = device.registry.folder(3)
        manifest = bundles.build_bundle(folder, 3)
        (folder / MODEL_FILE).write_bytes((folder / "variants/openvino-fp32/model.xml").read_bytes())
        (folder / "manifest.json").unlink()
        signed = manifest.model_copy(update={"files": index_files(folder)})
        (folder / "manifest.json").write_bytes(signed.to_json())
        device.registry.index(3)
        await refused(device, 3, "cannot-open")
        foreign = tuple(v.model_copy(update={"runtime": "elsewhere"}) for v in signed.variants)
        data = parse_manifest(signed.model_copy(update={"version": 4, "variants": foreign}).to_json()).to_json()
        device.registry.folder(4).mkdir()
        (device.registry.folder(4) / "manifest.json").write_bytes(data)
        outcome = await device.updater.update(Order(version=4))
        assert (outcome.became, outcome.reason) == (Became.REFUSED, "calibration-mismatch")

    with_device(tmp_path, scenario)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_any_write_postpones_the_update_and_serves_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Every write of state and manifest fails in turn; the next attempt finds all in order."""
    write, left = edge.store.write_atomically, -1

    def failing(*args: Any, **kwargs: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(number, os.strerror(number))
        write(*args, **kwargs)

    for module in ("edge.store", "edge.updater"):
        monkeypatch.setattr(f"{module}.write_atomically", failing)

    async def scenario(device: Device) -> None:
        nonlocal left
        device.registry.floors[2] = 1
        await device.serve(1)
        failures = 0
        for nth in range(1, 30):
            left = nth
            wanted = 2 if await device.right(1) else 1
            reason = ""
            try:
                outcome = await device.updater.update(Order(version=wanted))
            except UnavailableError as error:
                reason = error.reason
            if reason:
                failures += 1
                assert reason == ("no-space" if number == errno.ENOSPC else "disk")
                assert await device.right(3 - wanted)
                left = -1
                device.models.swap("triage", None)
                device.boot()
                await device.updater.start()
                assert await device.right(3 - wanted)
                outcome = await device.updater.update(Order(version=wanted))
            assert outcome.active
            assert await device.right(wanted)
            if left > 0:
                break
        assert failures >= 5

    with_device(tmp_path, scenario)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_in_the_middle_of_a_file_postpones_the_update(tmp_path: Path, number: int) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        device.registry.fail["delta"] = NotFoundError("no delta")
        append = device.registry._append

        def failing(path: Path, data: bytes) -> int:
            append(path, data[: len(data) // 2])
            raise OSError(number, os.strerror(number))

        device.registry._append = failing  # type: ignore[method-assign]
        with pytest.raises(UnavailableError) as postponed:
            await device.updater.update(Order(version=2))
        assert postponed.value.reason == ("no-space" if number == errno.ENOSPC else "disk")
        assert await device.right(1)
        device.registry._append = append  # type: ignore[method-assign]
        outcome = await device.updater.update(Order(version=2))
        assert outcome.active
        assert await device.right(2)

    with_device(tmp_path, scenario)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 128 KiB; where it cannot be mounted, its folder with what `statvfs` would say of one."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        if mounted:
            yield folder
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("edge.store.SlotStore.free_bytes", lambda self: 128 << 10)
                yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_postpones_the_update_before_a_byte_moves(
    tmp_path: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.conditions._SLACK_BYTES", 16 << 10)

    async def scenario(device: Device) -> None:
        device.folder = full_disk / "device"
        device.boot()
        await device.serve(1)
        device.registry.fail["delta"] = NotFoundError("no delta")
        spoil(device, 3, "slow")
        moved = len(device.registry.calls)
        with pytest.raises(UnavailableError, match="free disk space") as postponed:
            await device.updater.update(Order(version=3))
        assert postponed.value.reason == "no-space"
        assert device.registry.calls[moved:] == ["manifest"]
        assert await device.right(1)
        monkeypatch.setattr("edge.store.SlotStore.free_bytes", lambda self: 1 << 40)  # somebody else fills it meanwhile
        if os.path.ismount(full_disk):
            with pytest.raises(UnavailableError) as failed:
                await device.updater.update(Order(version=3))
            assert failed.value.reason == "no-space"
            assert await device.right(1)
        assert (await device.updater.update(Order(version=2))).active
        assert await device.right(2)

    with_device(tmp_path, scenario)


def test_a_read_only_disk_does_not_keep_a_device_from_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    async def scenario(device: Device) -> None:
        await device.serve(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("edge.store.write_atomically", refuse)
            device.boot()
            await device.updater.start()
            assert await device.right(1)
            with pytest.raises(UnavailableError):
                await device.updater.update(Order(version=2))
            assert await device.right(1)
            await device.updater.probation.stop()

    with_device(tmp_path, scenario)
