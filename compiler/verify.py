"""Nothing worse goes into a bundle: every variant against the source model, on all calibration data.

The source is the ONNX file itself in ONNX Runtime. What is checked, in order:
 (1) outputs have the declared names, datatypes and shapes, and every value is finite;
 (2) a row alone gives what it gives in a batch;
 (3) fp32: no output differs from the source's by more than the guard allows;
 (4) int8: the accuracy is not lower than the source's by more than the guard allows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from compiler.data import LabelledSamples
from compiler.evaluate import accuracy
from compiler.recipe import GuardSection
from compiler.targets import Runner
from isthmus.bundle import TensorSpec
from isthmus.errors import VerificationError
from isthmus.tensors import DTYPES, Array

GOLDEN_ROWS: Final = 16
_WARM_UP: Final = 10
_RUNS: Final = 100
# Share of the golden outputs' range within which another machine's answers count as the same. Measured on the
# encoder of the news story: fp32 differs by 1e-7 of the range between AVX-512 and AVX2, INT8 by 6e-3 (processors
# without VNNI add up in another way, and single roundings flip).
_TOLERANCE: Final = {"fp32": 1e-3, "int8": 5e-2}
_LEAST_TOLERANCE: Final = 1e-3
_ROUNDING: Final = 1e-9  # 0.9 - 0.88 is more than 0.02 in floating point; one row of data is far more than this


@dataclass(frozen=True, slots=True)
class Measured:
    """What a variant did with the calibration data; `refused` says why it cannot be used, or is empty."""

    accuracy: float
    max_difference: float
    refused: str = ""


def check_variant(
    outputs: Mapping[str, Array],
    source: Mapping[str, Array],
    data: LabelledSamples,
    *,
    specs: Sequence[TensorSpec],
    score_output: str,
    precision: str,
    guard: GuardSection,
) -> Measured:
    """Compare a variant's outputs with the source model's: rules (1), (3) and (4)."""
    # (1)
    broken = _broken(outputs, specs, len(data))
    if broken:
        return Measured(0.0, float("inf"), broken)
    difference = max(float(np.abs(outputs[spec.name].astype(np.float64) - source[spec.name]).max()) for spec in specs)
    ours, theirs = (accuracy(logits[score_output], data.labels) for logits in (outputs, source))
    refused = ""
    # (3)
    if precision == "fp32" and difference > guard.max_difference:
        refused = f"it differs from the source by {difference:.3g}, allowed is {guard.max_difference:g}"
    # (4)
    if precision != "fp32" and theirs - ours > guard.max_accuracy_drop + _ROUNDING:
        fall = f"{theirs - ours:.4f} ({theirs:.4f} to {ours:.4f})"
        refused = f"its accuracy fell by {fall}, allowed is {guard.max_accuracy_drop:g}"
    return Measured(ours, difference, refused)


def check_source(outputs: Mapping[str, Array], specs: Sequence[TensorSpec], rows: int, *, what: str) -> None:
    """Check that a source model's own outputs are what its file declares.

    Raises:
        VerificationError: They are not.
    """
    broken = _broken(outputs, specs, rows)
    if broken:
        raise VerificationError(f"the {what} model itself: {broken}", reason="broken-source")


def _broken(outputs: Mapping[str, Array], specs: Sequence[TensorSpec], rows: int) -> str:
    for spec in specs:
        array = outputs.get(spec.name)
        if array is None:
            return f"gives no output {spec.name!r}"
        expected = (rows, *spec.shape[1:])
        if array.dtype != DTYPES[spec.datatype] or array.shape != expected:
            return (
                f"output {spec.name!r} is {array.dtype}{list(array.shape)}, declared is {spec.datatype}{list(expected)}"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"output {spec.name!r} holds values that are not finite"
    return ""


def golden_rows(count: int) -> list[int]:
    """Return the rows that become golden inputs, spread evenly."""
    return sorted({int(row) for row in np.linspace(0, count - 1, min(count, GOLDEN_ROWS)).round()})


def one_by_one(runner: Runner, inputs: Mapping[str, Array], rows: Sequence[int]) -> dict[str, Array]:
    """Return the outputs for these rows, each run alone."""
    parts = [runner.infer({name: array[row : row + 1] for name, array in inputs.items()}) for row in rows]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_batching(alone: Mapping[str, Array], batched: Mapping[str, Array], rows: Sequence[int], limit: float) -> str:
    """Return why rows alone and rows in a batch do not give the same, or nothing: rule (2)."""
    for name, array in alone.items():
        together = batched[name][list(rows)]
        if array.shape != together.shape:
            return f"output {name!r} has another shape for a row alone"
        difference = float(np.abs(array.astype(np.float64) - together).max())
        if difference > limit:
            return f"output {name!r} of a row alone differs by {difference:.3g} from the same row in a batch"
    return ""


def tolerance(golden: Mapping[str, Array], precision: str) -> float:
    """Return by how much another machine's outputs may differ from the golden ones."""
    spread = max((float(np.ptp(array)) for array in golden.values() if array.dtype.kind == "f"), default=0.0)
    return max(_LEAST_TOLERANCE, _TOLERANCE[precision] * spread)


def latency_ms(runner: Runner, inputs: Mapping[str, Array]) -> float:
    """Return the median time of one row, in milliseconds."""
    row = {name: array[:1] for name, array in inputs.items()}
    times: list[float] = []
    for _ in range(_WARM_UP + _RUNS):
        start = time.perf_counter()
        runner.infer(row)
        times.append(time.perf_counter() - start)
    return statistics.median(times[_WARM_UP:]) * 1e3
