"""The documented cases of the public tuf-conformance suite, against the device's client.

https://github.com/theupdateframework/tuf-conformance (tuf_conformance/test_*.py) drives a client program against a
repository server; here the client is `security.trust.TrustedManifests` and the repository is in this process. Each test
has the name that its case has there, so that the two can be held side by side. Where a case is about freedom that the
specification leaves to clients, the test states what ours does, with its reason code.

Not here, because a device cannot ask for it: artifacts by free path (a device asks for MODEL/VERSION/manifest.json),
the artifact's file name on disk, `test_faketime` (the clock is injected), and `test_static_repository`, whose stored
repositories hold artifacts under free paths.
"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from isthmus.errors import IsthmusError, TrustError, UnavailableError
from security.metadata import CryptoSigner, DelegatedRole, Delegations, Metadata, MetaFile, TargetFile, Targets
from security.trust import TrustedManifests
from tests.security.simulator import TOP_LEVEL, Simulator, new_signer, trusted_versions

MANIFEST = b'{"name": "triage", "version": 1}'


class Case:
    """A repository with one manifest, and a device that has seen nothing yet."""

    def __init__(self, folder: Path) -> None:
        self.repo = Simulator()
        self.repo.add_manifest(MANIFEST)
        self.repo.publish("targets", "snapshot", "timestamp")  # version 2; root stays 1
        self.folder = folder
        self.device: TrustedManifests = self.repo.device(folder)

    def refresh(self) -> str:
        """Look for newer metadata; return the refusal's reason, or nothing."""
        try:
            manifest = self.repo.device(self.folder).manifest("triage", 1)
        except IsthmusError as error:
            return error.reason
        assert manifest == MANIFEST
        return ""

    @property
    def trusted(self) -> dict[str, int]:
        return trusted_versions(self.folder)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path / "device")


# test_basic.py


def test_basic_refresh_requests(case: Case) -> None:
    assert case.refresh() == ""
    assert case.repo.asked[:4] == ["2.root.json", "timestamp.json", "2.snapshot.json", "2.targets.json"]


def test_basic_refresh_trusted_data(case: Case) -> None:
    assert case.refresh() == ""
    assert case.trusted == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2}


def test_implicit_refresh(case: Case) -> None:
    case.refresh()
    case.repo.add_manifest(b"second", version=2)
    case.repo.publish("targets", "snapshot", "timestamp")
    assert case.repo.device(case.folder).manifest("triage", 2) == b"second"


@pytest.mark.parametrize("root", [b"", b"{}", b'{"signed": {}, "signatures": []}'])
def test_invalid_initial_root(case: Case, root: bytes) -> None:
    case.repo.trusted_root = root
    assert case.refresh() == "malformed-metadata"
    assert case.repo.asked == []


def test_unsigned_initial_root(case: Case) -> None:
    root = json.loads(case.repo.trusted_root)
    root["signatures"][0]["sig"] = "b6" * 64
    case.repo.trusted_root = json.dumps(root).encode()
    assert case.refresh() == "malformed-metadata"
    assert case.repo.asked == []


@pytest.mark.parametrize(
    ("role", "trusted"),
    [
        ("root", {"root": 1}),
        ("timestamp", {"root": 2}),
        ("snapshot", {"root": 2, "timestamp": 3}),
        ("targets", {"root": 2, "timestamp": 3, "snapshot": 3}),
    ],
)
def test_unsigned_metadata(case: Case, role: str, trusted: dict[str, int]) -> None:
    case.repo.signers[role].popitem()
    case.repo.publish()
    assert case.refresh() == "unsigned"
    assert case.trusted == trusted


@pytest.mark.parametrize(
    ("role", "trusted", "reason"),
    [
        ("root", {"root": 1}, "rollback"),
        ("snapshot", {"root": 2, "timestamp": 3}, "mix-and-match"),
        ("targets", {"root": 2, "timestamp": 3, "snapshot": 3}, "mix-and-match"),
    ],
)
def test_url_and_metadata_version_mismatch(case: Case, role: str, trusted: dict[str, int], reason: str) -> None:
    case.repo.hashes = False

    def later(name: str, data: bytes) -> bytes:
        if not name.endswith(f".{role}.json"):
            return data
        metadata = Metadata[Any].from_bytes(data)
        metadata.signed.version += 1
        metadata.signatures.clear()
        for signer in case.repo.signers[role].values():
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    case.repo.publish()
    case.repo.change = later
    assert case.refresh() == reason
    assert case.trusted == trusted


