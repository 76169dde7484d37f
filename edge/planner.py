"""What an update takes: the signed manifest of a version, the variant for this device, and where each file comes from.

Rules: the version is the signed one of this model, is not withdrawn, and is no older than the newest that was ever kept
here, unless what was signed about that one lets devices go back so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from edge.plan import FilePlan, plan_files
from edge.store import SlotStore, check_slot
from isthmus.bundle import MANIFEST, FileEntry, Manifest, Variant, parse_manifest
from isthmus.errors import BundleError, IsthmusError, TrustError


class SignedTarget(Protocol):
    """A manifest, and what the operator signed about it (security.trust.SignedTarget)."""

    @property
    def manifest(self) -> bytes:
        """Return its verified bytes."""
        ...

    @property
    def rollback_floor(self) -> int:
        """Return the least version that a device which has run this one may be told to go back to; 0 for none."""
        ...

    @property
    def withdrawn(self) -> str:
        """Return why it must not be installed; empty when it may."""
        ...


class Manifests(Protocol):
    """Signed metadata (edge.fetcher.SignedManifests)."""

    def target(self, model: str, version: int) -> SignedTarget:
        """Return what was signed about a version; blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """A version, and what brings it."""

    version: int
    manifest: Manifest
    manifest_bytes: bytes
    variant: Variant
    files: tuple[FilePlan, ...]


class Planner:
    """Plans the updates of one model; every method blocks.

    Args:
        model: Its name.
        store: Its slots.
        manifests: Signed metadata.
        choose: Chooses the variant of a manifest.
    """

    def __init__(
        self, model: str, store: SlotStore, manifests: Manifests, choose: Callable[[Manifest], Variant]
    ) -> None:
        self._model, self._store = model, store
        self._manifests, self._choose = manifests, choose

    def plan(self, version: int) -> Plan:
        """Return what brings this version.

        Raises:
            TrustError: It is not signed, withdrawn, or an older one than this device may go back to.
            BundleError: Its manifest is another's, or has no variant for this device.
            UnavailableError: The registry cannot be asked now.
        """
        newest = self._store.state.newest
        if version < newest:
            self._check_way_back(version, newest)
        target = self._manifests.target(self._model, version)
        if target.withdrawn:
            raise TrustError(f"{self._model}@{version} was withdrawn: {target.withdrawn[:200]}", reason="withdrawn")
        manifest = parse_manifest(target.manifest)
        if (manifest.name, manifest.version) != (self._model, version):
            got = f"{manifest.name}@{manifest.version}"
            raise BundleError(f"expected the manifest of {self._model}@{version}, got {got}")
        variant = self._choose(manifest)
        return Plan(version, manifest, target.manifest, variant, self.files(manifest, variant))

    def files(self, manifest: Manifest, *variants: Variant) -> tuple[FilePlan, ...]:
        """Return the files that bring these variants."""
        wanted: dict[str, FileEntry] = {}
        for variant in variants:
            wanted |= manifest.device_files(variant.id)
        return plan_files(wanted, self._installed())

    def _check_way_back(self, version: int, newest: int) -> None:
        floor = self._manifests.target(self._model, newest).rollback_floor
        if not floor or version < floor:
            allowed = f"versions from {floor} on" if floor else "no older version"
            raise TrustError(
                f"{self._model} has run version {newest} here, which lets it go back to {allowed}: {version} is older",
                hint="publish the older model under a new version",
                reason="rollback",
            )

    def is_whole(self, plan: Plan) -> bool:
        """Return whether the version's slot is here as it was signed: from before, or from an earlier attempt."""
        slot = self._store.slot(plan.version)
        try:
            if (slot / MANIFEST).read_bytes() != plan.manifest_bytes:
                return False
            check_slot(slot, plan.variant.id)
        except (OSError, IsthmusError):
            return False
        return True

    def _installed(self) -> dict[str, FileEntry]:
        state = self._store.state
        if not state.current:
            return {}
        manifest = parse_manifest((self._store.slot(state.current) / MANIFEST).read_bytes())
        return manifest.device_files(state.variant)
