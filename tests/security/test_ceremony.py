"""Who may sign, and how that changes: by the real operator folder, the real cloud, and a device that watches both."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from isthmus.digests import sha256_bytes
from isthmus.errors import ConfigError, ConflictError, InputError, NotFoundError, TrustError
from security.ceremony import CANDIDATE, Ceremony, load_public_key, new_key_pair, new_publisher, sign_file
from security.metadata import Root, Targets, parse
from security.repository import CloudRepository, OperatorRepository
from security.workspace import Holders, init_workspace
from tests.security.registry import Registry


@pytest.fixture
def registry(own_workspace: Path) -> Registry:
    return Registry(own_workspace)


@pytest.fixture
def shared(tmp_path: Path) -> Registry:
    """Three root keys, two of which must sign; two targets keys, both must. One of each is on a stick."""
    holders = Holders(root_keys=3, root_threshold=2, targets_keys=2, targets_threshold=2)
    init_workspace(tmp_path / "workspace", ["localhost"], "acme", datetime.now(UTC), holders=holders)
    (tmp_path / "stick").mkdir()
    for name in ("root-2.key", "root-3.key", "targets-2.key"):
        (tmp_path / "workspace" / "operator" / name).rename(tmp_path / "stick" / name)
    return Registry(tmp_path / "workspace")


def _ceremony(registry: Registry, *keys: Path) -> Ceremony:
    return Ceremony(registry.workspace / "operator", keys=keys)


def _new_key(folder: Path, name: str) -> Path:
    return new_key_pair(folder / f"{name}.key")


def _accept(registry: Registry, *files: Path) -> None:
    registry.cloud.commit_all({file.name: file.read_bytes() for file in files}, known_only=True)


@pytest.mark.parametrize(
    "holders", [Holders(root_keys=0), Holders(root_keys=2, root_threshold=3), Holders(targets_keys=17)]
)
def test_thresholds_that_cannot_be_met_are_refused(tmp_path: Path, holders: Holders) -> None:
    with pytest.raises(InputError):
        init_workspace(tmp_path / "w", ["localhost"], "acme", datetime.now(UTC), holders=holders)
    assert not (tmp_path / "w").exists()


def test_a_root_is_signed_in_several_sessions(shared: Registry, tmp_path: Path) -> None:
    device = shared.device(tmp_path / "device")
    public = _new_key(shared.workspace / "cloud", "timestamp-2")
    progress = _ceremony(shared).rotate("timestamp", load_public_key(public))
    assert (progress.complete, progress.signed, progress.missing) == (False, 1, 1)
    with pytest.raises(TrustError) as refusal:  # not yet
        shared.cloud.commit_all({"2.root.json": progress.file.read_bytes()})
    assert refusal.value.reason == "wrong-threshold"
    elsewhere = tmp_path / "stick" / CANDIDATE
    shutil.copy(progress.file, elsewhere)
    assert sign_file(elsewhere, tmp_path / "stick" / "root-3.key").signed == 2
    shutil.copy(elsewhere, progress.file)
    done = _ceremony(shared).finish()
    assert done.complete
    assert done.file.name == "2.root.json"
    assert not progress.file.exists()
    _accept(shared, done.file)
    manifest = OperatorRepository(
        shared.workspace / "operator", keys=[tmp_path / "stick" / "targets-2.key"]
    ).sign_manifest("triage", 1, b"m", shared.cloud.targets_json())
    shared.cloud.commit(manifest)
    shared.manifests[sha256_bytes(b"m")] = b"m"
    assert device.manifest("triage", 1) == b"m"


def test_a_change_throws_signatures_away(shared: Registry, tmp_path: Path) -> None:
    ceremony = _ceremony(shared)
    progress = ceremony.renew()
    sign_file(progress.file, tmp_path / "stick" / "root-2.key")
    public = _new_key(tmp_path / "stick", "extra")
    assert ceremony.add("targets", load_public_key(public)).missing == 1
    assert len(parse(progress.file.read_bytes(), Root).signatures) == 1


def test_a_strangers_signature_does_not_count(shared: Registry, tmp_path: Path) -> None:
    progress = _ceremony(shared).renew()
    _new_key(tmp_path, "stranger")
    sign_file(progress.file, tmp_path / "stranger.key")
    assert _ceremony(shared).finish().missing == 1


def test_fewer_targets_keys_than_must_sign_cannot_publish(shared: Registry, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 of the targets keys"):
        shared.operator.sign_manifest("triage", 1, b"m", shared.cloud.targets_json())
    both = OperatorRepository(shared.workspace / "operator", keys=[tmp_path / "stick" / "targets-2.key"])
    shared.cloud.commit(both.sign_manifest("triage", 1, b"m", shared.cloud.targets_json()))


def test_without_a_ceremony_there_is_nothing_to_finish(registry: Registry) -> None:
    with pytest.raises(NotFoundError):
        _ceremony(registry).finish()


@pytest.mark.parametrize("role", ["snapshot", "timestamp"])
def test_the_clouds_keys_rotate(registry: Registry, tmp_path: Path, role: str) -> None:
    device = registry.device(tmp_path / "device")
    manifest = registry.publish("triage", 1)
    assert device.manifest("triage", 1) == manifest
    old = registry.workspace / "cloud" / f"{role}.key"
    public = _new_key(registry.workspace / "cloud", f"{role}-2")
    progress = _ceremony(registry).rotate(role, load_public_key(public))
    _accept(registry, progress.file)
    old.unlink()
    restarted = CloudRepository(registry.workspace / "cloud")
    registry.cloud = restarted
    assert device.manifest("triage", 1) == manifest
    second = registry.publish("triage", 2)
    assert device.manifest("triage", 2) == second


def test_a_cloud_without_the_new_key_does_not_take_the_root(registry: Registry, tmp_path: Path) -> None:
    progress = _ceremony(registry).rotate("snapshot", load_public_key(_new_key(tmp_path, "elsewhere")))
    before = registry.cloud.metadata("timestamp.json")
    with pytest.raises(ConfigError):
        _accept(registry, progress.file)
    assert registry.cloud.metadata("timestamp.json") == before
    with pytest.raises(NotFoundError):
        registry.cloud.metadata("2.root.json")


def test_a_targets_key_is_replaced_with_root_and_targets_together(registry: Registry, tmp_path: Path) -> None:
    device = registry.device(tmp_path / "device")
    manifest = registry.publish("triage", 1)
    operator = registry.workspace / "operator"
    public = _new_key(operator, "targets-2")
    progress = _ceremony(registry).rotate("targets", load_public_key(public))
    with pytest.raises(TrustError):  # alone it would leave what is served without a signature
        _accept(registry, progress.file)
    (operator / "targets.key").rename(tmp_path / "stolen.key")
    targets = _ceremony(registry).renew_targets()
    _accept(registry, progress.file, targets)
    assert device.manifest("triage", 1) == manifest
    second = registry.publish("triage", 2)
    assert device.manifest("triage", 2) == second


def test_the_root_key_itself_is_replaced(registry: Registry, tmp_path: Path) -> None:
    device = registry.device(tmp_path / "device")
    operator = registry.workspace / "operator"
    public = _new_key(operator, "root-2")
    _accept(registry, _ceremony(registry).rotate("root", load_public_key(public)).file)
    (operator / "root.key").unlink()
    _accept(registry, _ceremony(registry).renew().file)
    manifest = registry.publish("triage", 1)
    assert device.manifest("triage", 1) == manifest
    assert "3.root.json" in registry.asked


def test_keys_are_added_and_revoked_with_thresholds(registry: Registry, tmp_path: Path) -> None:
    ceremony = _ceremony(registry)
    ceremony.add("targets", load_public_key(_new_key(tmp_path, "second")))
    row = next(row for row in ceremony.roles() if row.role == "targets")
    assert (len(row.keyids), row.threshold) == (2, 1)
    with pytest.raises(InputError):
        ceremony.rotate("targets", load_public_key(_new_key(tmp_path, "third")))  # which one?
    ceremony.revoke("targets", row.keyids[0][:10])
    with pytest.raises(InputError):
        ceremony.revoke("targets", row.keyids[1], None)
    (registry.workspace / "operator" / "tuf" / CANDIDATE).unlink(missing_ok=True)
    with pytest.raises(NotFoundError):
        ceremony.revoke("targets", "abcdef")
    with pytest.raises(InputError):
        ceremony.add("mirrors", load_public_key(tmp_path / "second.pub"))
    with pytest.raises(InputError):
        ceremony.add("targets", load_public_key(tmp_path / "third.pub"), threshold=5)


def test_a_root_that_skips_or_repeats_is_refused(registry: Registry) -> None:
    first, second = _ceremony(registry).renew().file, _ceremony(registry).renew().file
    with pytest.raises(TrustError) as refusal:
        _accept(registry, second)
    assert refusal.value.reason == "stale-metadata"
    _accept(registry, first, second)
    with pytest.raises(TrustError):
        _accept(registry, second)


def test_a_crash_between_root_and_timestamp_is_mended_at_the_start(registry: Registry, tmp_path: Path) -> None:
    device = registry.device(tmp_path / "device")
    manifest = registry.publish("triage", 1)
    cloud = registry.workspace / "cloud"
    progress = _ceremony(registry).rotate("timestamp", load_public_key(_new_key(cloud, "timestamp-2")))
    shutil.copy(progress.file, cloud / "tuf" / progress.file.name)  # the root came, the timestamp did not
    (cloud / "timestamp.key").unlink()
    registry.cloud = CloudRepository(cloud)
    with pytest.raises(TrustError):
        device.manifest("triage", 1)
    assert registry.cloud.refresh_if_due(datetime.now(UTC))
    assert device.manifest("triage", 1) == manifest


# Publishers of single models


def _publisher(registry: Registry, folder: Path, pattern: str = "line-*") -> OperatorRepository:
    root = (registry.workspace / "trust" / "root.json").read_bytes()
    public = new_publisher(folder, "alice", root)
    _accept(registry, _ceremony(registry).delegate(pattern, "alice", [load_public_key(public)]))
    return OperatorRepository(folder)


def _publish(registry: Registry, publisher: OperatorRepository, model: str, version: int) -> bytes:
    manifest = f"{model} {version}".encode()
    registry.manifests[sha256_bytes(manifest)] = manifest
    try:
        own = registry.cloud.targets_json(publisher.role)
    except NotFoundError:
        own = None
    signed = publisher.sign_manifest(model, version, manifest, registry.cloud.targets_json(), current_own=own)
    registry.cloud.commit(signed, publisher.role)
    return manifest


def test_a_publisher_publishes_its_models_and_no_others(registry: Registry, tmp_path: Path) -> None:
    device = registry.device(tmp_path / "device")
    triage = registry.publish("triage", 1)
    alice = _publisher(registry, tmp_path / "alice")
    assert not (tmp_path / "alice" / "targets.key").exists()
    first, second = _publish(registry, alice, "line-1", 1), _publish(registry, alice, "line-2", 1)
    assert device.manifest("line-1", 1) == first
    assert device.manifest("line-2", 1) == second
    assert device.manifest("triage", 1) == triage
    with pytest.raises(InputError) as refusal:
        _publish(registry, alice, "triage", 2)
    assert refusal.value.reason == "not-delegated"


def test_the_cloud_refuses_a_publisher_who_oversteps(registry: Registry, tmp_path: Path) -> None:
    alice = _publisher(registry, tmp_path / "alice")
    alice._check_delegated = lambda *_: None  # type: ignore[method-assign]  # a publisher's own program
    with pytest.raises(TrustError) as refusal:
        _publish(registry, alice, "triage", 2)
    assert refusal.value.reason == "not-delegated"


def test_a_publisher_who_was_replaced_signs_in_vain(registry: Registry, tmp_path: Path) -> None:
    device = registry.device(tmp_path / "device")
    alice = _publisher(registry, tmp_path / "alice")
    _publish(registry, alice, "line-1", 1)
    public = _new_key(tmp_path, "publisher-alice")
    _accept(registry, _ceremony(registry).delegate("line-*", "alice", [load_public_key(public)]))
    with pytest.raises((TrustError, ConfigError)):
        _publish(registry, alice, "line-1", 2)
    with pytest.raises(TrustError) as refusal:  # until the new key has signed, devices get nothing of alice
        device.manifest("line-1", 1)
    assert refusal.value.reason == "unsigned"


def test_a_publisher_can_withdraw_what_it_published(registry: Registry, tmp_path: Path) -> None:
    device = registry.device(tmp_path / "device")
    alice = _publisher(registry, tmp_path / "alice")
    _publish(registry, alice, "line-1", 1)
    targets, own = registry.cloud.targets_json(), registry.cloud.targets_json(alice.role)
    registry.cloud.commit(alice.sign_withdrawal("line-1", 1, "bad light", targets, current_own=own), alice.role)
    assert device.target("line-1", 1).withdrawn == "bad light"
    assert registry.cloud.terms()["line-1/1/manifest.json"].withdrawn == "bad light"


def test_undelegated_models_are_no_longer_found(registry: Registry, tmp_path: Path) -> None:
    device = registry.device(tmp_path / "device")
    alice = _publisher(registry, tmp_path / "alice")
    _publish(registry, alice, "line-1", 1)
    _accept(registry, _ceremony(registry).undelegate("alice"))
    with pytest.raises(TrustError) as refusal:
        device.manifest("line-1", 1)
    assert refusal.value.reason == "not-published"
    with pytest.raises(NotFoundError):
        _ceremony(registry).undelegate("alice")


def test_a_delegation_that_has_not_reached_the_cloud_is_not_lost(registry: Registry, tmp_path: Path) -> None:
    public = _new_key(tmp_path, "publisher-alice")
    _ceremony(registry).delegate("line-*", "alice", [load_public_key(public)])
    with pytest.raises(ConflictError) as refusal:
        registry.operator.sign_manifest("triage", 1, b"m", registry.cloud.targets_json())
    assert refusal.value.reason == "not-accepted"


def test_metadata_alone_makes_no_version_known(registry: Registry) -> None:
    signed = registry.operator.sign_manifest("triage", 1, b"m", registry.cloud.targets_json())
    with pytest.raises(TrustError) as refusal:
        registry.cloud.commit_all({"targets.json": signed}, known_only=True)
    assert refusal.value.reason == "not-published"


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "evil.json", "../targets.json", "2.targets.json"])
def test_only_what_operators_sign_is_taken_in(registry: Registry, name: str) -> None:
    with pytest.raises(TrustError):
        registry.cloud.commit_all({name: registry.cloud.metadata("timestamp.json")}, known_only=True)


@pytest.mark.parametrize(("pattern", "name"), [("a/b", "alice"), ("", "alice"), ("line", "al/ice"), ("line", "")])
def test_delegations_that_mean_nothing_are_refused(registry: Registry, tmp_path: Path, pattern: str, name: str) -> None:
    public = _new_key(tmp_path, "k")
    with pytest.raises(InputError):
        _ceremony(registry).delegate(pattern, name, [load_public_key(public)])


# Withdrawals


def test_a_version_is_withdrawn(registry: Registry, tmp_path: Path) -> None:
    device = registry.device(tmp_path / "device")
    registry.publish("triage", 1, rollback_floor=0)
    registry.publish("triage", 2, rollback_floor=1)
    assert device.manifest("triage", 2)
    registry.cloud.commit_all(
        {"targets.json": registry.operator.sign_withdrawal("triage", 2, "NaN", registry.cloud.targets_json())},
        known_only=True,
    )
    with pytest.raises(TrustError) as refusal:
        device.manifest("triage", 2)
    assert refusal.value.reason == "withdrawn"
    signed = device.target("triage", 2)
    assert (signed.rollback_floor, signed.withdrawn) == (1, "NaN")
    with pytest.raises(NotFoundError):
        registry.operator.sign_withdrawal("triage", 9, "why", registry.cloud.targets_json())
    with pytest.raises(InputError):
        registry.operator.sign_withdrawal("triage", 1, " ", registry.cloud.targets_json())


@pytest.mark.parametrize(
    "custom",
    [
        [],
        {"rollback_floor": -1},
        {"rollback_floor": True},
        {"rollback_floor": "1"},
        {"withdrawn": ""},
        {"withdrawn": "x" * 501},
        {"withdrawn": 1},
    ],
)
def test_terms_of_another_form_are_refused(registry: Registry, tmp_path: Path, custom: object) -> None:
    registry.publish("triage", 1)

    def change(targets: Targets) -> None:
        targets.targets["triage/1/manifest.json"].unrecognized_fields["custom"] = custom

    file = _ceremony(registry).sign_targets(change)
    with pytest.raises(TrustError) as refusal:
        _accept(registry, file)
    assert refusal.value.reason == "malformed-metadata"


def test_renewed_targets_live_longer(registry: Registry) -> None:
    later = datetime.now(UTC) + timedelta(days=100)
    file = Ceremony(registry.workspace / "operator", clock=lambda: later).renew_targets()
    _accept(registry, file)
    assert parse(registry.cloud.targets_json(), Targets).signed.expires > later + timedelta(days=364)
