"""A version of a model, fetched from the cloud and written to a folder or stick for devices without a network."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from cloud.client_calls import LONG_S
from cloud.registry_client import Progress, RegistryCalls
from isthmus.bundle import Manifest, parse_manifest
from isthmus.errors import ConflictError, DigestMismatchError, NotFoundError
from isthmus.stick import Index, StickWriter, blob_name, delta_name, metadata_name
from isthmus.v1 import registry_pb2
from security.metadata import manifest_path


class StickCalls(RegistryCalls):
    """What it takes to write a stick."""

    def export(
        self,
        model: str,
        version: int,
        output: Path,
        *,
        bases: Sequence[int] = (),
        variants: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Write a version to a folder or tar file that devices without a network install from.

        Args:
            model: The model.
            version: Its version.
            output: The folder to make, or a tar file where it ends in .tar.
            bases: Versions that devices have: deltas from them are written, too.
            variants: Which variants; all where none is named.
            progress: Gets told how far it is.

        Raises:
            NotFoundError: There is no such version or variant.
            ConflictError: The version was withdrawn, or there is something at `output`.
            DigestMismatchError: The cloud sent other bytes than it should.
        """
        told = progress or Progress()
        metadata = self._all_metadata()
        targets = _targets_of(metadata)
        digest, manifest = self._manifest(targets, model, version)
        custom = targets[manifest_path(model, version)].get("custom")
        if reason := (custom or {}).get("withdrawn"):
            raise ConflictError(
                f"{model}@{version} was withdrawn: {reason}",
                hint="no device would install it; isthmus model list shows the others",
                reason="withdrawn",
            )
        known = [variant.id for variant in manifest.variants]
        if unknown := [name for name in variants if name not in known]:
            raise NotFoundError(f"{model}@{version} has no variant {unknown[0]!r}", hint=f"it has {', '.join(known)}")
        files = {path: entry for variant in variants or known for path, entry in manifest.device_files(variant).items()}
        old = [self._manifest(targets, model, base)[1] for base in bases]
        pairs = {
            (before.files[path].sha256, entry.sha256)
            for before in old
            for path, entry in files.items()
            if path in before.files and before.files[path].sha256 != entry.sha256
        }
        blobs = {entry.sha256: entry.length for entry in files.values()}
        told.found(sum(blobs.values()))
        writer = StickWriter(output)
        try:
            for name, data in metadata.items():
                writer.write(metadata_name(name), iter([data]))
            for sha256 in (digest, *blobs):
                writer.write(blob_name(sha256), self._blob(sha256, told))
            deltas = sum(self._write_delta(writer, *pair) for pair in sorted(pairs))
            writer.finish(Index(model, version, tuple(bases)))
        except BaseException:
            writer.abandon()
            raise
        return {
            "model": model,
            "version": version,
            "output": str(output),
            "files": len(blobs),
            "bytes": sum(blobs.values()),
            "deltas": deltas,
            "fresh_until": json.loads(metadata["timestamp.json"])["signed"]["expires"],
        }

    def _all_metadata(self) -> dict[str, bytes]:
        """Return every metadata file that a device needs, from the second root on, by name."""
        found = {"timestamp.json": self.metadata("timestamp.json")}
        version = json.loads(found["timestamp.json"])["signed"]["meta"]["snapshot.json"]["version"]
        snapshot = found[f"{version}.snapshot.json"] = self.metadata(f"{version}.snapshot.json")
        for name, entry in json.loads(snapshot)["signed"]["meta"].items():
            found[f"{entry['version']}.{name}"] = self.metadata(f"{entry['version']}.{name}")
        number = 2
        while True:
            try:
                found[f"{number}.root.json"] = self.metadata(f"{number}.root.json")
            except NotFoundError:
                return found
            number += 1

    def _manifest(self, targets: Mapping[str, Any], model: str, version: int) -> tuple[str, Manifest]:
        entry = targets.get(manifest_path(model, version))
        if entry is None:
            raise NotFoundError(f"{model} has no version {version}", hint="isthmus model list shows what there is")
        digest = str(entry["hashes"]["sha256"])
        return digest, parse_manifest(b"".join(self._blob(digest, Progress())))

    def _blob(self, sha256: str, told: Progress) -> Iterator[bytes]:
        """Yield a blob's bytes; the last of them only when all were the right ones."""
        digest = hashlib.sha256()
        request = registry_pb2.FetchBlobRequest(sha256=sha256)
        try:
            for part in self._registry.FetchBlob(request, timeout=LONG_S):
                digest.update(part.data)
                told.sent(len(part.data))
                yield part.data
        except grpc.RpcError as error:
            raise self._explained(error, f"cannot fetch {sha256[:12]}") from error
        if not hmac.compare_digest(digest.hexdigest(), sha256):
            raise DigestMismatchError(f"blob {sha256[:12]}: the cloud sent other bytes")

    def _write_delta(self, writer: StickWriter, old: str, new: str) -> bool:
        """Write a delta where there is one. A device checks what it rebuilds, so a delta has no digest of its own."""
        request = registry_pb2.FetchDeltaRequest(from_sha256=old, to_sha256=new)
        try:
            data = b"".join(part.data for part in self._registry.FetchDelta(request, timeout=LONG_S))
        except grpc.RpcError as error:
            explained = self._explained(error, f"cannot fetch a delta to {new[:12]}")
            if isinstance(explained, NotFoundError):
                return False
            raise explained from error
        writer.write(delta_name(old, new), iter([data]))
        return True


def _targets_of(metadata: Mapping[str, bytes]) -> dict[str, Any]:
    """Return all targets of the metadata that lists manifests; the organisation's own come before a publisher's."""
    found: dict[str, Any] = {}
    for name, data in sorted(metadata.items(), key=lambda item: item[0].endswith(".targets.json")):
        if name.endswith(".targets.json") or ".publisher-" in name:
            found |= json.loads(data)["signed"]["targets"]
    return found
