"""A device against a real repository: what it accepts, and every way in which it must not be fooled."""

import itertools
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from isthmus.errors import ConfigError, DigestMismatchError, InputError, TrustError, UnavailableError
from security.keyfiles import save_private_key
from security.metadata import Metadata, MetaFile, TargetFile, Targets, load_signer, parse, sign
from security.repository import CloudRepository
from security.trust import MAX_MANIFEST_BYTES, SignedTarget, TrustedManifests
from security.workspace import init_workspace
from tests.security.registry import Registry


@pytest.fixture
def registry(own_workspace: Path) -> Registry:
    return Registry(own_workspace)


def _refusal(device: TrustedManifests, model: str = "triage", version: int = 1) -> str:
    with pytest.raises(TrustError) as refusal:
        device.manifest(model, version)
    return refusal.value.reason


def test_a_device_sees_each_published_version(registry: Registry, tmp_path: Path) -> None:
    device = registry.device(tmp_path / "device")
    first = registry.publish("triage", 1)
    assert device.manifest("triage", 1) == first
    second = registry.publish("triage", 2)
    assert device.manifest("triage", 2) == second
    assert device.manifest("triage", 1) == first
    assert _refusal(device, version=3) == "not-published"
    assert _refusal(device, model="other") == "not-published"


def test_what_was_verified_is_not_fetched_again(registry: Registry, tmp_path: Path) -> None:
    manifest = registry.publish("triage", 1)
    registry.device(tmp_path / "device").manifest("triage", 1)
    registry.asked.clear()
    assert registry.device(tmp_path / "device").manifest("triage", 1) == manifest  # also after a restart
    assert registry.asked == ["2.root.json", "timestamp.json"]


def test_a_kept_manifest_that_rotted_is_fetched_again(registry: Registry, tmp_path: Path) -> None:
    manifest = registry.publish("triage", 1)
    device = registry.device(tmp_path / "device")
    device.manifest("triage", 1)
    (kept,) = (tmp_path / "device" / "targets").iterdir()
    kept.write_bytes(b"rotten")
    assert device.manifest("triage", 1) == manifest


def test_kept_metadata_that_rotted_is_fetched_again(registry: Registry, tmp_path: Path) -> None:
    manifest = registry.publish("triage", 1)
    registry.device(tmp_path / "device").manifest("triage", 1)
    for path in (tmp_path / "device" / "metadata").glob("*.json"):
        if path.name != "root.json":
            path.write_bytes(b"")  # what a power cut may leave
    assert registry.device(tmp_path / "device").manifest("triage", 1) == manifest


def test_a_tampered_manifest_is_refused(registry: Registry, tmp_path: Path) -> None:
    manifest = registry.publish("triage", 1)
    device = registry.device(tmp_path / "device")
    registry.change = lambda name, data: data[::-1] if name.startswith("targets/") else data
    assert _refusal(device) == "digest-mismatch"
    registry.change = lambda name, data: data[:-1] if name.startswith("targets/") else data
    with pytest.raises(DigestMismatchError):
        device.manifest("triage", 1)
    registry.change = lambda _, data: data
    assert device.manifest("triage", 1) == manifest


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("timestamp.json", {"unsigned", "malformed-metadata"}),
        ("2.snapshot.json", {"digest-mismatch"}),
        ("2.targets.json", {"digest-mismatch"}),
    ],
)
def test_tampered_metadata_is_refused(registry: Registry, tmp_path: Path, name: str, reason: set[str]) -> None:
    registry.publish("triage", 1)

    def tamper(asked: str, data: bytes) -> bytes:
        if asked != name:
            return data
        content = json.loads(data)
        content["signed"]["expires"] = "2099-01-01T00:00:00Z"
        return json.dumps(content).encode()

    registry.change = tamper
    assert _refusal(registry.device(tmp_path / "device")) in reason


@pytest.mark.parametrize("garbage", [b"", b"{}", b"[]", b"\xff\xfe", b'{"signed": {}, "signatures": []}', b"[" * 9000])
def test_garbage_as_timestamp_is_refused(registry: Registry, tmp_path: Path, garbage: bytes) -> None:
    registry.publish("triage", 1)
    registry.change = lambda name, data: garbage if name == "timestamp.json" else data
    assert _refusal(registry.device(tmp_path / "device")) in {"malformed-metadata", "unsigned"}