def test_timestamp_content_changes(case: Case) -> None:
    case.refresh()
    case.repo["timestamp"].snapshot_meta = MetaFile(100)
    case.repo.sign("timestamp")  # other content, same version
    case.repo.asked.clear()
    assert case.refresh() == ""
    assert case.repo.asked[-1] == "timestamp.json"
    kept = Metadata[Any].from_file(str(case.folder / "metadata" / "timestamp.json"))
    assert kept.signed.snapshot_meta.version == 2


@pytest.mark.parametrize("hashes", [False, True])
def test_basic_metadata_hash_support(case: Case, hashes: bool) -> None:
    case.repo.hashes = hashes
    case.repo.publish()
    assert case.refresh() == ""
    assert case.trusted == {"root": 2, "timestamp": 3, "snapshot": 3, "targets": 3}


@pytest.mark.parametrize(("role", "above"), [("targets", "snapshot"), ("snapshot", "timestamp")])
def test_targets_and_snapshot_hash_mismatch(case: Case, role: str, above: str) -> None:
    """test_targets_hash_mismatch and test_snapshot_hash_mismatch."""
    case.refresh()
    case.repo.publish("targets", "snapshot", "timestamp")
    entry = case.repo["snapshot"].meta["targets.json"] if role == "targets" else case.repo["timestamp"].snapshot_meta
    entry.hashes = {"sha256": "0" * 64}
    case.repo.sign(above)
    if above == "snapshot":
        case.repo.sign("timestamp")
    assert case.refresh() == "mix-and-match"  # what came is signed, but not what belongs there
    assert case.trusted[role] == 2


def test_metadata_bytes_match(case: Case) -> None:
    spaced = json.dumps(json.loads(case.repo.served["timestamp.json"]), indent=7).encode()
    case.repo.served["timestamp.json"] = spaced
    assert case.refresh() == ""
    assert (case.folder / "metadata" / "timestamp.json").read_bytes() == spaced


def test_custom_fields(case: Case) -> None:
    for role in TOP_LEVEL:
        case.repo[role].unrecognized_fields["x-extra"] = {"a": [1, "two"]}
    case.repo["targets"].targets["triage/1/manifest.json"].unrecognized_fields["custom"] = {"colour": "green"}
    case.repo.publish()
    assert case.refresh() == ""


def test_deprecated_keyid_hash_algorithms(case: Case) -> None:
    key = next(iter(case.repo.root.keys.values()))
    key.unrecognized_fields["keyid_hash_algorithms"] = "md5"
    case.repo.publish()
    assert case.refresh() == ""
    assert case.trusted["root"] == 2


@pytest.mark.parametrize(
    ("name", "trusted"),
    [
        ("timestamp.json", {"root"}),
        ("2.snapshot.json", {"root", "timestamp"}),
        ("2.targets.json", {"root", "timestamp", "snapshot"}),
    ],
)
def test_404(case: Case, name: str, trusted: set[str]) -> None:
    """test_timestamp_404, test_snapshot_404 and test_targets_404."""
    del case.repo.served[name]
    with pytest.raises(UnavailableError):
        case.device.manifest("triage", 1)
    assert set(case.trusted) == trusted


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_incorrect_metadata_type(case: Case, role: str) -> None:
    case.repo.hashes = False
    case.repo.publish()
    other = "snapshot" if role == "timestamp" else "timestamp"

    def swap(name: str, data: bytes) -> bytes:
        if name.split(".")[-2] != role:
            return data
        return case.repo.served["timestamp.json" if other == "timestamp" else "3.snapshot.json"]

    case.repo.change = swap
    assert case.refresh() == "malformed-metadata"
    assert role not in case.trusted or case.trusted[role] == 1


# test_expiration.py


def _expire(case: Case, role: str) -> None:
    case.repo[role].expires = case.repo.now - timedelta(seconds=1)


