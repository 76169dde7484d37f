"""The operator's side of the registry and fleet services: calls over TLS with a token, one method for each thing to do.

Used by the command line and by tests; knows nothing of how the cloud keeps what it is given.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc

from cloud.fleet_rows import device_record, device_rows, moment
from isthmus.address import split_address
from isthmus.bundle import MANIFEST, Manifest, open_bundle, parse_manifest
from isthmus.errors import (
    ConfigError,
    ConflictError,
    DigestMismatchError,
    InputError,
    IsthmusError,
    NotFoundError,
    UnavailableError,
)
from isthmus.oip import service_pb2, service_pb2_grpc
from isthmus.status import from_rpc
from isthmus.stick import Index, StickWriter, blob_name, delta_name, metadata_name
from isthmus.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    fleet_pb2,
    fleet_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from security.keyfiles import read_file
from security.metadata import manifest_path
from security.repository import OperatorRepository
from security.tenancy import TENANT_HEADER, check_tenant
from security.tls import channel_credentials

TARGETS: Final = "targets"  # the role of the organisation's own operators
CHUNK: Final = 256 << 10  # bytes of one upload message
PUBLISH_S: Final = 1800.0  # deltas and loading a large heavy model take their time
MAX_MESSAGE_BYTES: Final = 64 << 20
MAX_INVITE_S: Final = 2**32 - 1  # what the message can say; the cloud allows less
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+|isk_[a-z0-9]+_[A-Za-z0-9_-]+")
_MINTING: Final = "isthmus token mint --home DIR/cloud --role operator --subject YOU --output FILE makes one"
# What gRPC says of a connection that cannot be made, and what a person can do about it.
_CONNECTION_HINTS: Final = {
    "Hostname Verification": "the cloud's certificate is not for this host; use one that was named in "
    "isthmus keys init --host",
    "CERTIFICATE_VERIFY_FAILED": "that cloud is from another workspace than the folder given as --trust, or its "
    "certificate expired",
    "Connection refused": "start it with isthmus cloud serve, or name its HOST:PORT with --cloud",
    "resolving": "name the cloud's HOST:PORT with --cloud",
    "WRONG_VERSION_NUMBER": "there is something else than a cloud at this address; name its HOST:PORT with --cloud",
    "Deadline": "the cloud did not answer in time; look at its log, or name another HOST:PORT with --cloud",
}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a cloud is and what proves who we are."""

    cloud: str
    trust: Path  # folder with ca.pem
    token_file: Path
    tenant: str = ""  # that an admin of the cloud acts in; "" for the caller's own


@dataclass(frozen=True, slots=True)
class Progress:
    """What a publish tells while it runs; every function may be called many times."""

    found: Callable[[int], None] = lambda _total_bytes: None
    sent: Callable[[int], None] = lambda _bytes: None
    waiting: Callable[[str], None] = lambda _what: None


