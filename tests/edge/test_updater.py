"""Updates with real bundles, deltas and runtimes; whatever is wrong, the old version keeps serving."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edge.model import LiveModel, ServedModels
from edge.outcome import Outcome
from edge.plan import choose_variant, plan_files
from edge.state import Became, Order, Step
from edge.store import SlotStore
from edge.updater import Updater
from isthmus.bundle import FileEntry, parse_manifest
from isthmus.errors import (
    BundleError,
    ConfigError,
    DeltaError,
    DigestMismatchError,
    MissingExtraError,
    NotFoundError,
    TrustError,
    UnavailableError,
)
from security.trust import SignedTarget
from tests.edge import bundles
from tests.edge.registry import Registry, make_updater

MODEL = "triage"


@dataclass
class Device:
    registry: Registry
    models: ServedModels
    updater: Updater
    home: Path
    reports: list[Outcome]

    async def logits(self) -> int:
        """Return the one logit in which versions differ, times 1000: the version that computes."""
        live = self.models.find(MODEL)
        with live.in_use():
            outputs = await live.infer({"x": np.array([[1, 0, 0]], np.float32)})
        return round(float(outputs["logits"][0, 1]) * 1000)


def with_device(
    tmp_path: Path, scenario: Callable[[Device], Awaitable[None]], *, versions: tuple[int, ...] = (1, 2)
) -> None:
    async def run() -> None:
        registry, models = Registry(tmp_path / "registry", versions), ServedModels((MODEL,))
        reports: list[Outcome] = []
        home = tmp_path / "device"

        def note(outcome: Outcome) -> None:
            if outcome.became is not Became.UPDATING:
                reports.append(outcome)

        updater = make_updater(home, registry, models, report=note)
        try:
            await scenario(Device(registry, models, updater, home, reports))
        finally:
            models.swap(MODEL, None)

    asyncio.run(run())


def test_first_install_then_update_by_delta(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        first = await device.updater.update(Order(version=1))
        assert first.active
        assert {file.method for file in first.files} == {"full"}
        assert first.bytes_fetched == first.bytes_full > 0
        assert await device.logits() == 1
        second = await device.updater.update(Order(version=2))
        assert second.active
        assert (second.from_version, second.to_version, second.serving_version) == (1, 2, 2)
        assert await device.logits() == 2
        assert second.bytes_fetched < second.bytes_full
        assert device.reports == [first, second]
        assert device.updater.step is Step.IDLE

    with_device(tmp_path, scenario)


def test_unchanged_files_are_kept_without_a_byte(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=1))
        # Version 4 is version 1 but for its manifest and calibration record.
        device.registry.publish(4, lambda folder, version: bundles.build_bundle(folder, version, weights_of=1))
        outcome = await device.updater.update(Order(version=4))
        methods = {file.path: file.method for file in outcome.files}
        assert methods["variants/onnxruntime-fp32/model.onnx"] == "kept"
        assert methods["golden.safetensors"] == "kept"
        assert methods["calibration.json"] != "kept"
        assert {f.bytes_fetched for f in outcome.files if f.method == "kept"} == {0}

    with_device(tmp_path, scenario)


async def _refused(device: Device, reason: str) -> None:
    await device.updater.update(Order(version=1))
    outcome = await device.updater.update(Order(version=2))
    assert not outcome.active
    assert outcome.reason == reason
    assert outcome.detail
    assert outcome.serving_version == 1
    assert device.reports[-1] is outcome
    assert device.models.version(MODEL) == 1
    assert await device.logits() == 1
    state = SlotStore(device.home).state
    assert (state.current, state.failed) == (1, {2: reason})
    assert sorted(path.name for path in (device.home / "slots").iterdir()) == ["1"]


def _no_delta(device: Device) -> None:
    device.registry.fail["delta"] = NotFoundError("no delta")


def _flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("path", ["variants/onnxruntime-fp32/model.onnx", "golden.safetensors", "calibration.json"])
@pytest.mark.parametrize("tamper", [_flip, lambda data: data[:-1], lambda data: data + b"x"])
def test_tampered_file_is_refused(tmp_path: Path, path: str, tamper: Callable[[bytes], bytes]) -> None:
    async def scenario(device: Device) -> None:
        _no_delta(device)
        device.registry.tamper[device.registry.entry(2, path).sha256] = tamper
        await _refused(device, "digest-mismatch")

    with_device(tmp_path, scenario)


@pytest.mark.parametrize(
    "tamper", [_flip, lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 99]
)
def test_tampered_delta_costs_its_bytes_and_not_the_update(tmp_path: Path, tamper: Callable[[bytes], bytes]) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=1))
        device.registry.tamper["delta"] = tamper
        outcome = await device.updater.update(Order(version=2))
        assert outcome.active
        assert {file.method for file in outcome.files} <= {"full", "kept"}
        assert await device.logits() == 2

    with_device(tmp_path, scenario)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TrustError("no", reason="unsigned"), "unsigned"),
        (TrustError("no", reason="rollback"), "rollback"),
        (DigestMismatchError("no"), "digest-mismatch"),
        (BundleError("no"), "bad-bundle"),
    ],
)
def test_manifest_that_nobody_vouches_for_is_refused(tmp_path: Path, error: TrustError, reason: str) -> None:
    async def scenario(device: Device) -> None:
        real = device.registry.target

        def target(model: str, version: int) -> SignedTarget:
            if version == 2:
                raise error
            return real(model, version)

        device.registry.target = target  # type: ignore[method-assign]
        await _refused(device, reason)
        assert device.registry.calls.count("manifest") == 1  # nothing was fetched for version 2
        assert device.registry.calls.count("blob") == 3

    with_device(tmp_path, scenario)


def test_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=1))
        first = (device.registry.folder(1) / "manifest.json").read_bytes()
        device.registry.tamper["manifest"] = lambda data: first
        outcome = await device.updater.update(Order(version=2))
        assert (outcome.active, outcome.reason) == (False, "bad-bundle")

    with_device(tmp_path, scenario)


def test_worse_model_is_refused_by_the_self_test(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        bundles.build_bundle(device.registry.folder(2), 2, golden=bundles.golden_tensors(500))
        device.registry.index(2)
        await _refused(device, "golden-mismatch")

    with_device(tmp_path, scenario, versions=(1,))


def test_calibration_record_of_another_version_is_refused(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        bundles.build_bundle(device.registry.folder(2), 2, record=bundles.calibration(1))
        device.registry.index(2)
        await _refused(device, "calibration-mismatch")

    with_device(tmp_path, scenario, versions=(1,))


def test_crash_of_the_self_test_is_a_refusal(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=1))

        def crash(slot: Path, variant: str) -> None:
            raise MemoryError("model too large")

        device.updater._open_slot = crash  # type: ignore[assignment]
        outcome = await device.updater.update(Order(version=2))
        assert (outcome.active, outcome.reason) == (False, "self-test-crashed")
        assert await device.logits() == 1

    with_device(tmp_path, scenario)


def test_versions_never_go_back(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=2))
        outcome = await device.updater.update(Order(version=1))
        assert (outcome.active, outcome.reason) == (False, "rollback")
        assert await device.logits() == 2

    with_device(tmp_path, scenario)


def test_lost_connection_is_no_refusal_and_the_fetch_goes_on(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=1))
        _no_delta(device)
        device.registry.break_after = 150
        size = device.registry.entry(2, "variants/onnxruntime-fp32/model.onnx").length
        attempts = 0
        while True:
            attempts += 1
            assert attempts < 50
            try:
                outcome = await device.updater.update(Order(version=2))
            except UnavailableError:
                assert await device.logits() == 1
                assert not SlotStore(device.home).state.failed  # a restart in between loses nothing either
                continue
            break
        assert outcome.active
        assert attempts > size // 150
        assert await device.logits() == 2

    with_device(tmp_path, scenario)


def test_spoilt_rest_of_an_earlier_fetch_is_fetched_anew(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        _no_delta(device)
        path = "variants/onnxruntime-fp32/model.onnx"
        part = SlotStore(device.home).partial(2) / f"{path}.part"
        part.parent.mkdir(parents=True)
        part.write_bytes(b"\x00" * 100)
        outcome = await device.updater.update(Order(version=2))
        assert outcome.active
        assert await device.logits() == 2

    with_device(tmp_path, scenario)


def test_damaged_installed_file_is_not_kept(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=1))
        device.registry.publish(4, lambda folder, version: bundles.build_bundle(folder, version, weights_of=1))
        golden = device.home / "slots" / "1" / "golden.safetensors"
        golden.write_bytes(_flip(golden.read_bytes()))
        outcome = await device.updater.update(Order(version=4))
        assert outcome.active
        assert {f.method for f in outcome.files if f.path == "golden.safetensors"} == {"full"}

    with_device(tmp_path, scenario)


def test_start_serves_the_installed_version_without_the_registry(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=2))
        device.registry.fail = {kind: UnavailableError("offline") for kind in ("manifest", "blob", "delta")}
        models = ServedModels((MODEL,))
        await make_updater(device.home, device.registry, models).start()
        assert models.version(MODEL) == 2
        models.swap(MODEL, None)

    with_device(tmp_path, scenario)


@pytest.mark.parametrize("damage", ["variants/onnxruntime-fp32/model.onnx", "manifest.json", "calibration.json"])
def test_start_falls_back_from_a_broken_version_and_can_install_it_again(tmp_path: Path, damage: str) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=1))
        await device.updater.update(Order(version=2))
        (device.home / "slots" / "2" / damage).write_bytes(b"broken")
        models = ServedModels((MODEL,))
        updater = make_updater(device.home, device.registry, models)
        await updater.start()
        assert models.version(MODEL) == 1
        outcome = await updater.update(Order(version=2))
        assert outcome.active
        assert models.version(MODEL) == 2
        models.swap(MODEL, None)

    with_device(tmp_path, scenario)


@pytest.mark.parametrize(
    ("problem", "raised"),
    [
        (MissingExtraError("runtime onnxruntime", "edge-onnxruntime"), ConfigError),
        (OSError(errno.EMFILE, "Too many open files"), UnavailableError),
    ],
)
def test_start_on_a_machine_that_is_not_ready_costs_no_version(
    tmp_path: Path, problem: Exception, raised: type[Exception]
) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=1))
        await device.updater.update(Order(version=2))
        models = ServedModels((MODEL,))
        updater = make_updater(device.home, device.registry, models)
        right = updater._open_slot

        def fail(slot: Path, variant: str) -> LiveModel:
            raise problem

        updater._open_slot = fail
        with pytest.raises(raised):
            await updater.start()
        assert (SlotStore(device.home).state.current, SlotStore(device.home).state.failed) == (2, {})
        updater._open_slot = right
        await updater.start()
        assert models.version(MODEL) == 2
        models.swap(MODEL, None)

    with_device(tmp_path, scenario)


def test_refusal_that_time_may_heal_keeps_what_was_fetched(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=1))
        part = SlotStore(device.home).partial(2) / "part"
        part.write_bytes(b"much")
        device.registry.fail["manifest"] = TrustError("too old", reason="expired-metadata")
        outcome = await device.updater.update(Order(version=2))
        assert (outcome.active, outcome.final) == (False, False)
        assert part.exists()
        assert not SlotStore(device.home).state.failed

    with_device(tmp_path, scenario)


def test_installed_files_that_cannot_be_read_are_fetched(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=1))
        device.registry.publish(4, lambda folder, version: bundles.build_bundle(folder, version, weights_of=1))
        for path in (device.home / "slots" / "1").rglob("*"):
            if path.is_file() and path.name != "manifest.json":
                path.unlink()
                path.symlink_to(path.name)  # reading it is an error that is not "no such file"
        outcome = await device.updater.update(Order(version=4))
        assert outcome.active
        assert {file.method for file in outcome.files} == {"full"}

    with_device(tmp_path, scenario)


def test_event_loop_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    threads: set[int] = set()

    def sync(descriptor: int) -> None:
        threads.add(threading.get_ident())

    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.fsync", sync)
            await device.updater.update(Order(version=2))
            device.registry.publish(3, lambda folder, version: bundles.build_bundle(folder, version, weights_of=500))
            device.registry.tamper["blob"] = device.registry.tamper["delta"] = _flip
            assert not (await device.updater.update(Order(version=3))).active
        assert threads
        assert threading.get_ident() not in threads

    with_device(tmp_path, scenario)


def test_start_of_a_new_device_serves_nothing(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.start()
        assert not device.models.ready
        assert device.reports == []

    with_device(tmp_path, scenario, versions=())


@pytest.mark.slow
def test_swaps_under_load_lose_no_request(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=1))
        done = asyncio.Event()
        seen: list[list[int]] = []

        async def caller() -> None:
            mine: list[int] = []
            seen.append(mine)
            while not done.is_set():
                mine.append(await device.logits())

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(caller())
            for version in range(2, 7):
                assert (await device.updater.update(Order(version=version))).active
            done.set()
        assert await device.logits() == 6
        for mine in seen:
            assert mine[0] == 1
            assert mine == sorted(mine)
        assert {version for mine in seen for version in mine} >= {1, 2, 3, 4, 5}

    with_device(tmp_path, scenario, versions=(1, 2, 3, 4, 5, 6))


def _entry(length: int) -> FileEntry:
    return FileEntry(sha256=f"{length:064x}", length=length)


def test_plan_pairs_each_file_with_the_installed_one(tmp_path: Path) -> None:
    wanted = {"big": _entry(900), "new": _entry(5), "same": _entry(7)}
    plans = plan_files(wanted, {"big": _entry(800), "same": _entry(7), "gone": _entry(1)})
    assert [(plan.path, plan.base) for plan in plans] == [("new", None), ("same", _entry(7)), ("big", _entry(800))]


def test_variant_is_the_first_that_fits(tmp_path: Path) -> None:
    bundles.build_bundle(tmp_path / "b")
    manifest = parse_manifest((tmp_path / "b" / "manifest.json").read_bytes())

    def choose(configured: str | None, *runtimes: str) -> str:
        return choose_variant(
            manifest, configured, machine="x86_64", bfloat16=False, installed=runtimes.__contains__
        ).id

    assert choose(None, "openvino", "onnxruntime") == "onnxruntime-fp32"
    assert choose(None, "openvino") == "openvino-fp32"
    assert choose("openvino-fp32", "openvino", "onnxruntime") == "openvino-fp32"
    for configured, runtimes in ((None, ()), ("openvino-fp32", ("onnxruntime",)), ("nothere", ("openvino",))):
        with pytest.raises(BundleError, match=r"the bundle has onnxruntime-fp32 \(onnxruntime, any\)") as caught:
            choose(configured, *runtimes)
        assert caught.value.reason == "no-fitting-variant"


def test_a_variant_in_bfloat16_needs_a_processor_for_it(tmp_path: Path) -> None:
    bundles.build_bundle(tmp_path / "b")
    manifest = parse_manifest((tmp_path / "b" / "manifest.json").read_bytes())
    first, *others = manifest.variants
    manifest = manifest.model_copy(
        update={"variants": (first.model_copy(update={"inference_precision": "bf16"}), *others)}
    )

    def choose(*, bfloat16: bool) -> str:
        return choose_variant(manifest, None, machine="x86_64", bfloat16=bfloat16, installed=lambda _: True).id

    assert choose(bfloat16=True) == first.id
    assert choose(bfloat16=False) == others[0].id


def test_delta_that_cannot_be_applied_is_not_used(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.updater.update(Order(version=1))
        device.registry.fail["delta"] = DeltaError("no")
        assert (await device.updater.update(Order(version=2))).active

    with_device(tmp_path, scenario)