@pytest.mark.parametrize(
    ("role", "reason", "trusted"),
    [
        ("root", "expired-metadata", {"root": 2}),
        ("timestamp", "freeze", {"root": 2}),
        ("snapshot", "freeze", {"root": 2, "timestamp": 3}),
        ("targets", "expired-metadata", {"root": 2, "timestamp": 3, "snapshot": 3}),
    ],
)
def test_expired(case: Case, role: str, reason: str, trusted: dict[str, int]) -> None:
    """test_root_expired, test_timestamp_expired, test_snapshot_expired and test_targets_expired."""
    _expire(case, role)
    case.repo.publish()
    assert case.refresh() == reason
    assert case.trusted == trusted


def test_expired_local_root(case: Case) -> None:
    """The chain of roots is followed although the one that the device has is long expired."""
    case.refresh()
    case.repo.now += timedelta(days=900)
    for role in TOP_LEVEL:
        case.repo[role].expires = case.repo.now + timedelta(days=1)
    case.repo.publish()
    case.repo.publish("root")
    assert case.refresh() == ""
    assert case.trusted == {"root": 3, "timestamp": 3, "snapshot": 3, "targets": 3}


def test_expired_local_timestamp(case: Case) -> None:
    case.repo["timestamp"].expires = case.repo.now + timedelta(days=1)
    case.repo.publish("timestamp")
    assert case.refresh() == ""
    case.repo.now += timedelta(days=2)
    assert case.refresh() == "freeze"
    case.repo["timestamp"].expires = case.repo.now + timedelta(days=1)
    case.repo.publish("timestamp")
    assert case.refresh() == ""


# test_file_download.py


def test_client_downloads_expected_file(case: Case) -> None:
    assert case.device.manifest("triage", 1) == MANIFEST
    with pytest.raises(TrustError) as refusal:
        case.device.manifest("triage", 2)
    assert refusal.value.reason == "not-published"


def test_repository_substitutes_target_file(case: Case) -> None:
    other = b"another manifest, also signed, of another version"
    case.repo.add_manifest(other, version=2)
    case.repo.publish("targets", "snapshot", "timestamp")
    case.repo.change = lambda name, data: other if name.startswith("targets/") else data
    assert case.repo.device(case.folder).manifest("triage", 2) == other
    assert case.refresh() in {"too-long", "digest-mismatch"}
    case.repo.change = lambda _, data: data
    assert case.refresh() == ""


@pytest.mark.parametrize("wrong", [MANIFEST[:-1], MANIFEST[:-1] + b" ", MANIFEST + b" "])
def test_multiple_changes_to_target(case: Case, wrong: bytes) -> None:
    case.repo.change = lambda name, data: wrong if name.startswith("targets/") else data
    assert case.refresh() in {"too-long", "digest-mismatch"}
    case.repo.change = lambda _, data: data
    assert case.refresh() == ""


@pytest.mark.parametrize("hashes", [{"sha512": "0" * 128}, {"sha256": "0" * 64, "sha512": "0" * 128}, {"md5": "00"}])
def test_download_with_hash_algorithms(case: Case, hashes: dict[str, str]) -> None:
    """Also test_download_with_unknown_hash_algorithm: a device takes SHA-256 and nothing else."""
    path = "triage/1/manifest.json"
    case.repo["targets"].targets[path] = TargetFile(len(MANIFEST), hashes, path)
    case.repo.publish("targets", "snapshot", "timestamp")
    assert case.refresh() == TrustError.reason


def test_artifact_cache(case: Case) -> None:
    case.refresh()
    case.repo.asked.clear()
    assert case.refresh() == ""
    assert not any(name.startswith("targets/") for name in case.repo.asked)


# test_keys.py


def test_snapshot_does_not_meet_threshold(case: Case) -> None:
    case.repo.root.roles["snapshot"].threshold = 3
    case.repo.add_key("snapshot")
    case.repo.add_key("snapshot")
    case.repo.publish()
    assert case.refresh() == ""
    case.repo.signers["snapshot"].popitem()
    case.repo.publish("targets", "snapshot", "timestamp")
    assert case.refresh() == "wrong-threshold"
    assert case.trusted["snapshot"] == 3