def test_a_rolled_back_registry_is_refused_also_after_a_restart(registry: Registry, tmp_path: Path) -> None:
    registry.publish("triage", 1)
    old = shutil.copytree(registry.workspace / "cloud" / "tuf", tmp_path / "old")
    second = registry.publish("triage", 2)
    assert registry.device(tmp_path / "device").manifest("triage", 2) == second
    shutil.copytree(
        old, registry.workspace / "cloud" / "tuf", dirs_exist_ok=True
    )  # timestamp.json is the old one again
    assert _refusal(registry.device(tmp_path / "device")) == "rollback"


def test_expired_metadata_is_refused_until_the_cloud_signs_again(registry: Registry, tmp_path: Path) -> None:
    manifest = registry.publish("triage", 1, clock=lambda: datetime.now(UTC) - timedelta(days=2))
    device = registry.device(tmp_path / "device")
    assert _refusal(device) == "freeze"
    assert registry.cloud.refresh_if_due(datetime.now(UTC))
    assert device.manifest("triage", 1) == manifest


def test_an_expired_root_is_refused(tmp_path: Path) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=731)
    init_workspace(tmp_path / "workspace", ["localhost"], "acme", long_ago)
    registry = Registry(tmp_path / "workspace")
    registry.publish("triage", 1, clock=lambda: long_ago)
    assert _refusal(registry.device(tmp_path / "device")) == "expired-metadata"


def test_another_organisations_registry_is_refused(registry: Registry, tmp_path: Path) -> None:
    init_workspace(tmp_path / "eve", ["localhost"], "eve", datetime.now(UTC))
    eve = Registry(tmp_path / "eve")
    eve.publish("triage", 1)
    root = (registry.workspace / "trust" / "root.json").read_bytes()
    assert _refusal(TrustedManifests(tmp_path / "device", root, eve.fetch)) == "unsigned"


def _forged_targets(registry: Registry, manifest: bytes) -> bytes:
    metadata = parse(registry.cloud.targets_json(), Targets)
    metadata.signed.targets["triage/1/manifest.json"] = TargetFile.from_data(
        "triage/1/manifest.json", manifest, ["sha256"]
    )
    metadata.signed.version += 1
    return sign(metadata, load_signer(registry.workspace / "cloud" / "snapshot.key"))


def test_a_broken_into_cloud_cannot_ship_a_model(registry: Registry, tmp_path: Path) -> None:
    """The attacker has all keys of the cloud and signs targets, snapshot and timestamp with them."""
    forged = _forged_targets(registry, b"evil")
    state = registry.cloud._state()
    state.roles["targets"], state.files["targets"] = parse(forged, Targets), forged
    state.meta["targets.json"] = MetaFile.from_data(2, forged, ["sha256"])
    registry.cloud._write(state, datetime.now(UTC))
    assert _refusal(registry.device(tmp_path / "device")) == "unsigned"


def test_a_cloud_with_a_wrong_key_does_not_start(registry: Registry) -> None:
    for name in ("snapshot", "timestamp"):
        path = registry.workspace / "cloud" / f"{name}.key"
        right = path.read_bytes()
        path.unlink()
        save_private_key(path, ed25519.Ed25519PrivateKey.generate())
        with pytest.raises(ConfigError, match=f"not the {name} key"):
            CloudRepository(registry.workspace / "cloud")
        path.write_bytes(right)


def test_a_timestamp_of_a_wrong_key_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.publish("triage", 1)
    path = registry.workspace / "cloud" / "tuf" / "timestamp.json"
    metadata = Metadata.from_bytes(path.read_bytes())
    path.write_bytes(sign(metadata, load_signer(registry.workspace / "cloud" / "snapshot.key")))
    assert _refusal(registry.device(tmp_path / "device")) == "unsigned"


def test_an_endless_answer_is_cut_off(registry: Registry, tmp_path: Path) -> None:
    registry.publish("triage", 1)

    def endless(name: str) -> Iterator[bytes]:
        if name == "timestamp.json":
            return itertools.repeat(b" " * 4096)
        return registry.fetch(name)

    root = (registry.workspace / "trust" / "root.json").read_bytes()
    assert _refusal(TrustedManifests(tmp_path / "device", root, endless)) == "too-long"


def test_a_manifest_that_is_too_long_is_not_even_fetched(registry: Registry, tmp_path: Path) -> None:
    huge = b" " * (MAX_MANIFEST_BYTES + 1)
    registry.cloud.commit(registry.operator.sign_manifest("triage", 1, huge, registry.cloud.targets_json()))
    with pytest.raises(TrustError, match="at most"):
        registry.device(tmp_path / "device").manifest("triage", 1)
    assert not any(name.startswith("targets/") for name in registry.asked)


