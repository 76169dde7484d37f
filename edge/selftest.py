"""Self-test: golden inputs through the device's own runtime, before a version may serve and at every start.

The checks, in order; each failure has its own reason. That the calibration record is this bundle's and covers the
variant has been checked before (`isthmus.bundle.check_calibration`).

1. The golden file has every input, and this variant's expected, finite outputs    bad-golden
2. The runtime computes them, with the declared names, types and shapes            cannot-infer, golden-shape
3. Every value is finite                                                           golden-not-finite
4. No value differs from the expected one by more than the variant's tolerance     golden-mismatch
5. One row takes no longer, and the process grows no more, than the manifest says  too-slow, too-large
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import structlog
from safetensors import SafetensorError
from safetensors.numpy import load_file

from edge.runtimes import Runtime
from isthmus.bundle import GOLDEN, Manifest, Variant
from isthmus.errors import InputError, VerificationError
from isthmus.tensors import DATATYPE_OF, Array

_WARM_UPS: Final = 4
_TIMED: Final = 9  # calls whose median is compared with the ceiling

log = structlog.get_logger(__name__)


def run_selftest(runtime: Runtime, manifest: Manifest, variant: Variant, golden: Path) -> Mapping[str, Array]:
    """Return the outputs for the golden inputs, features too, after comparing them with the golden outputs.

    Raises:
        VerificationError: The runtime's answers are not those that the variant was accepted with.
    """
    tensors = _load(golden)
    inputs = {spec.name: _golden(tensors, f"input.{spec.name}", spec.datatype) for spec in manifest.inputs}
    expected = {
        spec.name: _golden(tensors, f"output.{variant.id}.{spec.name}", spec.datatype) for spec in manifest.outputs
    }
    try:
        actual = runtime.infer(inputs)
    except InputError as error:
        raise VerificationError(f"golden inputs: {error.message}", reason="cannot-infer") from error
    worst = max(_difference(name, want, actual.get(name)) for name, want in expected.items())
    if worst > variant.tolerance:
        raise VerificationError(
            f"golden outputs of {variant.id}: expected to be within {variant.tolerance:g}, got {worst:.3g}",
            reason="golden-mismatch",
        )
    for spec in manifest.features:
        features = actual.get(spec.name)
        if features is None or DATATYPE_OF.get(features.dtype) != spec.datatype or not np.isfinite(features).all():
            raise VerificationError(f"features {spec.name!r}: expected finite {spec.datatype}", reason="golden-shape")
    return actual


def warm_up(runtime: Runtime, manifest: Manifest, golden: Path) -> None:
    """Run the smallest request a few times: what a runtime prepares for a new shape may take 100 times as long.

    Args:
        runtime: Has passed the self-test.
        manifest: Of the model.
        golden: The bundle's golden file.
    """
    inputs = one_row(manifest, golden)
    try:
        for _ in range(_WARM_UPS):
            runtime.infer(inputs)
    except InputError as error:  # no verdict on the version: it has passed
        log.info("no warm-up with one row", model=manifest.name, error=error.message)


def check_ceilings(runtime: Runtime, manifest: Manifest, variant: Variant, golden: Path, *, grown_bytes: int) -> None:
    """Check time and memory against what the manifest allows; a variant without ceilings passes.

    Args:
        runtime: Is warm.
        manifest: Of the model.
        variant: With the ceilings.
        golden: The bundle's golden file.
        grown_bytes: What the process has grown by since before the runtime was opened.

    Raises:
        VerificationError: It is slower or larger than it may be here.
    """
    ceilings = variant.ceilings
    if ceilings is None:
        return
    if ceilings.memory_bytes is not None and grown_bytes > ceilings.memory_bytes:
        told = f"expected to take at most {ceilings.memory_bytes} bytes of memory, took {grown_bytes}"
        raise VerificationError(f"{variant.id}: {told}", reason="too-large")
    if ceilings.latency_ms is None:
        return
    inputs = one_row(manifest, golden)
    times = []
    for _ in range(_TIMED):
        started = time.perf_counter()
        try:
            runtime.infer(inputs)
        except InputError:  # it takes the golden batch and no other
            return
        times.append((time.perf_counter() - started) * 1e3)
    median = sorted(times)[_TIMED // 2]
    if median > ceilings.latency_ms:
        told = f"expected one row to take at most {ceilings.latency_ms:g} ms, took {median:.3g} ms here"
        raise VerificationError(f"{variant.id}: {told}", reason="too-slow")


def one_row(manifest: Manifest, golden: Path) -> dict[str, Array]:
    """Return the first golden inputs: one row, where the first axis is the batch.

    Raises:
        VerificationError: The golden file is malformed.
    """
    tensors = _load(golden)
    return {
        spec.name: tensors[f"input.{spec.name}"][:1] if spec.shape[:1] == (-1,) else tensors[f"input.{spec.name}"]
        for spec in manifest.inputs
    }


def resident_bytes() -> int:
    """Return the memory of this process that is in use; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def compare_rows(runtime: Runtime, manifest: Manifest, golden: Path, *, limit: int = 8) -> float:
    """Return the largest difference between golden inputs computed as one batch and row by row.

    Args:
        runtime: Has passed the self-test.
        manifest: Of a model whose first axes are all the batch.
        golden: The bundle's golden file.
        limit: Rows to compare.
    """
    tensors = _load(golden)
    inputs = {spec.name: tensors[f"input.{spec.name}"][:limit] for spec in manifest.inputs}
    together = runtime.infer(inputs)
    rows = len(next(iter(inputs.values())))
    alone = [runtime.infer({name: array[i : i + 1] for name, array in inputs.items()}) for i in range(rows)]
    return max(
        _difference(spec.name, np.concatenate([row[spec.name] for row in alone]), together[spec.name])
        for spec in manifest.outputs
    )


def _load(golden: Path) -> Mapping[str, Array]:
    try:
        tensors: dict[str, Array] = load_file(golden)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise VerificationError(f"{GOLDEN}: {error}", reason="bad-golden") from error
    return tensors


def _golden(tensors: Mapping[str, Array], key: str, datatype: str) -> Array:
    array = tensors.get(key)
    if array is None or array.size == 0 or DATATYPE_OF.get(array.dtype) != datatype:
        came = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
        raise VerificationError(f"{GOLDEN}: expected {key} of {datatype}, got {came}", reason="bad-golden")
    return array


def _difference(name: str, want: Array, got: Array | None) -> float:
    if got is None or got.shape != want.shape or got.dtype != want.dtype:
        came = "nothing" if got is None else f"{got.dtype} {list(got.shape)}"
        raise VerificationError(
            f"golden output {name}: expected {want.dtype} {list(want.shape)}, got {came}",
            reason="golden-shape",
        )
    if not np.isfinite(want).all():  # every difference from it would pass
        raise VerificationError(f"{GOLDEN}: output {name}: expected finite numbers", reason="bad-golden")
    if not np.isfinite(got).all():
        raise VerificationError(f"golden output {name}: expected finite numbers", reason="golden-not-finite")
    return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max())