def test_snapshot_has_too_few_keys(case: Case) -> None:
    for _ in range(4):
        case.repo.add_key("snapshot")
    case.repo.root.roles["snapshot"].threshold = 6
    case.repo.publish()
    assert case.refresh() == "wrong-threshold"
    assert case.trusted == {"root": 2, "timestamp": 3}


def test_duplicate_keys(case: Case) -> None:
    """One key under its id several times, and its signature several times."""
    case.repo.hashes = False
    case.repo.root.roles["snapshot"].threshold = 6
    case.repo.publish()
    root = json.loads(case.repo.served["2.root.json"])
    root["signed"]["roles"]["snapshot"]["keyids"] *= 6
    case.repo.served["2.root.json"] = json.dumps(root).encode()
    assert case.refresh() in {"malformed-metadata", "unsigned"}
    snapshot = json.loads(case.repo.served["3.snapshot.json"])
    snapshot["signatures"] *= 6
    case.repo.served["3.snapshot.json"] = json.dumps(snapshot).encode()
    case.repo.sign("root")
    assert case.refresh() == "malformed-metadata"
    assert "snapshot" not in case.trusted


def test_duplicate_sig_keyids(case: Case) -> None:
    timestamp = json.loads(case.repo.served["timestamp.json"])
    timestamp["signatures"] *= 2
    case.repo.served["timestamp.json"] = json.dumps(timestamp).encode()
    assert case.refresh() == "malformed-metadata"
    assert "timestamp" not in case.trusted


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_keytype_and_scheme(case: Case, kind: str) -> None:
    signer = {
        "rsa": lambda: CryptoSigner(rsa.generate_private_key(65537, 2048)),
        "ecdsa": lambda: CryptoSigner(ec.generate_private_key(ec.SECP256R1())),
        "ed25519": new_signer,
    }[kind]()
    case.repo.add_key("root", signer)
    case.repo.root.roles["root"].threshold = 2
    case.repo.publish("root")
    assert case.refresh() == ""
    assert case.trusted["root"] == 2
    case.repo.publish("root")
    broken = Metadata[Any].from_bytes(case.repo.served["3.root.json"])
    signature = broken.signatures[signer.public_key.keyid]
    signature.signature = signature.signature[:-2] + ("00" if signature.signature[-2:] != "00" else "11")
    case.repo.served["3.root.json"] = broken.to_bytes()
    assert case.refresh() == "wrong-threshold"
    assert case.trusted["root"] == 2


@pytest.mark.parametrize("garbage", ["", "other"])
def test_invalid_sig_in_valid_metadata(case: Case, garbage: str) -> None:
    second = case.repo.add_key("timestamp")
    case.repo.publish()
    timestamp = Metadata[Any].from_bytes(case.repo.served["timestamp.json"])
    good = next(value for key, value in timestamp.signatures.items() if key != second.public_key.keyid)
    timestamp.signatures[second.public_key.keyid].signature = good.signature if garbage else ""
    case.repo.served["timestamp.json"] = timestamp.to_bytes()
    assert case.refresh() == ""


# test_rollback.py


def test_new_timestamp_version_rollback(case: Case) -> None:
    old = case.repo.served["timestamp.json"]
    case.repo.publish("timestamp")
    case.refresh()
    case.repo.served["timestamp.json"] = old
    assert case.refresh() == "rollback"
    assert case.trusted["timestamp"] == 3


@pytest.mark.parametrize("hashes", [False, True], ids=["basic", "with hashes"])
def test_snapshot_rollback(case: Case, hashes: bool) -> None:
    case.repo.hashes = hashes
    case.repo.publish("targets", "snapshot", "timestamp")
    case.refresh()
    case.repo["snapshot"].version = 1
    case.repo.publish("snapshot", "timestamp")  # snapshot 2 again
    assert case.refresh() == "rollback"
    assert case.trusted["snapshot"] == 3


