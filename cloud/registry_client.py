"""Calls about models and their versions: publish, withdraw, release, list, and the signed metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import grpc

from cloud.client_calls import LONG_S, Address
from cloud.fleet_client import FleetCalls
from isthmus.bundle import MANIFEST, Manifest, open_bundle
from isthmus.errors import InputError, NotFoundError
from isthmus.v1 import fleet_pb2, registry_pb2, registry_pb2_grpc
from security.repository import OperatorRepository

TARGETS: Final = "targets"  # the role of the organisation's own operators
CHUNK: Final = 256 << 10  # bytes of one upload message


@dataclass(frozen=True, slots=True)
class Progress:
    """What a publish tells while it runs; every function may be called many times."""

    found: Callable[[int], None] = lambda _total_bytes: None
    sent: Callable[[int], None] = lambda _bytes: None
    waiting: Callable[[str], None] = lambda _what: None


class RegistryCalls(FleetCalls):
    """The registry service; a withdrawal also asks which rollouts it concerns."""

    def __init__(self, address: Address, *, timeout_s: float = 30.0) -> None:
        super().__init__(address, timeout_s=timeout_s)
        self._registry: Any = self.stub(registry_pb2_grpc.RegistryServiceStub)

    def publish(
        self,
        bundle: Path,
        operator: Path,
        *,
        release: bool = True,
        rollback_floor: int | None = None,
        keys: Sequence[Path] = (),
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Upload a bundle, sign its manifest and make the version known.

        Args:
            bundle: The bundle's folder.
            operator: The workspace's operator folder, or a publisher's, which holds the signing key.
            release: Whether devices should move to the version at once.
            rollback_floor: The oldest version to which a device that ran this one may go back, 0 for none; not given:
                the version that is released now.
            keys: Key files of other holders, where more than one must sign.
            progress: Gets told how far it is.

        Raises:
            IsthmusError: The bundle is not whole, or the cloud refuses it; nothing is visible then.
        """
        told = progress or Progress()
        manifest = open_bundle(bundle)
        repository = OperatorRepository(operator, keys=keys)
        repository.check()
        floor = self._check_new(manifest, rollback_floor)
        self._follow_roots(repository)
        uploaded = self._upload_missing(bundle, manifest, told)
        data = (bundle / MANIFEST).read_bytes()
        targets, own = self._current(repository)
        signed = repository.sign_manifest(
            manifest.name, manifest.version, data, targets, current_own=own, rollback_floor=floor
        )
        told.waiting("deltas and heavy model")
        request = registry_pb2.PublishRequest(
            model=manifest.name,
            version=manifest.version,
            manifest_json=data,
            targets_json=signed,
            release=release,
            role=repository.role,
        )
        answer = self._call(f"publish {manifest.name}@{manifest.version}", self._registry.Publish, request, LONG_S)
        return {
            "model": manifest.name,
            "version": manifest.version,
            "released": release,
            "rollback_floor": floor or None,
            "heavy_version": answer.heavy_version,
            "uploaded_bytes": uploaded,
            "deltas": [
                {
                    "file": delta.path,
                    "from_version": delta.from_version,
                    "delta_bytes": delta.delta_bytes,
                    "full_bytes": delta.full_bytes,
                    "percent": round(100 * delta.delta_bytes / max(delta.full_bytes, 1), 1),
                }
                for delta in answer.deltas
            ],
        }

    def withdraw(
        self, model: str, version: int, reason: str, operator: Path, *, keys: Sequence[Path] = ()
    ) -> dict[str, Any]:
        """Sign that no device may install a version any more, and tell the cloud, which stops an open rollout of it.

        Args:
            model: The model.
            version: Its version.
            reason: Why; devices show it.
            operator: The operator folder that published it.
            keys: Key files of other holders, where more than one must sign.

        Raises:
            NotFoundError: That folder's role has not signed such a version.
            IsthmusError: As `publish`.
        """
        repository = OperatorRepository(operator, keys=keys)
        repository.check()
        self._follow_roots(repository)
        targets, own = self._current(repository)
        signed = repository.sign_withdrawal(model, version, reason, targets, current_own=own)
        self.submit({f"{repository.role}.json": signed})
        released = any(
            row["released"] for row in self.list_versions() if (row["model"], row["version"]) == (model, version)
        )
        telling = [
            row.id
            for row in self.rollouts(model)
            if row.version == version and row.state == fleet_pb2.ROLLOUT_STATE_COMPLETED
        ]
        return {
            "model": model,
            "version": version,
            "withdrawn": reason.strip(),
            "released": released,
            "rollouts": telling,
        }

    def submit(self, files: Mapping[str, bytes]) -> None:
        """Hand signed metadata to the cloud: roots, a withdrawal, delegations; all of them take effect, or none.

        Raises:
            IsthmusError: The cloud refuses them.
        """
        request = registry_pb2.SubmitMetadataRequest(
            files=[registry_pb2.SignedFile(name=name, data=data) for name, data in files.items()]
        )
        self._call(f"hand over {', '.join(files)}", self._registry.SubmitMetadata, request)

    def _follow_roots(self, repository: OperatorRepository) -> None:
        """Bring the operator folder to the newest root, each one checked against the one before it."""
        while True:
            try:
                root_json = self.metadata(f"{repository.root.version + 1}.root.json")
            except NotFoundError:
                return
            repository.follow_root(root_json)

    def _current(self, repository: OperatorRepository) -> tuple[bytes, bytes | None]:
        """Return the targets metadata and, for a publisher, its own, as the cloud serves them now."""
        if repository.role == TARGETS:
            return self.current_targets(), None
        try:
            return self.current_targets(), self.current_targets(repository.role)
        except NotFoundError:
            return self.current_targets(), None

    def _check_new(self, manifest: Manifest, floor: int | None) -> int:
        """Refuse early what the cloud would refuse after an upload; return the rollback floor."""
        rows = [row for row in self.list_versions() if row["model"] == manifest.name]
        published = [row["version"] for row in rows]
        if published and manifest.version <= max(published):
            newest = max(published)
            raise InputError(
                f"version {manifest.version} of {manifest.name!r} cannot be published: the newest is {newest}",
                hint=f"compile it with version = {newest + 1} in the recipe",
                reason="already-published",
            )
        if floor is None:
            return next((row["version"] for row in rows if row["released"]), 0)
        if floor >= manifest.version:
            raise InputError(f"expected a rollback floor below version {manifest.version}, got {floor}")
        return floor

    def _upload_missing(self, bundle: Path, manifest: Manifest, told: Progress) -> int:
        paths = {entry.sha256: path for path, entry in manifest.files.items()}
        asked = registry_pb2.FindMissingRequest(sha256=sorted(paths))
        missing = self._call("ask for missing files", self._registry.FindMissing, asked).sha256
        total = sum(manifest.files[paths[digest]].length for digest in missing)
        told.found(total)
        for digest in missing:
            entry = manifest.files[paths[digest]]
            messages = _upload_messages(bundle / paths[digest], digest, entry.length, told)
            self._call(f"upload {paths[digest]}", self._registry.UploadBlob, messages, LONG_S)
        return total

    def current_targets(self, role: str = TARGETS) -> bytes:
        """Return the metadata that the cloud serves now for a role, as it came: whoever signs checks it.

        Raises:
            NotFoundError: The cloud serves none.
        """
        timestamp = json.loads(self.metadata("timestamp.json"))
        snapshot_version = timestamp["signed"]["meta"]["snapshot.json"]["version"]
        snapshot = json.loads(self.metadata(f"{snapshot_version}.snapshot.json"))
        entry = snapshot["signed"]["meta"].get(f"{role}.json")
        if entry is None:
            raise NotFoundError(f"the cloud serves no {role} metadata")
        return self.metadata(f"{entry['version']}.{role}.json")

    def metadata(self, name: str) -> bytes:
        """Return one signed metadata file.

        Raises:
            NotFoundError: There is none of this name.
        """
        request = registry_pb2.FetchMetadataRequest(name=name)
        try:
            return b"".join(part.data for part in self._registry.FetchMetadata(request, timeout=self._timeout_s))
        except grpc.RpcError as error:
            raise self._explained(error, f"cannot fetch {name}") from error

    def release(self, model: str, version: int) -> None:
        """Set the version that devices should run.

        Raises:
            NotFoundError: There is no such version; the hint lists what there is.
        """
        known: dict[str, list[int]] = {}
        for row in self.list_versions():
            known.setdefault(row["model"], []).append(row["version"])
        if model not in known:
            close = get_close_matches(model, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"published models: {', '.join(known) or 'none yet'}"
            raise NotFoundError(f"there is no model {model!r}", hint=hint)
        if version not in known[model]:
            versions = ", ".join(map(str, known[model]))
            raise NotFoundError(f"{model} has no version {version}", hint=f"published versions: {versions}")
        request = registry_pb2.ReleaseRequest(model=model, version=version)
        self._call(f"release {model}@{version}", self._registry.Release, request, LONG_S)

    def list_versions(self) -> list[dict[str, Any]]:
        """Return the published versions of all models."""
        answer = self._call("list versions", self._registry.ListVersions, registry_pb2.ListVersionsRequest())
        return [
            {
                "model": row.model,
                "version": row.version,
                "released": row.released,
                "heavy_version": row.heavy_version,
                "bytes": row.bytes,
                "variants": list(row.variants),
                "rollback_floor": row.rollback_floor or None,
                "withdrawn": row.withdrawn or None,
            }
            for row in answer.versions
        ]


def _upload_messages(path: Path, sha256: str, length: int, told: Progress) -> Iterator[Any]:
    yield registry_pb2.UploadBlobRequest(sha256=sha256, length=length)
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            yield registry_pb2.UploadBlobRequest(data=data)
            told.sent(len(data))
