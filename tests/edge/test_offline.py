"""Versions that were carried here: installed by the checks of the network, refused by them, too."""

from __future__ import annotations

import asyncio
import json
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from edge.bootstrap import install_stick
from edge.config import EdgeSettings
from edge.identity import DeviceHome, enrol
from edge.outcome import Outcome
from edge.status_client import find_agent, import_version
from edge.store import SlotStore
from isthmus.bundle import parse_manifest
from isthmus.digests import sha256_bytes
from isthmus.errors import BundleError, ConfigError, ConflictError, NotFoundError
from isthmus.stick import INDEX, Index, Stick, StickWriter, blob_name, metadata_name
from security.repository import CloudRepository
from tests.edge import bundles
from tests.edge.simulated_cloud import CODE, SimulatedCloud, simulated_cloud
from tests.edge.test_agent import running


class Site:
    """A cloud, an enrolled device without a network, and sticks that go between them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "device"
        asyncio.run(self._enrol())

    async def _enrol(self) -> None:
        self.cloud = SimulatedCloud(self.folder / "workspace")
        async with simulated_cloud(self.cloud):
            await enrol(DeviceHome(self.home), cloud=self.cloud.address, code=CODE, trust=self.cloud.trust, hosts=())

    def write(self, version: int, name: str = "stick", *, cloud: CloudRepository | None = None) -> Path:
        """Write what the cloud serves now, as `isthmus model export` does."""
        repository = cloud or self.cloud.repository
        path = self.folder / name
        writer = StickWriter(path)
        for file in (self.cloud.workspace / "cloud" / "tuf").glob("*.json"):
            writer.write(metadata_name(file.name), iter([repository.metadata(file.name)]))
        for sha256, data in self.cloud.blobs.items():
            writer.write(blob_name(sha256), iter([data]))
        writer.finish(Index("triage", version, ()))
        return path

    def install(self, path: Path, *, accept_stale: bool = False) -> Outcome:
        settings = EdgeSettings(home=self.home, variant="onnxruntime-fp32")
        with Stick(path) as stick:
            return asyncio.run(install_stick(settings, stick, accept_stale=accept_stale))

    @property
    def installed(self) -> int:
        return SlotStore(DeviceHome(self.home).models("triage")).state.current


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.mark.parametrize("name", ["stick", "stick.tar"])
def test_versions_are_installed_one_after_the_other(site: Site, name: str) -> None:
    for version in (1, 2):
        site.cloud.publish(version)
        outcome = site.install(site.write(version, f"{version}-{name}"))
        assert (outcome.to_version, outcome.reason) == (version, "")
        assert site.installed == version


def test_a_changed_file_is_refused(site: Site) -> None:
    site.cloud.publish(1)
    path = site.write(1)
    manifest = json.loads((site.cloud.workspace / "bundles" / "1" / "manifest.json").read_bytes())
    entry = next(entry for file, entry in manifest["files"].items() if file.endswith("onnxruntime-fp32/model.onnx"))
    blob = path / blob_name(entry["sha256"])
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert site.install(path).reason == "digest-mismatch"
    assert site.installed == 0


def test_a_manifest_that_nobody_signed_is_refused(site: Site) -> None:
    site.cloud.publish(1)
    path = site.write(1)
    digest = sha256_bytes((site.cloud.workspace / "bundles" / "1" / "manifest.json").read_bytes())
    blob = path / blob_name(digest)
    blob.write_bytes(blob.read_bytes().replace(b'"version"', b'"Version"'))
    assert site.install(path).reason == "digest-mismatch"


def test_an_older_stick_is_refused(site: Site) -> None:
    site.cloud.publish(1)
    old = site.write(1, "old")
    site.cloud.publish(2)
    assert not site.install(site.write(2, "new")).reason
    assert site.install(old).reason == "rollback"
    assert site.install(old, accept_stale=True).reason == "rollback"
    assert site.installed == 2


def _travelled(site: Site, days: int) -> Path:
    """A stick that the cloud signed so many days ago."""
    then = CloudRepository(site.cloud.workspace / "cloud", clock=lambda: datetime.now(UTC) - timedelta(days=days))
    site.cloud.repository = then
    site.cloud.publish(1)
    return site.write(1, cloud=then)


def test_a_stick_that_travelled_for_weeks_needs_somebody_who_vouches(site: Site) -> None:
    path = _travelled(site, 20)
    assert site.install(path).reason == "freeze"
    assert site.installed == 0
    assert not site.install(path, accept_stale=True).reason
    assert site.installed == 1


def test_a_withdrawn_version_is_refused(site: Site) -> None:
    site.cloud.publish(1)
    site.cloud.repository.commit(
        site.cloud.operator.sign_withdrawal("triage", 1, "NaN", site.cloud.repository.targets_json())
    )
    assert site.install(site.write(1)).reason == "withdrawn"


def test_no_agent_may_be_running(site: Site) -> None:
    site.cloud.publish(1)
    path = site.write(1)
    lock = DeviceHome(site.home).lock()
    with pytest.raises(ConflictError):
        site.install(path)
    lock.close()


def _without_index(path: Path) -> None:
    (path / INDEX).unlink()


def _other_format(path: Path) -> None:
    (path / INDEX).write_text('{"format": 2, "model": "triage", "version": 1, "bases": []}')


def _no_json(path: Path) -> None:
    (path / INDEX).write_text("[" * 5000)


def _no_version(path: Path) -> None:
    (path / INDEX).write_text('{"format": 1, "model": "triage", "version": "1", "bases": []}')


@pytest.mark.parametrize("spoil", [_without_index, _other_format, _no_json, _no_version])
def test_what_is_no_stick_is_refused(site: Site, spoil: Callable[[Path], None]) -> None:
    site.cloud.publish(1)
    path = site.write(1)
    spoil(path)
    with pytest.raises(BundleError):
        Stick(path)


def test_names_do_not_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    for name in ("../secret.json", "..", "/etc/passwd", "a/b.json"):
        with pytest.raises(NotFoundError):
            metadata_name(name)


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"format": 1, "model": "triage", "version": 1, "bases": []}')
    with tarfile.open(tmp_path / "stick.tar", "w") as file:
        link = tarfile.TarInfo(INDEX)
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        file.addfile(link)
    with pytest.raises(BundleError):
        Stick(tmp_path / "stick.tar")
    (tmp_path / "none.tar").write_bytes(b"no tar")
    for path in (tmp_path / "none.tar", tmp_path / "missing.tar"):
        with pytest.raises(ConfigError):
            Stick(path)


@pytest.mark.slow
def test_a_running_agent_without_a_network_installs_what_it_is_handed(site: Site) -> None:
    """The cloud is gone since enrolment. Requests go on; refusals are told to whoever carried the stick."""
    site.cloud.publish(1)
    first = site.write(1, "first")
    site.cloud.publish(2)
    second = site.write(2, "second.tar")
    site.cloud.publish(3, golden=bundles.golden_tensors(500))
    bad = site.write(3, "bad")

    async def scenario() -> None:
        async with running(site.home, variant="onnxruntime-fp32") as agent:

            def hand(path: Path) -> dict[str, Any]:
                return import_version(find_agent(agent.address), path, accept_stale=False)

            for version, path in ((1, first), (2, second), (2, second)):
                told = await asyncio.to_thread(hand, path)
                assert (told["version"], told["installed"]) == (version, True)
                assert (await agent.infer(bundles.SURE))["isthmus.edge_version"] == version
            told = await asyncio.to_thread(hand, bad)
            assert (told["installed"], told["reason"]) == (False, "golden-mismatch")
            told = await asyncio.to_thread(hand, first)
            assert (told["installed"], told["reason"]) == (False, "rollback")
            with pytest.raises(ConfigError):
                await asyncio.to_thread(hand, site.folder / "nothing")
            assert (await agent.infer(bundles.SURE))["isthmus.edge_version"] == 2

    asyncio.run(scenario())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "reason"), [("model.onnx", "stick-incomplete"), ("metadata", "metadata-missing")], ids=["file", "metadata"]
)
def test_whoever_carried_half_a_stick_is_told_at_once(
    site: Site, monkeypatch: pytest.MonkeyPatch, lost: str, reason: str
) -> None:
    """The cloud cannot be reached, so nothing makes up for what the stick lacks; the next stick is whole."""
    monkeypatch.setattr("edge.offline._STALL_S", 0.2)
    site.cloud.publish(1)
    first = site.write(1, "first")
    site.cloud.publish(2)
    half, whole = site.write(2, "half"), site.write(2, "whole")
    manifest = parse_manifest((site.cloud.workspace / "bundles" / "2" / "manifest.json").read_bytes())
    model = manifest.files["variants/onnxruntime-fp32/model.onnx"].sha256
    (half / (blob_name(model) if lost == "model.onnx" else metadata_name("timestamp.json"))).unlink()

    async def scenario() -> None:
        async with running(site.home, variant="onnxruntime-fp32") as agent:

            def hand(path: Path) -> dict[str, Any]:
                return import_version(find_agent(agent.address), path, accept_stale=False)

            assert (await asyncio.to_thread(hand, first))["installed"]
            async with asyncio.timeout(60):  # an import may take an hour
                told = await asyncio.to_thread(hand, half)
            assert (told["installed"], told["reason"]) == (False, reason)
            assert ("model.onnx" if lost == "model.onnx" else "timestamp.json") in told["detail"]
            assert (await agent.infer(bundles.SURE))["isthmus.edge_version"] == 1
            assert (await asyncio.to_thread(hand, whole))["installed"]
            assert (await agent.infer(bundles.SURE))["isthmus.edge_version"] == 2

    asyncio.run(scenario())


def test_an_agent_installs_only_its_own_models(site: Site) -> None:
    writer = StickWriter(site.folder / "other")
    writer.finish(Index("other", 1, ()))

    async def scenario() -> None:
        async with running(site.home) as agent:
            with pytest.raises(NotFoundError) as refusal:
                await asyncio.to_thread(
                    import_version, find_agent(agent.address), site.folder / "other", accept_stale=False
                )
            assert refusal.value.reason == "unknown-model"

    asyncio.run(scenario())