def test_targets_role_removal(case: Case) -> None:
    case.repo.roles["publisher-a"] = Targets(expires=case.repo["targets"].expires)
    case.repo.signers["publisher-a"] = {}
    case.repo.sign("publisher-a")
    case.repo.publish("snapshot", "timestamp")
    assert case.refresh() == ""
    del case.repo["snapshot"].meta["publisher-a.json"]
    case.repo.publish("snapshot", "timestamp")
    assert case.refresh() == "rollback"


def test_targets_fast_forward_recovery(case: Case) -> None:
    case.repo["targets"].version = 99999
    case.repo.publish("targets", "snapshot", "timestamp")
    assert case.refresh() == ""
    case.repo.rotate("snapshot")
    case.repo["targets"].version = 2
    case.repo.publish()
    assert case.refresh() == ""
    assert case.trusted["targets"] == 3


def test_new_snapshot_fast_forward_recovery(case: Case) -> None:
    case.repo["snapshot"].version = 99999
    case.repo.publish("snapshot", "timestamp")
    assert case.refresh() == ""
    case.repo.rotate("snapshot")
    case.repo.rotate("timestamp")
    case.repo["snapshot"].version = 2
    case.repo.publish()
    assert case.refresh() == ""
    assert case.trusted["snapshot"] == 3


def test_new_timestamp_fast_forward_recovery(case: Case) -> None:
    case.repo["timestamp"].version = 99999
    case.repo.publish("timestamp")
    assert case.refresh() == ""
    case.repo.rotate("timestamp")
    case.repo["timestamp"].version = 2
    case.repo.publish()
    assert case.refresh() == ""
    assert case.trusted["timestamp"] == 3


@pytest.mark.parametrize("hashes", [False, True], ids=["basic", "with hashes"])
def test_targets_rollback(case: Case, hashes: bool) -> None:
    case.repo.hashes = hashes
    case.repo.publish("targets", "snapshot", "timestamp")
    case.refresh()
    case.repo["targets"].version = 1
    case.repo.publish("targets", "snapshot", "timestamp")  # targets 2 again
    assert case.refresh() == "rollback"
    assert case.trusted["targets"] == 3


# test_updater_key_rotations.py


class Version(NamedTuple):
    """Keys of a role, how many must sign, and who did."""

    keys: list[int]
    threshold: int
    signed_by: list[int]


ROOTS: dict[str, tuple[bool, list[Version]]] = {
    "1-of-1-key-rotation": (True, [Version([1], 1, [1]), Version([2], 1, [2, 1]), Version([2], 1, [2])]),
    "1-of-1-key-rotation-unused-signatures": (
        True,
        [Version([1], 1, [3, 1, 4]), Version([2], 1, [3, 2, 1, 4]), Version([2], 1, [3, 2, 4])],
    ),
    "3-of-5-sign-with-different-keycombos": (
        True,
        [Version([0, 1, 2, 3, 4], 3, signed) for signed in ([0, 2, 4], [0, 4, 1], [0, 1, 3], [0, 1, 3])],
    ),
    "3-of-5-one-key-rotated": (
        True,
        [Version([0, 1, 2, 3, 4], 3, [0, 2, 4]), Version([0, 1, 3, 4, 5], 3, [0, 4, 1])],
    ),
    "3-of-5-one-key-rotated-with-intermediate-step": (
        True,
        [
            Version([0, 1, 2, 3, 4], 3, [0, 2, 4]),
            Version([0, 1, 3, 4, 5], 3, [0, 2, 4, 5]),
            Version([0, 1, 3, 4, 5], 3, [0, 4, 5]),
        ],
    ),
    "3-of-5-all-keys-rotated-with-intermediate-step": (
        True,
        [
            Version([0, 1, 2, 3, 4], 3, [0, 2, 4]),
            Version([5, 6, 7, 8, 9], 3, [0, 2, 4, 5, 6, 7]),
            Version([5, 6, 7, 8, 9], 3, [5, 6, 7]),
        ],
    ),
    "1-of-3-threshold-increase-to-2-of-3": (True, [Version([1, 2, 3], 1, [1]), Version([1, 2, 3], 2, [1, 2])]),
    "2-of-3-threshold-decrease-to-1-of-3": (
        True,
        [Version([1, 2, 3], 2, [1, 2]), Version([1, 2, 3], 1, [1, 2]), Version([1, 2, 3], 1, [1])],
    ),
    "1-of-2-threshold-increase-to-2-of-2": (True, [Version([1], 1, [1]), Version([1, 2], 2, [1, 2])]),
    "1-of-1-key-rotation-fail-not-signed-with-old-key": (False, [Version([1], 1, [1]), Version([2], 1, [2, 3, 4])]),
    "1-of-1-key-rotation-fail-not-signed-with-new-key": (False, [Version([1], 1, [1]), Version([2], 1, [1, 3, 4])]),
    "3-of-5-one-key-rotate-fails-not-signed-with-3-new-keys": (
        False,
        [Version([0, 1, 2, 3, 4], 3, [0, 2, 4]), Version([0, 1, 3, 4, 5], 3, [0, 2, 4])],
    ),
    "3-of-5-one-key-rotate-fails-not-signed-with-3-old-keys": (
        False,
        [Version([0, 1, 2, 3, 4], 3, [0, 2, 4]), Version([0, 1, 3, 4, 5], 3, [0, 4, 5])],
    ),
    "1-of-3-threshold-bump-to-2-of-3-fails-new-threshold-not-reached": (
        False,
        [Version([1, 2, 3], 1, [1]), Version([1, 2, 3], 2, [2])],
    ),
    "2-of-3-threshold-decr-to-1-of-3-fails-old-threshold-not-reached": (
        False,
        [Version([1, 2, 3], 2, [1, 2]), Version([1, 2, 3], 1, [1])],
    ),
}


