"""The light model that serves: runtime, manifest and calibration record of one version, held together.

A version is swapped by replacing the reference. Requests hold the version that they began with; the runtime
of a retired version closes when the last of them is done: no request is lost, and none sees two versions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import structlog

from edge.batching import Batcher, takes_batches
from edge.counters import Counters
from edge.runtimes import Runtime, Worker, open_runtime
from edge.selftest import check_ceilings, compare_rows, resident_bytes, run_selftest, warm_up
from edge.tally import Tally
from isthmus.bundle import (
    CALIBRATION,
    GOLDEN,
    MANIFEST,
    Calibration,
    Manifest,
    Variant,
    VariantCalibration,
    check_calibration,
    parse_calibration,
    parse_manifest,
)
from isthmus.errors import InputError, NotFoundError, UnavailableError
from isthmus.oip import service_pb2, set_parameter
from isthmus.policies import Policy, make_policy
from isthmus.scores import HEAD, Score, ScoreOptions, open_score
from isthmus.tensors import Array

log = structlog.get_logger(__name__)


class LiveModel:
    """One version, opened and self-tested. Used from the event loop only."""

    def __init__(
        self,
        manifest: Manifest,
        variant: Variant,
        calibration: Calibration,
        worker: Worker | Batcher,
        score: Score,
        policy: Policy,
    ) -> None:
        self.manifest = manifest
        self.variant = variant
        self.calibration = calibration
        self.calibration_id = calibration.id
        self.policy = policy
        self.outputs = frozenset(spec.name for spec in manifest.outputs)
        self.signature = _signature(self)
        self.tally = Tally()
        self._worker = worker
        self._score = score
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

    @property
    def waiting(self) -> int:
        """Return the light inferences that wait or run."""
        return self._worker.pending

    async def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the light answer; call it inside `in_use`.

        Raises:
            OverloadedError: Too many requests are waiting.
        """
        return await self._worker.infer(inputs)

    async def time_beside(
        self, other: LiveModel, inputs: Mapping[str, Array], others: Mapping[str, Array]
    ) -> tuple[float, float]:
        """Return the seconds that one call takes here and one takes there, see `edge.runtimes.Worker.time_beside`."""
        return await self._single.time_beside(other._single, inputs, others)

    @property
    def _single(self) -> Worker:
        return self._worker.worker if isinstance(self._worker, Batcher) else self._worker

    def score(self, outputs: Mapping[str, Array]) -> float:
        """Return how sure the light answer is: the score of its least certain row, NaN when a row is not finite."""
        return float(self._score(outputs).min())

    def begin_service(self) -> None:
        """Count from here on: what was computed before, for a test, is not of its service."""
        self.tally = Tally()

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
    set_parameter(signature, "isthmus.calibration", live.calibration_id)
    set_parameter(signature, "isthmus.edge_version", manifest.version)
    return signature


def open_model(
    slot: Path,
    variant_id: str,
    *,
    threads: int = 1,
    queue: int = 64,
    batch_delay_s: float = 0.0,
    batch_rows: int = 16,
    policy: str = "threshold",
) -> LiveModel:
    """Open the installed version in `slot`, run its self-test and warm the runtime up (blocks).

    Args:
        slot: The version's folder.
        variant_id: The variant that is installed.
        threads: Threads that one inference may use.
        queue: Requests that may wait for the model.
        batch_delay_s: How long requests may wait for others to share a batch; 0 for no batches.
        batch_rows: Rows of such a batch.
        policy: What decides which requests escalate, see `isthmus.policies.make_policy`.

    Raises:
        BundleError: The manifest, the calibration record or the model file is malformed.
        VerificationError: The self-test failed.
        ConfigError: The runtime is not installed or cannot compute as the variant asks, or the policy cannot be.
    """
    manifest = parse_manifest((slot / MANIFEST).read_bytes())
    variant = manifest.variant(variant_id)
    calibration = parse_calibration((slot / CALIBRATION).read_bytes())
    check_calibration(manifest, variant, calibration)
    point = calibration.variants[variant.id]
    decider = make_policy(policy, point, chance=random.SystemRandom())
    resident = resident_bytes()
    runtime = open_runtime(
        variant.runtime,
        slot / variant.entry,
        threads=threads,
        inference_precision=variant.inference_precision,
    )
    try:
        score = _open_score(slot, variant, calibration)
        outputs = run_selftest(runtime, manifest, variant, slot / GOLDEN)
        score(outputs)  # an output or a feature that is missing shows here, not in the first request
        warm_up(runtime, manifest, slot / GOLDEN)
        grown = resident_bytes() - resident
        check_ceilings(runtime, manifest, variant, slot / GOLDEN, grown_bytes=grown)
        batches = batch_delay_s > 0 and _may_batch(runtime, manifest, variant, slot / GOLDEN)
    except BaseException:
        runtime.close()
        raise
    worker = Worker(runtime, queue=queue)
    max_rows = min(batch_rows, manifest.max_batch)
    batcher = Batcher(worker, delay_s=batch_delay_s, max_rows=max_rows, queue=queue) if batches else None
    return LiveModel(manifest, variant, calibration, batcher or worker, score, decider)


def _open_score(slot: Path, variant: Variant, calibration: Calibration) -> Score:
    options = ScoreOptions(
        calibration.output,
        calibration.variants[variant.id].temperature,
        features=calibration.features,
        head=slot / "variants" / variant.id / HEAD,
        costs=calibration.costs,
    )
    return open_score(calibration.score, options)


def _may_batch(runtime: Runtime, manifest: Manifest, variant: Variant, golden: Path) -> bool:
    if not takes_batches(manifest):
        log.info("no batching: not every tensor has a batch axis", model=manifest.name)
        return False
    try:
        difference = compare_rows(runtime, manifest, golden)
    except InputError:  # it takes the golden batch and no other
        difference = math.inf
    if difference > variant.tolerance:
        log.warning("no batching: rows of a batch get other answers", model=manifest.name, difference=difference)
        return False
    return True


class ServedModels:
    """The models that this agent serves, by name; a model whose first version has not come yet is None."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._live: dict[str, LiveModel | None] = dict.fromkeys(names)
        self.counters = {name: Counters() for name in names}
        self.unserved = Counters()  # requests that name no model of these

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

    def counters_of(self, name: str) -> Counters:
        """Return where a request that names this model is counted."""
        return self.counters.get(name, self.unserved)

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

    def live(self, name: str) -> LiveModel | None:
        """Return what serves under this name."""
        return self._live[name]

    def swap(self, name: str, live: LiveModel | None) -> None:
        """Serve `live` from now on; the version before it closes after its requests in progress."""
        before = self.exchange(name, live)
        if before is not None:
            before.retire()

    def exchange(self, name: str, live: LiveModel | None) -> LiveModel | None:
        """Serve `live` from now on; return the version before it, open, for the caller to keep or to retire."""
        before, self._live[name] = self._live[name], live
        return before