class _Tenant(grpc.AuthMetadataPlugin):
    """Names the tenant to act in with every call."""

    def __init__(self, tenant: str) -> None:
        self._metadata = ((TENANT_HEADER, tenant),)

    def __call__(self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        del context
        callback(self._metadata, None)


class CloudClient:
    """A connection to a cloud; use it as a context manager."""

    def __init__(self, address: Address, *, timeout_s: float = 30.0) -> None:
        token = read_file(address.token_file, hint=_MINTING).decode("ascii", "replace").strip()
        if not _TOKEN.fullmatch(token):
            raise ConfigError(f"{address.token_file} holds no token", hint=_MINTING)
        split_address(address.cloud, "cloud")
        proof = [grpc.access_token_call_credentials(token)]
        if address.tenant:
            proof.append(grpc.metadata_call_credentials(_Tenant(check_tenant(address.tenant))))
        credentials = grpc.composite_channel_credentials(channel_credentials(address.trust / "ca.pem"), *proof)
        options = (
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", 30_000),  # a publish may be silent for minutes
        )
        self._channel = grpc.secure_channel(address.cloud, credentials, options=options)
        self._cloud, self._timeout_s = address.cloud, timeout_s
        self._registry: Any = registry_pb2_grpc.RegistryServiceStub(self._channel)
        self._fleet: Any = fleet_pb2_grpc.FleetServiceStub(self._channel)
        self._rollouts: Any = fleet_pb2_grpc.RolloutServiceStub(self._channel)
        self._usage: Any = usage_pb2_grpc.UsageServiceStub(self._channel)
        self._audit: Any = audit_pb2_grpc.AuditServiceStub(self._channel)
        self._inference: Any = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()

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
        answer = self._call(f"publish {manifest.name}@{manifest.version}", self._registry.Publish, request, PUBLISH_S)
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
            for part in self._registry.FetchBlob(request, timeout=PUBLISH_S):
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
            data = b"".join(part.data for part in self._registry.FetchDelta(request, timeout=PUBLISH_S))
        except grpc.RpcError as error:
            explained = self._explained(error, f"cannot fetch a delta to {new[:12]}")
            if isinstance(explained, NotFoundError):
                return False
            raise explained from error
        writer.write(delta_name(old, new), iter([data]))
        return True

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
            self._call(f"upload {paths[digest]}", self._registry.UploadBlob, messages, PUBLISH_S)
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
        self._call(f"release {model}@{version}", self._registry.Release, request, PUBLISH_S)

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

    def invite(self, device_id: str, *, ttl_s: int = 0) -> dict[str, Any]:
        """Return a one-time enrolment code for a device."""
        if not 0 <= ttl_s <= MAX_INVITE_S:
            raise InputError(
                f"expected a time to live of at most {MAX_INVITE_S} seconds, got {ttl_s}",
                hint="an invitation is used within hours; a new one costs nothing",
            )
        request = fleet_pb2.InviteRequest(device_id=device_id, ttl_s=ttl_s)
        answer = self._call(f"invite {device_id}", self._fleet.Invite, request)
        return {"device": device_id, "code": answer.code, "expires_at": moment(answer.expires_at)}

    def list_devices(self, selector: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Return one row for each device with these labels and model that it runs or reported on."""
        request = fleet_pb2.ListDevicesRequest(selector=selector)
        answer = self._call("list devices", self._fleet.ListDevices, request)
        return [row for device in answer.devices for row in device_rows(device)]

    def device(self, device_id: str) -> dict[str, Any]:
        """Return what is known of one device."""
        request = fleet_pb2.GetDeviceRequest(device_id=device_id)
        answer = self._call(f"show device {device_id}", self._fleet.GetDevice, request)
        return device_record(answer.device, answer.events)

    def set_labels(self, device_id: str, labels: Mapping[str, str], remove: Sequence[str] = ()) -> dict[str, str]:
        """Set and remove labels of a device; return all that it has then."""
        request = fleet_pb2.SetLabelsRequest(device_id=device_id, set=labels, remove=remove)
        return dict(self._call(f"label device {device_id}", self._fleet.SetLabels, request).labels)

    def pin(self, device_id: str, model: str, version: int) -> None:
        """Hold a device at a version of a model."""
        request = fleet_pb2.PinRequest(device_id=device_id, model=model, version=version)
        self._call(f"pin device {device_id}", self._fleet.Pin, request)

    def unpin(self, device_id: str, model: str) -> None:
        """Let a device follow releases and rollouts of a model again."""
        self._call(
            f"unpin device {device_id}", self._fleet.Unpin, fleet_pb2.UnpinRequest(device_id=device_id, model=model)
        )

    def retry(self, device_id: str, model: str) -> int:
        """Ask a device to try again what failed on it; return the number of the attempt."""
        request = fleet_pb2.RetryDeviceRequest(device_id=device_id, model=model)
        return int(self._call(f"have device {device_id} retry", self._fleet.RetryDevice, request).attempt)

    def revoke(self, device_id: str, *, key_sha256: str = "", reason: str = "") -> dict[str, Any]:
        """Refuse a device and its key, or one key, from now on."""
        request = fleet_pb2.RevokeDeviceRequest(device_id=device_id, key_sha256=key_sha256, reason=reason)
        answer = self._call(f"revoke {device_id or 'the key'}", self._fleet.RevokeDevice, request)
        return {
            "device": answer.device_id or None,
            "key_sha256": answer.key_sha256,
            "revoked_at": moment(answer.revoked_at),
        }

    def start_rollout(self, request: Any) -> Any:
        """Start a rollout, or tell what it would do."""
        return self._call(
            f"roll out {request.model}@{request.version}", self._rollouts.StartRollout, request, PUBLISH_S
        )

    def change_rollout(self, change: str, name: str, reason: str = "") -> Any:
        """Pause, resume or abort a rollout; return it."""
        calls: dict[str, tuple[Any, Any]] = {
            "pause": (self._rollouts.PauseRollout, fleet_pb2.PauseRolloutRequest(id=name)),
            "resume": (self._rollouts.ResumeRollout, fleet_pb2.ResumeRolloutRequest(id=name)),
            "abort": (self._rollouts.AbortRollout, fleet_pb2.AbortRolloutRequest(id=name, reason=reason)),
        }
        return self._call(f"{change} rollout {name}", *calls[change]).rollout

    def rollout(self, name: str) -> Any:
        """Return a rollout and its history."""
        return self._call(f"show rollout {name}", self._rollouts.GetRollout, fleet_pb2.GetRolloutRequest(id=name))

    def rollouts(self, model: str = "") -> list[Any]:
        """Return all rollouts, newest first."""
        request = fleet_pb2.ListRolloutsRequest(model=model)
        return list(self._call("list rollouts", self._rollouts.ListRollouts, request).rollouts)

    def usage(self, request: Any) -> list[Any]:
        """Return the rows of a GetUsageRequest."""
        try:
            return [row for part in self._usage.GetUsage(request, timeout=self._timeout_s) for row in part.rows]
        except grpc.RpcError as error:
            raise self._explained(error, "cannot read usage") from error

    def compute(self, request: Any) -> list[Any]:
        """Return the rows of a GetComputeRequest."""
        return list(self._call("read Triton's usage", self._usage.GetCompute, request).rows)

    def set_quota(self, quota: Any) -> list[str]:
        """Set a quota; return what may not have been meant."""
        scope = quota.scope
        request = usage_pb2.SetQuotaRequest(
            tenant=scope.tenant, device=scope.device, model=scope.model, limits=quota.limits
        )
        return list(self._call("set the quota", self._usage.SetQuota, request).warnings)

    def quotas(self, tenant: str = "") -> list[Any]:
        """Return the quotas that are set, of one tenant or all that may be seen."""
        request = usage_pb2.ListQuotasRequest(tenant=tenant)
        return list(self._call("list quotas", self._usage.ListQuotas, request).quotas)

    def clear_quota(self, scope: Any) -> None:
        """Remove a quota."""
        request = usage_pb2.ClearQuotaRequest(tenant=scope.tenant, device=scope.device, model=scope.model)
        self._call("clear the quota", self._usage.ClearQuota, request)

    def status(self) -> dict[str, Any]:
        """Return what the cloud runs: Triton's version and each loaded heavy model with its counters."""
        about = self._call("ask for status", self._inference.ServerMetadata, service_pb2.ServerMetadataRequest())
        request = service_pb2.ModelStatisticsRequest()
        statistics = self._call("read statistics", self._inference.ModelStatistics, request)
        who = self._call("ask who we are", self._fleet.WhoAmI, fleet_pb2.WhoAmIRequest())
        triton = next((name.removeprefix("triton:") for name in about.extensions if name.startswith("triton:")), "")
        return {
            "cloud": self._cloud,
            "version": about.version,
            "triton_version": triton,
            "tls_version": who.tls_version,
            "tls_group": who.tls_group,
            "subject": who.subject,
            "tenant": who.tenant,
            "models": [_statistics_row(model) for model in statistics.model_stats],
        }

    def stub(self, kind: Callable[[grpc.Channel], Any]) -> Any:
        """Return a stub of another service on this connection."""
        return kind(self._channel)

    def call(self, what: str, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        """Return the answer of one call.

        Raises:
            IsthmusError: It failed; the message begins with what could not be done.
        """
        return self._call(what, method, request, timeout_s)

    def search_records(self, fields: Mapping[str, Any]) -> Iterator[bytes]:
        """Yield the records of the audit log that match the fields of a SearchRecordsRequest, as JSON."""
        request = audit_pb2.SearchRecordsRequest(**fields)
        try:
            for answer in self._audit.SearchRecords(request, timeout=PUBLISH_S):
                yield answer.record_json
        except grpc.RpcError as error:
            raise self._explained(error, "cannot search the audit log") from error

    def export_records(self, times: Mapping[str, Any]) -> Iterator[bytes]:
        """Yield lines of the audit log."""
        try:
            for answer in self._audit.ExportRecords(audit_pb2.ExportRecordsRequest(**times), timeout=PUBLISH_S):
                yield answer.lines
        except grpc.RpcError as error:
            raise self._explained(error, "cannot export the audit log") from error

    def audit_heads(self) -> list[bytes]:
        """Return the signed heads of the audit log's chains."""
        return list(self._call("ask for the heads", self._audit.GetHeads, audit_pb2.GetHeadsRequest()).head_json)

    def _call(self, what: str, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return method(request, timeout=timeout_s or self._timeout_s)
        except grpc.RpcError as error:
            raise self._explained(error, f"cannot {what}") from error

    def _explained(self, error: grpc.RpcError, what: str) -> IsthmusError:
        """Return one of our errors; one of the connection says in a sentence what to do, without gRPC's own words."""
        explained = from_rpc(error, what)
        if not isinstance(explained, UnavailableError) or explained.hint or explained.reason != UnavailableError.reason:
            return explained
        hint = next((hint for words, hint in _CONNECTION_HINTS.items() if words in explained.message), "")
        if not hint:
            return explained
        return UnavailableError(f"{what}: no answer from the cloud at {self._cloud}", hint=hint)


def _targets_of(metadata: Mapping[str, bytes]) -> dict[str, Any]:
    """Return all targets of the metadata that lists manifests; the organisation's own come before a publisher's."""
    found: dict[str, Any] = {}
    for name, data in sorted(metadata.items(), key=lambda item: item[0].endswith(".targets.json")):
        if name.endswith(".targets.json") or ".publisher-" in name:
            found |= json.loads(data)["signed"]["targets"]
    return found


def _upload_messages(path: Path, sha256: str, length: int, told: Progress) -> Iterator[Any]:
    yield registry_pb2.UploadBlobRequest(sha256=sha256, length=length)
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            yield registry_pb2.UploadBlobRequest(data=data)
            told.sent(len(data))


def _statistics_row(model: Any) -> dict[str, Any]:
    success = model.inference_stats.success
    return {
        "model": model.name,
        "heavy_version": int(model.version),
        "inferences": model.inference_count,
        "executions": model.execution_count,
        "mean_ms": round(success.ns / success.count / 1e6, 3) if success.count else None,
    }
