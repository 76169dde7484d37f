"""A bundle's files on their way to being served: checked against manifest and signed metadata, laid out for Triton."""

from __future__ import annotations

import hmac
import shutil
import tempfile
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from cloud.blobs import Blobs
from cloud.ownership import BlobOwners
from isthmus.bundle import CALIBRATION, GOLDEN, Manifest, parse_calibration
from isthmus.digests import sha256_bytes
from isthmus.errors import BundleError, NotFoundError, TrustError
from isthmus.tensors import Array
from security.metadata import Targets, parse

_GOLDEN_ROWS: Final = 4  # enough to see the form of an answer
_INPUT: Final = "input."


def check_identity(manifest: Manifest, model: str, version: int) -> None:
    """Check that a manifest is the one of this version.

    Raises:
        BundleError: It is another one.
    """
    if (manifest.name, manifest.version) != (model, version):
        raise BundleError(f"expected the manifest of {model}@{version}, got {manifest.name}@{manifest.version}")


def check_vouched(targets_json: bytes, manifest: Manifest, manifest_json: bytes) -> None:
    """Check that signed metadata vouch for exactly this manifest.

    Raises:
        TrustError: They do not.
    """
    path = f"{manifest.name}/{manifest.version}/manifest.json"
    target = parse(targets_json, Targets).signed.targets.get(path)
    if target is None:
        raise TrustError(f"the signed metadata does not list {path}", reason="unsigned")
    same_digest = hmac.compare_digest(target.hashes.get("sha256", ""), sha256_bytes(manifest_json))
    if target.length != len(manifest_json) or not same_digest:
        raise TrustError(f"the signed metadata vouches for another {path}", reason="digest-mismatch")


def check_blobs(blobs: Blobs, owners: BlobOwners, manifest: Manifest, tenant: str) -> None:
    """Check that all files are stored, and the tenant's, and the calibration record is this version's.

    Raises:
        NotFoundError: Files are missing.
        BundleError: The calibration record belongs to another version.
    """
    owned = owners.owned(tenant, {entry.sha256 for entry in manifest.files.values()})
    missing = [
        path
        for path, entry in manifest.files.items()
        if entry.sha256 not in owned or not blobs.has(entry.sha256) or blobs.length(entry.sha256) != entry.length
    ]
    if missing:
        raise NotFoundError(f"blobs of {len(missing)} files are not stored: {missing[:3]}", reason="missing-blobs")
    calibration = parse_calibration(blobs.read_all(manifest.files[CALIBRATION].sha256))
    if (calibration.model, calibration.version) != (manifest.name, manifest.version):
        raise BundleError(
            f"{CALIBRATION} belongs to {calibration.model}@{calibration.version}, "
            f"the bundle is {manifest.name}@{manifest.version}"
        )


def materialise(blobs: Blobs, folder: Path, manifest: Manifest) -> None:
    """Write the heavy files into a Triton model folder: whole or not at all, verified."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".incoming-", dir=folder.parent))
    try:
        for path, entry in manifest.files_below("heavy/"):
            blobs.copy_to(entry.sha256, temporary / path.removeprefix("heavy/"))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def golden_inputs(blobs: Blobs, manifest: Manifest) -> dict[str, Array]:
    """Return a few golden inputs, by name.

    Raises:
        BundleError: There are none for this model.
    """
    try:
        tensors = load_safetensors(blobs.read_all(manifest.files[GOLDEN].sha256))
        return {spec.name: tensors[_INPUT + spec.name][:_GOLDEN_ROWS] for spec in manifest.inputs}
    except (SafetensorError, KeyError) as error:
        raise BundleError(f"{GOLDEN} does not hold inputs of the model: {error}") from error