def _set_keys(repo: Simulator, role: str, signers: list[CryptoSigner], version: Version) -> None:
    repo.root.roles[role].keyids.clear()
    repo.root.roles[role].threshold = version.threshold
    for number in version.keys:
        repo.root.add_key(signers[number].public_key, role)
    repo.signers[role] = {signers[number].public_key.keyid: signers[number] for number in version.signed_by}


@pytest.mark.parametrize(("accepted", "versions"), ROOTS.values(), ids=ROOTS)
def test_root_rotation(case: Case, accepted: bool, versions: list[Version]) -> None:
    signers = [new_signer() for _ in range(10)]
    case.repo.root.version = 0
    for version in versions:
        _set_keys(case.repo, "root", signers, version)
        case.repo.publish("root")
    case.repo.publish("targets", "snapshot", "timestamp")
    case.repo.trusted_root = case.repo.served["1.root.json"]
    assert case.refresh() in ({""} if accepted else {"unsigned", "wrong-threshold", "revoked-key"})
    assert case.trusted["root"] == len(versions) - (0 if accepted else 1)


OTHERS: dict[str, tuple[bool, Version]] = {
    "1-of-1-key-rotation": (True, Version([2], 1, [2])),
    "1-of-1-key-rotation-unused-signatures": (True, Version([1], 1, [3, 1, 4])),
    "1-of-1-key-rotation-fail-not-signed-with-new-key": (False, Version([2], 1, [1, 3, 4])),
    "3-of-5-one-key-signature-wrong-not-signed-with-3-expected-keys": (
        False,
        Version([0, 1, 3, 4, 5], 3, [0, 2, 4]),
    ),
    "2-of-5-one-key-signature-missing-threshold-not-reached": (False, Version([0, 1, 3, 4, 5], 3, [0, 4])),
    "3-of-5-sign-first-combo": (True, Version([0, 1, 2, 3, 4], 3, [0, 2, 4])),
    "3-of-5-sign-second-combo": (True, Version([0, 1, 2, 3, 4], 3, [0, 4, 1])),
    "3-of-5-sign-third-combo": (True, Version([0, 1, 2, 3, 4], 3, [0, 1, 3])),
    "3-of-5-sign-fourth-combo": (True, Version([0, 1, 2, 3, 4], 3, [1, 2, 3])),
    "3-of-5-sign-fifth-combo": (True, Version([0, 1, 2, 3, 4], 3, [2, 3, 4])),
}


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
@pytest.mark.parametrize(("accepted", "version"), OTHERS.values(), ids=OTHERS)
def test_non_root_rotations(case: Case, role: str, accepted: bool, version: Version) -> None:
    signers = [new_signer() for _ in range(10)]
    _set_keys(case.repo, role, signers, version)
    case.repo.publish()
    assert case.refresh() in ({""} if accepted else {"unsigned", "wrong-threshold"})
    assert (case.trusted.get(role) == 3) is accepted


