"""A registry in this process, with real bundles and real deltas; it implements the updater's ports.

A test corrupts one thing through `fail`, `tamper` or `manifests`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from edge.conditions import Conditions
from edge.config import UpdateSettings
from edge.model import ServedModels, open_model
from edge.outcome import Outcome
from edge.plan import choose_variant
from edge.store import SlotStore
from edge.trial import Terms
from edge.updater import Updater
from isthmus.bundle import FileEntry, parse_manifest
from isthmus.delta import make_delta
from isthmus.errors import IsthmusError, NotFoundError, UnavailableError
from security.trust import SignedTarget
from tests.edge import bundles


def ignore(outcome: Outcome) -> None:
    del outcome


class Registry:
    def __init__(self, root: Path, versions: tuple[int, ...]) -> None:
        self._root = root
        self._blobs: dict[str, Path] = {}
        self.calls: list[str] = []
        self.fail: dict[str, IsthmusError] = {}  # by "manifest", "blob" or "delta"
        self.tamper: dict[str, Callable[[bytes], bytes]] = {}  # by the same, and by SHA-256
        self.floors: dict[int, int] = {}
        self.withdrawn: dict[int, str] = {}
        self.break_after: int | None = None  # bytes of a blob after which the connection is lost
        for version in versions:
            self.publish(version)

    def folder(self, version: int) -> Path:
        return self._root / str(version)

    def publish(self, version: int, build: Callable[..., object] = bundles.build_bundle) -> None:
        build(self.folder(version), version)
        self.index(version)

    def index(self, version: int) -> None:
        for path, entry in parse_manifest((self.folder(version) / "manifest.json").read_bytes()).files.items():
            self._blobs[entry.sha256] = self.folder(version) / path

    def entry(self, version: int, path: str) -> FileEntry:
        return parse_manifest((self.folder(version) / "manifest.json").read_bytes()).files[path]

    def target(self, model: str, version: int) -> SignedTarget:
        self._enter("manifest")
        data = self._tampered("manifest", (self.folder(version) / "manifest.json").read_bytes())
        return SignedTarget(data, self.floors.get(version, 0), self.withdrawn.get(version, ""))

    async def blob(self, sha256: str, path: Path, *, length: int) -> int:
        self._enter("blob")
        if sha256 not in self._blobs:
            raise NotFoundError("no such blob")
        data = self._tampered(sha256, self._tampered("blob", self._blobs[sha256].read_bytes()))
        return self._append(path, data)

    async def delta(self, from_sha256: str, to_sha256: str, path: Path, *, limit: int) -> int:
        self._enter("delta")
        file = self._root / "delta"
        make_delta(self._blobs[from_sha256], self._blobs[to_sha256], file)
        data = self._tampered("delta", file.read_bytes())
        if len(data) >= limit:
            raise NotFoundError("not worth its bytes")
        return self._append(path, data)

    def _append(self, path: Path, data: bytes) -> int:
        have = path.stat().st_size if path.exists() else 0
        rest = data[have:]
        if self.break_after is not None and len(rest) > self.break_after:
            rest = rest[: self.break_after]
            with path.open("ab") as file:
                file.write(rest)
            raise UnavailableError("connection lost")
        with path.open("ab") as file:
            file.write(rest)
        return len(rest)

    def _enter(self, kind: str) -> None:
        self.calls.append(kind)
        if kind in self.fail:
            raise self.fail[kind]

    def _tampered(self, key: str, data: bytes) -> bytes:
        return self.tamper[key](data) if key in self.tamper else data


def make_updater(
    home: Path,
    registry: Registry,
    models: ServedModels,
    *,
    report: Callable[[Outcome], None] = ignore,
    variant: str | None = "onnxruntime-fp32",
    settings: UpdateSettings | None = None,
    now: Callable[[], datetime] = datetime.now,
    **parts: Any,
) -> Updater:
    """`parts` are further arguments of the updater."""
    clock = {"clock": parts["clock"]} if "clock" in parts else {}
    given: dict[str, Any] = {
        "manifests": registry,
        "fetcher": registry,
        "choose": partial(
            choose_variant, configured=variant, machine="x86_64", bfloat16=True, installed=lambda name: True
        ),
        "open_slot": open_model,
        "report": report,
        "conditions": Conditions(settings or UpdateSettings(trial=Terms()), "device-1", "triage", now=now, **clock),
    }
    return Updater("triage", SlotStore(home), models, **given | parts)
