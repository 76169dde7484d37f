"""What the operator signs and what the cloud accepts."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from tuf.api.metadata import DelegatedRole, Delegations  # type: ignore[attr-defined]

from isthmus.errors import ConfigError, ConflictError, InputError, IsthmusError, NotFoundError, TrustError
from security.keyfiles import save_private_key
from security.metadata import Metadata, TargetFile, Targets, Timestamp, load_signer, parse, sign
from security.repository import CloudRepository, OperatorRepository
from security.workspace import init_workspace
from tests.security.registry import Registry


@pytest.fixture
def registry(own_workspace: Path) -> Registry:
    return Registry(own_workspace)


def _signed(registry: Registry, change: Any, *, key: str = "operator/targets.key") -> bytes:
    """The next targets metadata with one thing changed, really signed."""
    metadata = parse(registry.cloud.targets_json(), Targets)
    metadata.signed.version += 1
    change(metadata.signed)
    return sign(metadata, load_signer(registry.workspace / key))


def _nothing(_: Targets) -> None:
    pass


def test_the_next_targets_are_accepted_and_served(registry: Registry) -> None:
    signed = registry.operator.sign_manifest("triage", 1, b"m", registry.cloud.targets_json())
    registry.cloud.accept_targets(signed)
    registry.cloud.commit(signed)
    assert registry.cloud.targets_json() == signed == registry.cloud.metadata("2.targets.json")
    assert CloudRepository(registry.workspace / "cloud").targets_json() == signed  # after a restart


def test_unsigned_targets_are_refused(registry: Registry) -> None:
    metadata = Metadata[Targets].from_bytes(_signed(registry, _nothing))
    metadata.signatures.clear()
    with pytest.raises(TrustError) as refusal:
        registry.cloud.commit(metadata.to_bytes())
    assert refusal.value.reason == "unsigned"


@pytest.mark.parametrize("key", ["cloud/snapshot.key", "cloud/timestamp.key", "operator/root.key"])
def test_targets_of_another_roles_key_are_refused(registry: Registry, key: str) -> None:
    with pytest.raises(TrustError) as refusal:
        registry.cloud.commit(_signed(registry, _nothing, key=key))
    assert refusal.value.reason == "unsigned"


def test_targets_of_a_strangers_key_are_refused(registry: Registry, tmp_path: Path) -> None:
    init_workspace(tmp_path / "eve", ["localhost"], "eve", datetime.now(UTC))
    eve = OperatorRepository(tmp_path / "eve" / "operator")
    with pytest.raises(TrustError):
        eve.sign_manifest("triage", 1, b"m", registry.cloud.targets_json())
    stranger = Registry(tmp_path / "eve")
    with pytest.raises(TrustError) as refusal:
        registry.cloud.commit(_signed(stranger, _nothing))
    assert refusal.value.reason == "unsigned"


@pytest.mark.parametrize("step", [-1, 1, 5])
def test_only_the_very_next_version_is_accepted(registry: Registry, step: int) -> None:
    registry.publish("triage", 1)

    def change(signed: Targets) -> None:
        signed.version += step

    with pytest.raises(ConflictError) as refusal:
        registry.cloud.commit(_signed(registry, change))
    assert refusal.value.reason == "stale-metadata"


def _change_target(signed: Targets) -> None:
    signed.targets["triage/1/manifest.json"] = TargetFile.from_data("triage/1/manifest.json", b"x", ["sha256"])


def _remove_target(signed: Targets) -> None:
    del signed.targets["triage/1/manifest.json"]


@pytest.mark.parametrize("change", [_change_target, _remove_target])
def test_targets_are_only_ever_added(registry: Registry, change: Any) -> None:
    registry.publish("triage", 1)
    before = registry.cloud.metadata("timestamp.json")
    with pytest.raises(TrustError) as refusal:
        registry.cloud.commit(_signed(registry, change))
    assert refusal.value.reason == "target-changed"
    assert registry.cloud.metadata("timestamp.json") == before


@pytest.mark.parametrize("path", ["evil.sh", "triage/0/manifest.json", "triage/1/weights.bin", "../1/manifest.json"])
def test_targets_are_manifests(registry: Registry, path: str) -> None:
    def change(signed: Targets) -> None:
        signed.targets[path] = TargetFile.from_data(path, b"x", ["sha256"])

    with pytest.raises(TrustError):
        registry.cloud.commit(_signed(registry, change))


def test_targets_that_delegate_to_other_keys_are_refused(registry: Registry) -> None:
    """A delegation would let its key say which manifests exist, although only the operator's may."""

    def change(signed: Targets) -> None:
        role = DelegatedRole("anybody", [], 1, terminating=True, paths=["*/*/manifest.json"])
        signed.delegations = Delegations(keys={}, roles={"anybody": role})

    with pytest.raises(TrustError, match="delegates"):
        registry.cloud.commit(_signed(registry, change))


def test_expired_targets_are_refused(registry: Registry) -> None:
    long_ago = OperatorRepository(
        registry.workspace / "operator", clock=lambda: datetime.now(UTC) - timedelta(days=366)
    )
    signed = long_ago.sign_manifest("triage", 1, b"m", registry.cloud.targets_json())
    with pytest.raises(TrustError) as refusal:
        registry.cloud.commit(signed)
    assert refusal.value.reason == "expired-metadata"