def test_a_registry_that_cannot_be_reached_is_no_attack(registry: Registry, tmp_path: Path) -> None:
    def gone(name: str) -> Iterator[bytes]:
        raise UnavailableError(f"{name}: connection refused", reason="cloud-unavailable")
        yield b""

    root = (registry.workspace / "trust" / "root.json").read_bytes()
    with pytest.raises(UnavailableError) as refusal:
        TrustedManifests(tmp_path / "device", root, gone).manifest("triage", 1)
    assert refusal.value.reason == "cloud-unavailable"


@pytest.mark.parametrize("missing", ["timestamp.json", "2.snapshot.json", "2.targets.json"])
def test_a_missing_file_is_unavailable(registry: Registry, tmp_path: Path, missing: str) -> None:
    registry.publish("triage", 1)
    (registry.workspace / "cloud" / "tuf" / missing).unlink()
    with pytest.raises(UnavailableError):
        registry.device(tmp_path / "device").manifest("triage", 1)


def test_a_missing_manifest_is_unavailable(registry: Registry, tmp_path: Path) -> None:
    registry.publish("triage", 1)
    registry.manifests.clear()
    with pytest.raises(UnavailableError):
        registry.device(tmp_path / "device").manifest("triage", 1)


def test_a_root_that_is_none_is_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(TrustError):
        TrustedManifests(tmp_path / "device", b"{}", registry.fetch).manifest("triage", 1)


@pytest.mark.parametrize(("model", "version"), [("../x", 1), ("a/b", 1), ("", 1), ("triage", 0), ("triage", -1)])
def test_names_that_are_no_paths_are_refused(registry: Registry, tmp_path: Path, model: str, version: int) -> None:
    with pytest.raises(InputError):
        registry.device(tmp_path / "device").manifest(model, version)


def test_a_folder_that_cannot_be_written_is_the_operators_to_fix(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "device").write_text("a file where the folder should be")
    with pytest.raises(ConfigError):
        registry.device(tmp_path / "device").manifest("triage", 1)


def test_a_device_knows_the_terms_of_a_version(registry: Registry, tmp_path: Path) -> None:
    manifest = registry.publish("triage", 1)
    registry.publish("triage", 2, rollback_floor=1)
    device = registry.device(tmp_path / "device")
    assert device.target("triage", 1) == SignedTarget(manifest, 0, "")
    assert device.target("triage", 2).rollback_floor == 1


def test_stale_metadata_is_taken_from_whoever_vouches_for_it(registry: Registry, tmp_path: Path) -> None:
    """What was carried for weeks: the cloud's files may have expired, the operator's must not, and versions count."""
    manifest = registry.publish("triage", 1)
    root = (registry.workspace / "trust" / "root.json").read_bytes()

    def after(days: int, *, accept_stale: bool = True) -> TrustedManifests:
        later = datetime.now(UTC) + timedelta(days=days)
        return TrustedManifests(
            tmp_path / "device", root, registry.fetch, clock=lambda: later, accept_stale=accept_stale
        )

    assert _refusal(after(20, accept_stale=False)) == "freeze"
    assert after(20).manifest("triage", 1) == manifest
    assert after(0).manifest("triage", 1) == manifest  # nothing is stale
    assert _refusal(after(400)) == "expired-metadata"  # targets
    old = shutil.copytree(registry.workspace / "cloud" / "tuf", tmp_path / "old")
    registry.publish("triage", 2)
    after(20).manifest("triage", 2)
    shutil.copytree(old, registry.workspace / "cloud" / "tuf", dirs_exist_ok=True)
    assert _refusal(after(20)) == "rollback"


@pytest.mark.parametrize("garbage", [b"", b"{}", b"[" * 9000])
def test_garbage_is_refused_from_whoever_vouches_for_it(registry: Registry, tmp_path: Path, garbage: bytes) -> None:
    registry.publish("triage", 1)
    registry.change = lambda name, data: garbage if name == "timestamp.json" else data
    root = (registry.workspace / "trust" / "root.json").read_bytes()
    device = TrustedManifests(tmp_path / "device", root, registry.fetch, accept_stale=True)
    assert _refusal(device) == "malformed-metadata"


def test_what_stands_in_for_a_clock_is_limited_and_may_be_missing(registry: Registry, tmp_path: Path) -> None:
    registry.publish("triage", 1)
    root = (registry.workspace / "trust" / "root.json").read_bytes()
    endless = TrustedManifests(tmp_path / "device", root, lambda _: itertools.repeat(b" " * 65536), accept_stale=True)
    assert _refusal(endless) == "too-long"
    (registry.workspace / "cloud" / "tuf" / "timestamp.json").unlink()
    with pytest.raises(UnavailableError):
        TrustedManifests(tmp_path / "device", root, registry.fetch, accept_stale=True).manifest("triage", 1)
