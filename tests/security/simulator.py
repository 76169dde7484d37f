"""A repository that signs whatever a test asks for, also what no honest one would: for attacks and conformance cases.

Everything is really signed and served by name, as the registry does; nothing here checks anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ed25519

from isthmus.digests import sha256_bytes
from isthmus.errors import NotFoundError
from security.metadata import CryptoSigner, Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from security.trust import TrustedManifests

NOW = datetime(2031, 5, 1, 12, tzinfo=UTC)
TOP_LEVEL = (Root.type, Targets.type, Snapshot.type, Timestamp.type)


def new_signer() -> CryptoSigner:
    return CryptoSigner(ed25519.Ed25519PrivateKey.generate())


class Simulator:
    """Roles that are changed in place and published one by one; version 1 of each is there from the start."""

    def __init__(self) -> None:
        self.now = NOW
        far = NOW + timedelta(days=30)
        self.root = Root(expires=NOW + timedelta(days=800), consistent_snapshot=True)
        self.roles: dict[str, Any] = {
            "root": self.root,
            "timestamp": Timestamp(expires=far),
            "snapshot": Snapshot(expires=far),
            "targets": Targets(expires=far),
        }
        self.signers: dict[str, dict[str, CryptoSigner]] = {role: {} for role in self.roles}
        self.served: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.hashes = True  # whether timestamp and snapshot announce digests and lengths, as ours do
        self.change: Callable[[str, bytes], bytes] = lambda _, data: data
        for role in TOP_LEVEL:
            self.add_key(role)
        for signed in self.roles.values():
            signed.version = 0
        self.publish()
        self.trusted_root = self.served["1.root.json"]

    def __getitem__(self, role: str) -> Any:
        return self.roles[role]

    def add_key(self, role: str, signer: CryptoSigner | None = None, delegator: Any = None) -> CryptoSigner:
        signer = signer or new_signer()
        (delegator or self.root).add_key(signer.public_key, role)
        self.signers.setdefault(role, {})[signer.public_key.keyid] = signer
        return signer

    def rotate(self, role: str) -> None:
        """Replace all keys of a role by a new one, in the root."""
        for keyid in list(self.root.roles[role].keyids):
            self.root.revoke_key(keyid, role)
        self.signers[role].clear()
        self.add_key(role)

    def add_manifest(self, data: bytes, *, version: int = 1, role: str = "targets", model: str = "triage") -> str:
        path = f"{model}/{version}/manifest.json"
        self.roles[role].targets[path] = TargetFile.from_data(path, data, ["sha256"])
        self.served[f"targets/{sha256_bytes(data)}"] = data
        return path

    def publish(self, *roles: str) -> None:
        """Sign the next version of each role, in the order given, and serve it."""
        for role in roles or TOP_LEVEL:
            self.roles[role].version += 1
            self.sign(role)

    def sign(self, role: str) -> None:
        """Sign a role as it is and serve it under its version; what is above it follows."""
        signed = self.roles[role]
        metadata = Metadata(signed)
        for signer in self.signers[role].values():
            metadata.sign(signer, append=True)
        data = metadata.to_bytes()
        self.served["timestamp.json" if role == "timestamp" else f"{signed.version}.{role}.json"] = data
        meta = MetaFile.from_data(signed.version, data, ["sha256"]) if self.hashes else MetaFile(signed.version)
        if role == "snapshot":
            self.roles["timestamp"].snapshot_meta = meta
        elif role not in {"root", "timestamp"}:
            self.roles["snapshot"].meta[f"{role}.json"] = meta

    def fetch(self, name: str) -> Iterator[bytes]:
        self.asked.append(name)
        if name not in self.served:
            raise NotFoundError(f"there is no {name}")
        yield self.change(name, self.served[name])

    def device(self, folder: Path) -> TrustedManifests:
        return TrustedManifests(folder, self.trusted_root, self.fetch, clock=lambda: self.now)


def trusted_versions(folder: Path) -> dict[str, int]:
    """Return what a device has kept as trusted: role to version."""
    return {
        path.stem: Metadata[Any].from_file(str(path)).signed.version for path in (folder / "metadata").glob("*.json")
    }
