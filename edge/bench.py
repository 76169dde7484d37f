"""Which variant of a bundle is fastest on this device: measured here, with this device's runtimes, and kept.

A variant takes part when its files are there, its runtime is installed, its platform fits and its self-test passes:
what would be refused must not win. The variants are timed in turn, a few calls of each after the other, so that
whatever else the device does meets all alike; the figure is the median of the calls on one row of the golden inputs.

    DEVICE/variant.json   {"models": {NAME: {"variant": ID, "latency_ms": ..., "version": ..., "hardware": ...}}}

The updater prefers a variant that is named there; it never refuses a version that does not have it. With `choose_by =
"install"`, the agent measures by itself (edge.audition).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.numpy import load_file

from edge.plan import fits
from edge.runtimes import RUNTIMES, Runtime, is_installed, open_runtime
from edge.selftest import check_ceilings, resident_bytes, run_selftest, warm_up
from edge.store import check_slot, write_atomically
from isthmus.bundle import (
    CALIBRATION,
    GOLDEN,
    MANIFEST,
    Calibration,
    Manifest,
    Variant,
    check_calibration,
    parse_calibration,
    parse_manifest,
)
from isthmus.errors import BundleError, IsthmusError
from isthmus.machine import computes_bfloat16, machine, processor_name
from isthmus.tensors import Array

_FILE: Final = "variant.json"
_IN_A_ROW: Final = 5  # calls
_ROUNDS: Final = 20
_LONGEST_S: Final = 10.0  # for all rounds of all variants, when they are slow
_FEWEST: Final = 3  # rounds

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """One variant on this device; without a latency it did not take part, and `note` says why."""

    variant: str
    runtime: str
    precision: str
    latency_ms: float | None = None
    note: str = ""


def measure_variants(
    folder: Path, *, threads: int = 1, rounds: int = _ROUNDS, clock: Callable[[], float] = time.perf_counter
) -> tuple[Manifest, tuple[Timing, ...]]:
    """Return the manifest of a bundle's folder and its variants, fastest first (blocks for seconds).

    Args:
        folder: A bundle, or an installed version, which holds one variant.
        threads: Threads that one inference may use.
        rounds: Each is a few calls of every variant; fewer when they are slow.
        clock: Seconds.

    Raises:
        BundleError: The folder holds no manifest or calibration record that can be read.
    """
    try:
        manifest = parse_manifest((folder / MANIFEST).read_bytes())
        calibration = parse_calibration((folder / CALIBRATION).read_bytes())
    except OSError as error:
        raise BundleError(f"{folder} is not a bundle: {error}", hint="isthmus compile RECIPE makes one") from error
    timings = {v.id: Timing(v.id, v.runtime, v.precision) for v in manifest.variants}
    with ExitStack() as stack:
        runtimes: dict[str, Runtime] = {}
        for variant in manifest.variants:
            try:
                runtime = _open(folder, manifest, variant, calibration, threads)
            except IsthmusError as error:
                timings[variant.id] = replace(timings[variant.id], note=error.message)
                continue
            stack.callback(runtime.close)
            runtimes[variant.id] = runtime
        if runtimes:  # so the golden inputs can be read
            for name, latency_s in _time(runtimes, _one_row(folder, manifest), rounds, clock).items():
                timings[name] = replace(timings[name], latency_ms=latency_s * 1e3)
    taking_part = sorted((t for t in timings.values() if t.latency_ms is not None), key=lambda t: t.latency_ms or 0.0)
    return manifest, (*taking_part, *(t for t in timings.values() if t.latency_ms is None))


def _open(folder: Path, manifest: Manifest, variant: Variant, calibration: Calibration, threads: int) -> Runtime:
    why = fits(variant, machine=machine(), bfloat16=computes_bfloat16(), installed=is_installed)
    if why:
        raise BundleError(why, reason="no-fitting-variant")
    check_slot(folder, variant.id)
    check_calibration(manifest, variant, calibration)
    resident = resident_bytes()
    runtime = open_runtime(
        variant.runtime, folder / variant.entry, threads=threads, inference_precision=variant.inference_precision
    )
    try:
        run_selftest(runtime, manifest, variant, folder / GOLDEN)
        warm_up(runtime, manifest, folder / GOLDEN)
        check_ceilings(runtime, manifest, variant, folder / GOLDEN, grown_bytes=resident_bytes() - resident)
    except BaseException:
        runtime.close()
        raise
    return runtime


def _one_row(folder: Path, manifest: Manifest) -> dict[str, Array]:
    golden = load_file(folder / GOLDEN)
    inputs = {spec.name: golden[f"input.{spec.name}"] for spec in manifest.inputs}
    batched = all(spec.shape[:1] == (-1,) for spec in manifest.inputs)
    return {name: array[:1] if batched else array for name, array in inputs.items()}


def _time(
    runtimes: Mapping[str, Runtime], inputs: Mapping[str, Array], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in runtimes}
    until = clock() + _LONGEST_S
    for done in range(rounds):
        if done >= _FEWEST and clock() > until:
            break
        for name, runtime in runtimes.items():
            for _ in range(_IN_A_ROW):
                started = clock()
                runtime.infer(inputs)
                seconds[name].append(clock() - started)
    return {name: median(values) for name, values in seconds.items()}


class Choice(BaseModel):
    """The variant that was fastest."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    variant: str
    latency_ms: float | None = None  # None where measuring ended the process, and is not tried again
    version: int  # of the bundle that was measured
    hardware: str = ""  # what it was measured on; empty where nobody knows


class _Choices(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    models: dict[str, Choice] = {}


def hardware() -> str:
    """Return what measured times depend on: the processor, its cores, and the runtimes that are installed."""
    runtimes = ", ".join(name for name in RUNTIMES if is_installed(name))
    return f"{machine()}, {processor_name() or 'unknown processor'}, {os.cpu_count()} cores; {runtimes}"


def read_choice(home: Path, model: str) -> Choice | None:
    """Return what was chosen for a model by measuring; None when nothing was."""
    return _read(home).models.get(model)


def write_choice(home: Path, model: str, choice: Choice) -> None:
    """Keep a choice; those for other models stay.

    Raises:
        OSError: It cannot be written.
    """
    choices = _Choices(models=_read(home).models | {model: choice})
    write_atomically(home / _FILE, choices.model_dump_json(indent=2).encode() + b"\n")


def _read(home: Path) -> _Choices:
    path = home / _FILE
    try:
        return _Choices.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return _Choices()
    except (OSError, ValidationError) as error:  # a wish, not a promise: the order of the bundle is good enough
        log.warning("cannot read the measured choice of variants", path=str(path), error=str(error)[:200])
        return _Choices()
