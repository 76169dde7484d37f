"""The light model that serves: runtime, manifest and calibration record of one version, held together.

A version is swapped by replacing the reference. Requests hold the version that they began with; the runtime
of a retired version closes when the last of them is done: no request is lost, and none sees two versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from edge.policy import ROUTES, Route
from edge.runtimes import Worker, open_runtime
from edge.selftest import check_calibration, run_selftest
from isthmus.bundle import (
    CALIBRATION,
    GOLDEN,
    MANIFEST,
    Calibration,
    Manifest,
    Variant,
    VariantCalibration,
    parse_calibration,
    parse_manifest,
)
from isthmus.errors import NotFoundError, UnavailableError
from isthmus.oip import service_pb2, set_parameter
from isthmus.tensors import Array


class LiveModel:
    """One version, opened and self-tested. Used from the event loop only."""

    def __init__(self, manifest: Manifest, variant: Variant, calibration: Calibration, worker: Worker) -> None:
        self.manifest = manifest
        self.variant = variant
        self.calibration = calibration
        self.calibration_id = calibration.id
        self.outputs = frozenset(spec.name for spec in manifest.outputs)
        self.signature = _signature(self)
        self._worker = worker
        self._requests = 0
        self._retired = False

    @property
    def operating_point(self) -> VariantCalibration:
        """Return temperature and threshold of this variant."""
        return self.calibration.variants[self.variant.id]

    def in_use(self) -> AbstractContextManager[LiveModel]:
        """Keep the runtime open for the duration of one request."""
        return self

    def __enter__(self) -> Self:
        self._requests += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._requests -= 1
        self._close_if_done()

    async def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the light answer; call it inside `in_use`.

        Raises:
            UnavailableError: Too many requests are waiting.
        """
        return await self._worker.infer(inputs)

    def retire(self) -> None:
        """Close the runtime once the requests in progress are done."""
        self._retired = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._retired and self._requests == 0:
            self._worker.close()


def _signature(live: LiveModel) -> Any:
    """Return what all answers of this version share, as a ModelInferResponse."""
    manifest = live.manifest
    signature = service_pb2.ModelInferResponse(model_name=manifest.name, model_version=str(manifest.version))
    set_parameter(signature, "isthmus.threshold", live.operating_point.threshold)
    set_parameter(signature, "isthmus.calibration", live.calibration_id)
    set_parameter(signature, "isthmus.edge_version", manifest.version)
    return signature


def open_model(slot: Path, variant_id: str, *, threads: int = 1, queue: int = 64) -> LiveModel:
    """Open the installed version in `slot` and run its self-test, which also warms the runtime up (blocks).

    Raises:
        BundleError: The manifest, the calibration record or the model file is malformed.
        VerificationError: The self-test failed.
        ConfigError: The runtime is not installed or cannot compute as the variant asks.
    """
    manifest = parse_manifest((slot / MANIFEST).read_bytes())
    variant = manifest.variant(variant_id)
    calibration = parse_calibration((slot / CALIBRATION).read_bytes())
    check_calibration(manifest, variant, calibration)
    runtime = open_runtime(
        variant.runtime,
        slot / variant.entry,
        threads=threads,
        inference_precision=variant.inference_precision,
    )
    try:
        run_selftest(runtime, manifest, variant, slot / GOLDEN)
    except BaseException:
        runtime.close()
        raise
    return LiveModel(manifest, variant, calibration, Worker(runtime, queue=queue))


@dataclass(slots=True)
class RouteCount:
    """Answers of one route."""

    answers: int = 0
    rows: int = 0
    total_ns: int = 0


@dataclass(slots=True)
class Counters:
    """What became of a model's requests since the agent started; every request is counted once."""

    routes: dict[Route, RouteCount] = field(default_factory=lambda: {route: RouteCount() for route in ROUTES})
    errors: int = 0
    error_ns: int = 0
    light_inferences: int = 0
    light_ns: int = 0
    last_ms: int = 0  # wall clock of the last answer

    def answered(self, route: Route, rows: int, elapsed_ns: int, now_ms: int) -> None:
        """Count one answer."""
        count = self.routes[route]
        count.answers += 1
        count.rows += rows
        count.total_ns += elapsed_ns
        self.last_ms = now_ms


class ServedModels:
    """The models that this agent serves, by name; a model whose first version has not come yet is None."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._live: dict[str, LiveModel | None] = dict.fromkeys(names)
        self.counters = {name: Counters() for name in names}

    def __iter__(self) -> Iterator[tuple[str, LiveModel | None]]:
        return iter(self._live.items())

    @property
    def ready(self) -> bool:
        """Return whether every model serves."""
        return all(live is not None for live in self._live.values())

    def version(self, name: str) -> int:
        """Return the version that serves, 0 for none."""
        live = self._live[name]
        return 0 if live is None else live.manifest.version

    def find(self, name: str, version: str = "") -> LiveModel:
        """Return the live version of a model.

        Raises:
            NotFoundError: It is not served here, or in another version; the message lists what is.
            UnavailableError: Its first version is not installed yet.
        """
        if name not in self._live:
            served = ", ".join(self._live) or "none"
            raise NotFoundError(f"no model {name[:80]!r} here; models served: {served}", reason="unknown-model")
        live = self._live[name]
        if live is None:
            raise UnavailableError(f"model {name!r} is not installed yet", reason="not-ready")
        if version not in ("", str(live.manifest.version)):
            raise NotFoundError(
                f"model {name!r}: no version {version[:40]!r}; version served: {live.manifest.version}",
                reason="unknown-version",
            )
        return live

    def swap(self, name: str, live: LiveModel | None) -> None:
        """Serve `live` from now on; the version before it closes after its requests in progress."""
        before, self._live[name] = self._live[name], live
        if before is not None:
            before.retire()
