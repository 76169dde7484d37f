"""The attacks that The Update Framework lists, against a device: each is refused with its own reason, and the device
converges on the right version as soon as the attacker is gone.

https://theupdateframework.github.io/specification/latest/#goals-for-specific-attacks-to-protect-against. The attacker
sits between device and cloud, or holds keys that were stolen; slow retrieval needs a real channel and is in
tests/edge/test_fetcher.py (`too-slow`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from isthmus.errors import IsthmusError
from security.metadata import DelegatedRole, Delegations, Targets
from security.trust import TrustedManifests
from tests.security.simulator import Simulator, new_signer, trusted_versions

ONE, TWO, EVIL = b"version one", b"version two", b"evil"


class Site:
    """A registry with version 1 and 2 of a model, and a device that has seen the first."""

    def __init__(self, folder: Path) -> None:
        self.repo = Simulator()
        self.folder = folder
        self.repo.add_manifest(ONE)
        self.repo.publish("targets", "snapshot", "timestamp")
        assert self.ask(1) == ONE
        self.before = dict(self.repo.served)
        self.repo.add_manifest(TWO, version=2)
        self.repo.publish("targets", "snapshot", "timestamp")

    def ask(self, version: int) -> bytes | str:
        """Return the manifest, or why the device refused."""
        try:
            return self.repo.device(self.folder).manifest("triage", version)
        except IsthmusError as error:
            return error.reason

    def attack_fails(self, *reasons: str, version: int = 2) -> None:
        """Check the refusal, and that what lists manifests is still what it was."""
        kept = trusted_versions(self.folder)["targets"]
        assert self.ask(version) in reasons
        assert trusted_versions(self.folder)["targets"] == kept


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "device")


def test_arbitrary_software(site: Site) -> None:
    site.repo.change = lambda name, data: EVIL if name.startswith("targets/") else data
    assert site.ask(2) == "digest-mismatch"
    site.repo.change = lambda _, data: data
    assert site.ask(2) == TWO


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_arbitrary_software_signed_by_a_stranger(site: Site, role: str) -> None:
    honest = dict(site.repo.served)
    keys = site.repo.signers[role]
    stranger = new_signer()
    site.repo.signers[role] = {stranger.public_key.keyid: stranger}
    site.repo.add_manifest(EVIL, version=3)
    site.repo.publish("targets", "snapshot", "timestamp")
    site.attack_fails("unsigned", version=3)
    site.repo.served, site.repo.signers[role] = honest, keys
    for name in ("targets", "snapshot", "timestamp"):
        site.repo.publish(name)
    assert site.ask(2) == TWO


def test_rollback(site: Site) -> None:
    assert site.ask(2) == TWO
    site.repo.served["timestamp.json"] = site.before["timestamp.json"]
    site.attack_fails("rollback")


def test_freeze(site: Site) -> None:
    """The old state, served for ever: while it is fresh it is only old; then it is refused."""
    now = dict(site.repo.served)
    site.repo.served = dict(site.before)
    assert site.ask(2) == "not-published"
    site.repo.now += timedelta(days=31)
    site.attack_fails("freeze")
    site.repo.served = now
    for role in site.repo.roles.values():
        role.expires = site.repo.now + timedelta(days=1)
    site.repo.publish()
    assert site.ask(2) == TWO


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_fast_forward_is_recovered_from_by_new_keys(site: Site, role: str) -> None:
    """A thief of the cloud's keys raises a version so high that honest ones look old; a new root ends that."""
    site.repo[role].version = 2**31
    for name in ("targets", "snapshot", "timestamp"):
        site.repo.publish(name)
    assert site.ask(2) == TWO  # nothing to notice yet
    site.repo[role].version = 3
    site.repo.publish("targets", "snapshot", "timestamp")
    site.attack_fails("rollback")
    site.repo.rotate("snapshot")
    site.repo.rotate("timestamp")
    site.repo.publish()
    assert site.ask(2) == TWO
    assert trusted_versions(site.folder)[role] < 2**31


@pytest.mark.parametrize("name", ["snapshot", "targets"])
def test_mix_and_match(site: Site, name: str) -> None:
    """A file of another state of the repository, itself signed and not expired."""
    site.repo.change = lambda asked, data: site.before[f"2.{name}.json"] if asked == f"3.{name}.json" else data
    site.attack_fails("mix-and-match")
    site.repo.change = lambda _, data: data
    assert site.ask(2) == TWO


