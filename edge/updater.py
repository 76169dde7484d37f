"""From "run version N" to version N serving, or to a refusal with its reason; the old version serves all the while.

The steps, in order; each may end the update, none can be skipped:

    plan        get the manifest that signed metadata vouches for, choose the variant, compare with what is installed
    fetch       bring each file into the partial slot (edge.assembly)
    verify      every file of the partial slot against the manifest
    self-test   open it with the device's runtime and compare golden answers
    activate    seal the slot, write the state, swap the model; requests in progress finish on the old one
    report      tell whoever listens what became of it

A refusal is final for this version. An unreachable registry or a full disk is no refusal: what was fetched stays, and
a later attempt goes on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

import structlog

from edge.assembly import Fetcher, FileResult, bring_file
from edge.model import LiveModel, ServedModels
from edge.plan import FilePlan, plan_files
from edge.store import SlotStore, check_slot, write_atomically
from isthmus.bundle import MANIFEST, FileEntry, Manifest, Variant, parse_manifest
from isthmus.errors import BundleError, ConfigError, IsthmusError, TrustError, UnavailableError, VerificationError

log = structlog.get_logger(__name__)


class Step(StrEnum):
    """Where an update is."""

    IDLE = "idle"
    PLAN = "plan"
    FETCH = "fetch"
    VERIFY = "verify"
    SELF_TEST = "self-test"
    ACTIVATE = "activate"
    REPORT = "report"


_BEFORE: Final = {
    Step.PLAN: {Step.IDLE},
    Step.FETCH: {Step.PLAN},
    Step.VERIFY: {Step.FETCH},
    Step.SELF_TEST: {Step.VERIFY},
    Step.ACTIVATE: {Step.SELF_TEST},
    Step.REPORT: set(Step) - {Step.IDLE, Step.REPORT},  # a refusal is reported from any step
}

# Refusals that time may heal: a clock that is wrong until the network is up, metadata that the cloud must sign anew.
_MAY_PASS: Final = frozenset({"expired-metadata", "freeze", "not-published"})


class Manifests(Protocol):
    """Signed metadata (security.trust.TrustedManifests)."""

    def manifest(self, model: str, version: int) -> bytes:
        """Return the verified bytes of a manifest; blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an update."""

    model: str
    from_version: int
    to_version: int
    variant: str = ""
    active: bool = True
    reason: str = ""
    detail: str = ""
    files: tuple[FileResult, ...] = ()

    @property
    def final(self) -> bool:
        """Return whether trying this version again can only end in the same way."""
        return self.reason not in _MAY_PASS

    @property
    def serving_version(self) -> int:
        """Return the version that serves now."""
        return self.to_version if self.active else self.from_version

    @property
    def bytes_fetched(self) -> int:
        """Return the bytes that moved over the wire."""
        return sum(file.bytes_fetched for file in self.files)

    @property
    def bytes_full(self) -> int:
        """Return the bytes of the same files in full."""
        return sum(file.bytes_full for file in self.files)


@dataclass(frozen=True, slots=True)
class _Plan:
    version: int
    manifest_bytes: bytes
    variant: Variant
    files: tuple[FilePlan, ...]
    partial: Path


class Updater:
    """Updates one model.

    Args:
        model: Its name.
        store: Its slots.
        models: Where it serves.
        manifests: Signed metadata.
        fetcher: The registry.
        choose: Chooses the variant of a manifest.
        open_slot: Opens and self-tests a slot's variant; blocks.
        report: Hears every outcome.
    """

    def __init__(
        self,
        model: str,
        store: SlotStore,
        models: ServedModels,
        *,
        manifests: Manifests,
        fetcher: Fetcher,
        choose: Callable[[Manifest], Variant],
        open_slot: Callable[[Path, str], LiveModel],
        report: Callable[[Outcome], None],
    ) -> None:
        self.step = Step.IDLE
        self.last: Outcome | None = None
        self._model = model
        self._store = store
        self._models = models
        self._manifests = manifests
        self._fetcher = fetcher
        self._choose = choose
        self._open_slot = open_slot
        self._report = report
        self._files: list[FileResult] = []
        self._variant = ""

    async def start(self) -> None:
        """Serve the installed version, or the one before it when that one is broken; none is no error.

        Raises:
            ConfigError: This machine cannot open what it has, for example because the runtime is not installed.
            UnavailableError: The disk cannot be read now.
        """
        while version := self._store.state.current:
            slot, variant = self._store.slot(version), self._store.state.variant
            try:
                await asyncio.to_thread(check_slot, slot, variant)
                live = await asyncio.to_thread(self._open, slot, variant)
            except (ConfigError, UnavailableError):  # no verdict on the version: it must not cost the installed one
                raise
            except IsthmusError as error:
                log.warning("installed version is broken", model=self._model, version=version, error=error.message)
                await asyncio.to_thread(self._store.fall_back, error.reason)
                continue
            self._models.swap(self._model, live)
            log.info("serving", model=self._model, version=version, variant=variant)
            self._report(Outcome(self._model, version, version, variant))
            return

    async def update(self, version: int) -> Outcome:
        """Bring a version to serve, or refuse it.

        Raises:
            UnavailableError: It cannot be fetched now; the caller tries again later.
        """
        from_version = self._models.version(self._model)
        self._files, self._variant = [], ""
        reason = detail = ""
        try:
            await self._install(version)
        except UnavailableError:
            raise
        except OSError as error:
            raise UnavailableError(f"update to {version}: {error}", reason="disk") from error
        except IsthmusError as error:
            reason, detail = error.reason, error.message
            log.warning("update refused", model=self._model, version=version, step=self.step.value, error=detail)
            if reason not in _MAY_PASS:  # what was fetched may be wanted yet
                await asyncio.to_thread(self._store.refuse, version, reason)
        else:
            self._enter(Step.REPORT, version)
        finally:
            self.step = Step.IDLE
        self.last = Outcome(
            self._model, from_version, version, self._variant, not reason, reason, detail, tuple(self._files)
        )
        self._report(self.last)
        return self.last

    async def _install(self, version: int) -> None:
        self._enter(Step.PLAN, version)
        plan = await self._plan(version)
        self._enter(Step.FETCH, version)
        await self._fetch(plan)
        self._enter(Step.VERIFY, version)
        await asyncio.to_thread(check_slot, plan.partial, plan.variant.id)
        self._enter(Step.SELF_TEST, version)
        live = await asyncio.to_thread(self._open, plan.partial, plan.variant.id)
        try:
            self._enter(Step.ACTIVATE, version)
            await asyncio.to_thread(self._store.seal, version)
            await asyncio.to_thread(self._store.activate, version, plan.variant.id)
        except BaseException:
            live.retire()
            raise
        self._models.swap(self._model, live)

    def _open(self, slot: Path, variant: str) -> LiveModel:
        try:
            return self._open_slot(slot, variant)
        except IsthmusError:
            raise
        except OSError as error:
            raise UnavailableError(f"slot {slot.name}: {error}", reason="disk") from error
        except Exception as error:  # whatever a bundle provokes in a runtime is a verdict on the bundle
            raise VerificationError(f"self-test: {error!r}"[:500], reason="self-test-crashed") from error

    def _enter(self, step: Step, version: int) -> None:
        if self.step not in _BEFORE[step]:
            raise RuntimeError(f"update of {self._model}: {step} cannot follow {self.step}")
        self.step = step
        log.info("update", model=self._model, version=version, step=step.value)

    async def _plan(self, version: int) -> _Plan:
        newest = self._store.state.newest
        if version < newest:
            raise TrustError(
                f"{self._model} has run version {newest} here and never goes back, to {version} was asked for",
                hint="publish the older model under a new version",
                reason="rollback",
            )
        data = await asyncio.to_thread(self._manifests.manifest, self._model, version)
        manifest = parse_manifest(data)
        if (manifest.name, manifest.version) != (self._model, version):
            got = f"{manifest.name}@{manifest.version}"
            raise BundleError(f"expected the manifest of {self._model}@{version}, got {got}")
        variant = self._choose(manifest)
        self._variant = variant.id
        files = plan_files(manifest.device_files(variant.id), await asyncio.to_thread(self._installed))
        return _Plan(version, data, variant, files, await asyncio.to_thread(self._store.partial, version))

    def _installed(self) -> dict[str, FileEntry]:
        state = self._store.state
        if not state.current:
            return {}
        manifest = parse_manifest((self._store.slot(state.current) / MANIFEST).read_bytes())
        return manifest.device_files(state.variant)

    async def _fetch(self, plan: _Plan) -> None:
        base = self._store.slot(self._store.state.current)
        for file in plan.files:
            self._files.append(await bring_file(self._fetcher, file, base=base, partial=plan.partial))
        await asyncio.to_thread(write_atomically, plan.partial / MANIFEST, plan.manifest_bytes)