@pytest.mark.parametrize("garbage", [b"", b"{}", b"[" * 5000, b"x" * 5_000_001])
def test_garbage_is_refused(registry: Registry, garbage: bytes) -> None:
    with pytest.raises(TrustError):
        registry.cloud.commit(garbage)


def test_metadata_of_another_role_is_refused(registry: Registry) -> None:
    with pytest.raises(TrustError):
        registry.cloud.commit(registry.cloud.metadata("timestamp.json"))


def test_the_operator_cannot_replace_a_manifest(registry: Registry) -> None:
    registry.publish("triage", 1)
    with pytest.raises(ConflictError):
        registry.operator.sign_manifest("triage", 1, b"another", registry.cloud.targets_json())


def test_signing_the_same_manifest_again_is_fine(registry: Registry) -> None:
    """A publish that broke off after the commit is tried again."""
    manifest = registry.publish("triage", 1)
    registry.cloud.commit(registry.operator.sign_manifest("triage", 1, manifest, registry.cloud.targets_json()))
    assert parse(registry.cloud.targets_json(), Targets).signed.version == 3


def test_a_publish_that_never_arrived_can_be_tried_again(registry: Registry) -> None:
    for _ in range(3):
        registry.operator.sign_manifest("triage", 1, b"lost", registry.cloud.targets_json())
    registry.publish("triage", 2)
    assert set(parse(registry.cloud.targets_json(), Targets).signed.targets) == {"triage/2/manifest.json"}


def test_the_operator_notices_a_cloud_that_went_back(registry: Registry) -> None:
    old = registry.cloud.targets_json()
    registry.publish("triage", 1)
    registry.publish("triage", 2)
    with pytest.raises(TrustError) as refusal:
        registry.operator.sign_manifest("triage", 3, b"m", old)
    assert refusal.value.reason == "rollback"


def test_the_operator_does_not_build_on_what_it_did_not_sign(registry: Registry) -> None:
    forged = _signed(registry, _nothing, key="cloud/snapshot.key")
    with pytest.raises(TrustError) as refusal:
        registry.operator.sign_manifest("triage", 1, b"m", forged)
    assert refusal.value.reason == "unsigned"


def test_the_operator_notices_a_wrong_key(registry: Registry) -> None:
    path = registry.workspace / "operator" / "targets.key"
    path.unlink()
    save_private_key(path, ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(ConfigError, match="not the targets key"):
        registry.operator.sign_manifest("triage", 1, b"m", registry.cloud.targets_json())


@pytest.mark.parametrize(("model", "version"), [("../x", 1), ("a/b", 1), ("triage", 0)])
def test_the_operator_refuses_names_that_are_no_paths(registry: Registry, model: str, version: int) -> None:
    with pytest.raises(InputError):
        registry.operator.sign_manifest(model, version, b"m", registry.cloud.targets_json())


@pytest.mark.parametrize(
    "name",
    [
        "../snapshot.key",
        "..%2Fsnapshot.key",
        "/etc/passwd",
        "timestamp.json/../../snapshot.key",
        "root.json",
        "0.root.json",
        "9.root.json",
        "1.root.json\n",
        "1.root.json\0",
        ".timestamp.json.1.new",
        "",
    ],
)
def test_only_metadata_is_served(registry: Registry, name: str) -> None:
    with pytest.raises(NotFoundError):
        registry.cloud.metadata(name)


def test_a_crash_before_the_timestamp_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    first = registry.publish("triage", 1)
    folder = registry.workspace / "cloud" / "tuf"
    (folder / "3.targets.json").write_bytes(b"half a fi")
    (folder / "3.snapshot.json").write_bytes(b"")
    assert registry.device(tmp_path / "device").manifest("triage", 1) == first
    second = registry.publish("triage", 2)
    assert registry.device(tmp_path / "device").manifest("triage", 2) == second


@pytest.mark.parametrize("clouds", [1, 8])
def test_of_two_publishes_at_once_one_wins(registry: Registry, clouds: int) -> None:
    current = registry.cloud.targets_json()
    offers = [registry.operator.sign_manifest("triage", version, b"m%d" % version, current) for version in range(1, 9)]
    served = [registry.cloud, *(CloudRepository(registry.workspace / "cloud") for _ in range(clouds - 1))]

    def commit(offer: bytes) -> str:
        try:
            served[offers.index(offer) % clouds].commit(offer)
        except IsthmusError as error:
            return error.reason
        return "committed"

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(commit, offers))
    assert sorted(outcomes) == ["committed"] + ["stale-metadata"] * 7
    assert registry.cloud.targets_json() == offers[outcomes.index("committed")]


def test_the_cloud_signs_again_in_time(registry: Registry) -> None:
    now = datetime.now(UTC)

    def state() -> tuple[int, int, datetime]:
        timestamp = parse(registry.cloud.metadata("timestamp.json"), Timestamp).signed
        return timestamp.version, timestamp.snapshot_meta.version, timestamp.expires

    version, snapshot, _ = state()
    assert not registry.cloud.refresh_if_due(now + timedelta(hours=11))
    assert state()[:2] == (version, snapshot)
    assert registry.cloud.refresh_if_due(now + timedelta(hours=13))
    assert state()[:2] == (version + 1, snapshot)
    assert registry.cloud.refresh_if_due(now + timedelta(days=4))
    assert state()[:2] == (version + 2, snapshot + 1)
    assert abs(state()[2] - (now + timedelta(days=5))) < timedelta(seconds=2)


def test_a_folder_without_a_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        CloudRepository(tmp_path)