@pytest.mark.parametrize("name", ["4.root.json", "timestamp.json", "3.snapshot.json", "3.targets.json", "targets/"])
def test_endless_data(site: Site, name: str) -> None:
    site.repo.publish("root")
    site.repo.publish("root")
    site.repo.served["4.root.json"] = b""

    def endless(asked: str) -> Iterator[bytes]:
        return itertools.repeat(b" " * 65536) if asked.startswith(name) else site.repo.fetch(asked)

    device = TrustedManifests(site.folder, site.repo.trusted_root, endless, clock=lambda: site.repo.now)
    if name != "4.root.json":
        del site.repo.served["4.root.json"]
    with pytest.raises(IsthmusError) as refusal:
        device.manifest("triage", 2)
    assert refusal.value.reason == "too-long"


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_wrong_threshold(site: Site, role: str) -> None:
    """One of two keys was stolen."""
    site.repo.add_key(role)
    site.repo.root.roles[role].threshold = 2
    site.repo.publish()
    assert site.ask(2) == TWO
    stolen = dict([next(iter(site.repo.signers[role].items()))])
    site.repo.signers[role] = stolen
    site.repo.add_manifest(EVIL, version=3)
    site.repo.publish()
    site.attack_fails("wrong-threshold", version=3)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_revoked_key(site: Site, role: str) -> None:
    stolen = dict(site.repo.signers[role])
    site.repo.rotate(role)
    site.repo.publish()
    assert site.ask(2) == TWO
    site.repo.signers[role] = stolen
    site.repo.add_manifest(EVIL, version=3)
    site.repo.publish("targets", "snapshot", "timestamp")
    site.attack_fails("revoked-key", version=3)


def test_revoked_root_key(site: Site) -> None:
    stolen = dict(site.repo.signers["root"])
    site.repo.rotate("root")
    site.repo.signers["root"] |= stolen  # the change itself is signed by both
    site.repo.publish("root")
    assert site.ask(2) == TWO
    site.repo.signers["root"] = stolen
    site.repo.publish("root")
    site.attack_fails("revoked-key")


@pytest.mark.parametrize(
    ("role", "reason"),
    [("root", "expired-metadata"), ("targets", "expired-metadata"), ("snapshot", "freeze"), ("timestamp", "freeze")],
)
def test_expired_metadata(site: Site, role: str, reason: str) -> None:
    site.repo[role].expires = site.repo.now - timedelta(seconds=1)
    site.repo.publish()
    site.attack_fails(reason)
    site.repo[role].expires = site.repo.now + timedelta(days=1)
    site.repo.publish()
    assert site.ask(2) == TWO


def test_a_publisher_cannot_sign_for_anothers_model(site: Site) -> None:
    targets = site.repo["targets"]
    targets.delegations = Delegations(
        {}, {"publisher-a": DelegatedRole("publisher-a", [], 1, terminating=True, paths=["line-*/*/manifest.json"])}
    )
    site.repo.roles["publisher-a"] = Targets(expires=targets.expires)
    site.repo.add_key("publisher-a", delegator=targets)
    site.repo.add_manifest(b"mine", role="publisher-a", model="line-1")
    site.repo.add_manifest(EVIL, version=3, role="publisher-a")
    site.repo.sign("publisher-a")
    site.repo.publish("targets", "snapshot", "timestamp")
    assert site.repo.device(site.folder).manifest("line-1", 1) == b"mine"
    assert site.ask(3) == "not-published"


def test_a_device_that_was_away_for_ninety_days_converges(site: Site) -> None:
    """What it kept is long expired, two roots have come since, and the cloud's keys are others."""
    for _ in range(2):
        site.repo.rotate("timestamp")
        site.repo.rotate("snapshot")
        site.repo.publish("root")
    site.repo.now += timedelta(days=90)
    for role in site.repo.roles.values():
        role.expires = site.repo.now + timedelta(days=1)
    site.repo.publish()
    assert site.ask(2) == TWO
    assert trusted_versions(site.folder)["root"] == 4


def test_a_withdrawn_version_is_not_installed(site: Site) -> None:
    site.repo["targets"].targets["triage/2/manifest.json"].unrecognized_fields["custom"] = {"withdrawn": "NaN at night"}
    site.repo.publish("targets", "snapshot", "timestamp")
    assert site.ask(2) == "withdrawn"
    assert site.repo.device(site.folder).target("triage", 2).withdrawn == "NaN at night"
    assert site.ask(1) == ONE