# test_quoting_issues.py


@pytest.mark.parametrize("role", ["?", "#", "/delegatedrole", "../delegatedrole"])
def test_unusual_role_name(case: Case, role: str) -> None:
    _delegate(case, "targets", role, ["*/*/manifest.json"], terminating=False)
    case.repo.publish(role, "targets", "snapshot", "timestamp")
    with pytest.raises(TrustError) as refusal:
        case.device.manifest("other", 1)
    assert refusal.value.reason == "not-published"
    assert f"1.{role}.json" in case.repo.asked
    outside = [path for path in case.folder.parent.rglob("*delegatedrole*") if path.parent.name != "metadata"]
    assert outside == []


# test_updater_delegation_graphs.py


def _delegate(case: Case, delegator: str, role: str, paths: list[str], *, terminating: bool) -> None:
    above = case.repo[delegator]
    above.delegations = above.delegations or Delegations({}, {})
    above.delegations.roles[role] = DelegatedRole(role, [], 1, terminating, paths)
    if role not in case.repo.roles:
        case.repo.roles[role] = Targets(expires=case.repo["targets"].expires)
        case.repo.roles[role].version = 0
        case.repo.add_key(role, delegator=above)
    else:
        for signer in case.repo.signers[role].values():
            above.add_key(signer.public_key, role)


ALL = ["*/*/manifest.json"]
NONE = ["*/*/weights.bin"]
GRAPHS: dict[str, tuple[list[tuple[str, str, list[str], bool]], list[str]]] = {
    "basic-delegation": ([("targets", "A", ALL, False)], ["A"]),
    "single-level-delegations": ([("targets", "A", ALL, False), ("targets", "B", ALL, False)], ["A", "B"]),
    "two-level-delegations": (
        [("targets", "A", ALL, False), ("targets", "B", ALL, False), ("B", "C", ALL, False)],
        ["A", "B", "C"],
    ),
    "two-level-test-DFS-order-of-traversal": (
        [("targets", "A", ALL, False), ("targets", "B", ALL, False), ("A", "C", ALL, False), ("A", "D", ALL, False)],
        ["A", "C", "D", "B"],
    ),
    "three-level-delegation-test-DFS-order-of-traversal": (
        [("targets", "A", ALL, False), ("targets", "B", ALL, False), ("A", "C", ALL, False), ("C", "D", ALL, False)],
        ["A", "C", "D", "B"],
    ),
    "two-level-terminating-ignores-all-but-roles-descendants": (
        [("targets", "A", ALL, False), ("targets", "B", ALL, False), ("A", "C", ALL, True), ("A", "D", ALL, False)],
        ["A", "C"],
    ),
    "three-level-terminating-ignores-all-but-roles-descendants": (
        [("targets", "A", ALL, False), ("targets", "B", ALL, False), ("A", "C", ALL, True), ("C", "D", ALL, False)],
        ["A", "C", "D"],
    ),
    "two-level-ignores-all-branches-not-matching-paths": (
        [("targets", "A", NONE, False), ("targets", "B", ALL, False), ("A", "C", ALL, False)],
        ["B"],
    ),
    "three-level-ignores-all-branches-not-matching-paths": (
        [("targets", "A", ALL, False), ("targets", "B", ALL, False), ("A", "C", NONE, False), ("C", "D", ALL, False)],
        ["A", "B"],
    ),
    "cyclic-graph": (
        [
            ("targets", "A", ALL, False),
            ("targets", "B", ALL, False),
            ("B", "C", ALL, False),
            ("C", "D", ALL, False),
            ("D", "B", ALL, False),
        ],
        ["A", "B", "C", "D"],
    ),
    "two-roles-delegating-to-a-third": (
        [("targets", "A", ALL, False), ("targets", "B", ALL, False), ("B", "C", ALL, False), ("A", "C", ALL, False)],
        ["A", "C", "B"],
    ),
    "two-roles-delegating-to-a-third-different-paths": (
        [("targets", "A", ALL, False), ("targets", "B", ALL, False), ("B", "C", ALL, False), ("A", "C", NONE, False)],
        ["A", "B", "C"],
    ),
}


@pytest.mark.parametrize(("edges", "visited"), GRAPHS.values(), ids=GRAPHS)
def test_graph_traversal(case: Case, edges: list[tuple[str, str, list[str], bool]], visited: list[str]) -> None:
    for delegator, role, paths, terminating in edges:
        _delegate(case, delegator, role, paths, terminating=terminating)
    case.repo.publish(*dict.fromkeys(role for _, role, _, _ in edges), "targets", "snapshot", "timestamp")
    with pytest.raises(TrustError) as refusal:
        case.device.manifest("missing", 1)
    assert refusal.value.reason == "not-published"
    assert case.repo.asked[4:] == [f"1.{role}.json" for role in visited]


@pytest.mark.parametrize(
    ("model", "found", "visited"),
    [
        ("triage", True, []),
        ("line-b", True, ["A"]),
        ("foo-1", True, ["A"]),
        ("foo-alpha", False, []),  # ? is one character
        ("LINE-b", False, []),  # case matters
        ("plant-x", True, ["B", "C"]),
        ("plant-z", False, ["B"]),  # D lists it, but B does not delegate it to D
    ],
)
def test_targetfile_search(case: Case, model: str, found: bool, visited: list[str]) -> None:
    _delegate(case, "targets", "A", ["line-*/*/manifest.json", "foo-?/*/manifest.json"], terminating=False)
    _delegate(case, "targets", "B", ["plant-*/*/manifest.json"], terminating=False)
    _delegate(case, "B", "C", ["plant-x/*/manifest.json"], terminating=False)
    _delegate(case, "B", "D", ["plant-y/*/manifest.json"], terminating=False)
    for role, listed in (("A", ("line-b", "foo-1", "foo-alpha")), ("C", ("plant-x",)), ("D", ("plant-z",))):
        for name in listed:
            case.repo.add_manifest(name.encode(), role=role, model=name)
    case.repo.publish("A", "B", "C", "D", "targets", "snapshot", "timestamp")
    if found:
        assert case.device.manifest(model, 1) == (MANIFEST if model == "triage" else model.encode())
    else:
        with pytest.raises(TrustError):
            case.device.manifest(model, 1)
    assert [name for name in case.repo.asked[4:] if not name.startswith("targets/")] == [
        f"1.{role}.json" for role in visited
    ]


def test_cached_role_is_verified_against_current_delegator(case: Case) -> None:
    _delegate(case, "targets", "parent-a", ["team-a/*/manifest.json"], terminating=False)
    _delegate(case, "targets", "parent-b", ["team-b/*/manifest.json"], terminating=False)
    _delegate(case, "parent-a", "release", ["team-a/*/manifest.json"], terminating=False)
    other = new_signer()
    below = case.repo["parent-b"]
    below.delegations = Delegations({}, {"release": DelegatedRole("release", [], 1, False, ["team-b/*/manifest.json"])})
    below.add_key(other.public_key, "release")
    case.repo.add_manifest(b"trusted", role="release", model="team-a")
    case.repo.add_manifest(b"malicious", role="release", model="team-b")
    case.repo.publish("release", "parent-a", "parent-b", "targets", "snapshot", "timestamp")
    assert case.device.manifest("team-a", 1) == b"trusted"
    with pytest.raises(TrustError):
        case.device.manifest("team-b", 1)


def test_delegation_not_in_snapshot(case: Case) -> None:
    _delegate(case, "targets", "publisher-a", ["line-a/*/manifest.json"], terminating=True)
    case.repo.publish("publisher-a", "targets")
    del case.repo["snapshot"].meta["publisher-a.json"]
    case.repo.publish("snapshot", "timestamp")
    assert case.refresh() == ""
    with pytest.raises(TrustError) as refusal:
        case.device.manifest("line-a", 1)
    assert refusal.value.reason == "not-published"
    assert "publisher-a" not in case.trusted
    assert "1.publisher-a.json" not in case.repo.asked
