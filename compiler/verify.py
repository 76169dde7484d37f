"""Nothing worse goes into a bundle: every variant against the source model, on all calibration data and at the edges.

The source is the captured ONNX file in ONNX Runtime. What is checked, in order:
 (1) outputs have the declared names, datatypes and shapes, and every value is finite;
 (2) a row alone gives what it gives in a batch;
 (3) fp32: no output differs from the source's by more than the guard allows, neither on the data nor on edge cases;
 (4) other precisions: outputs point in the source's direction (cosine), and the metric is not lower than the source's
     by more than the guard allows.

`prove` measures, where the variant runs; `verdict` judges by the guard, and needs nothing but what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import load_file, save_file

from compiler.capture import CapturedModel
from compiler.data import as_samples, request, requests, run_over
from compiler.edge_cases import edge_cases
from compiler.parity import Parity, ParityMeter
from compiler.recipe import GuardSection
from compiler.targets import Runner
from isthmus.bundle import TensorSpec
from isthmus.errors import InputError, VerificationError
from isthmus.tensors import DTYPES, Array

GOLDEN_ROWS: Final = 16
BATCH: Final = 64
# Share of the golden outputs' range within which another machine's answers count as the same. Measured on the
# encoder of the news story: fp32 differs by 1e-7 of the range between AVX-512 and AVX2, INT8 by 6e-3 (processors
# without VNNI add up in another way, and single roundings flip). fp16: a device may compute in it as well.
_TOLERANCE: Final = {
    "fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2, "int8w": 5e-2, "int8": 5e-2, "int8-bf16": 5e-2, "int4w": 5e-2,
    "int4": 5e-2,
}  # fmt: skip
# What could not run where it was built is compared with the source's answers, not with its own.
_UNSEEN: Final = {
    "fp32": 1e-2, "bf16": 1e-1, "fp16": 5e-2, "int8w": 1e-1, "int8": 2e-1, "int8-bf16": 2e-1, "int4w": 2e-1,
    "int4": 2e-1,
}  # fmt: skip
_LEAST_TOLERANCE: Final = 1e-3
_ROUNDING: Final = 1e-9  # 0.9 - 0.88 is more than 0.02 in floating point; one row of data is far more than this
# The least cosine between a variant's outputs and the source's: far below what any usable variant has.
LEAST_COSINE: Final[Mapping[str, float]] = {
    "fp32": 0.99999, "bf16": 0.99, "fp16": 0.9999, "int8w": 0.99, "int8": 0.95, "int8-bf16": 0.95, "int4w": 0.9,
    "int4": 0.9,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class EdgeResult:
    """One edge case: how far a variant is from the source, or what is wrong with its answer."""

    name: str
    max_absolute: float
    difference: float  # as in `Parity`
    broken: str = ""


@dataclass(frozen=True, slots=True)
class Proof:
    """What a variant did with the calibration data."""

    parity: Parity | None  # None: the outputs have the wrong form, see `broken`
    edges: tuple[EdgeResult, ...]
    broken: str = ""  # rules (1) and (2)


@dataclass(frozen=True, slots=True)
class Materials:
    """Files that all variants of one model are compared with: inputs and the source's answers."""

    folder: Path

    @property
    def inputs(self) -> Path:
        """Return the calibration inputs."""
        return self.folder / "inputs.safetensors"

    @property
    def reference(self) -> Path:
        """Return the source's outputs for them."""
        return self.folder / "reference.safetensors"

    @property
    def edges(self) -> Path:
        """Return the edge cases: "<case>/in/<input>" and "<case>/out/<output>"."""
        return self.folder / "edges.safetensors"


def prepare(
    model: CapturedModel,
    inputs: Mapping[str, Array],
    source: Runner,
    materials: Materials,
    *,
    max_batch: int,
    advance: Callable[[int, int], None],
) -> dict[str, Array]:
    """Run the source over the data and the edge cases, keep both for the variants' proofs, return its outputs.

    Raises:
        VerificationError: Its outputs are not what its file declares.
    """
    materials.folder.mkdir(parents=True, exist_ok=True)
    outputs = run_over(source.infer, model, inputs, batch=BATCH, advance=advance)
    check_source(outputs, model, len(next(iter(inputs.values()))), what="light")
    save_file({name: np.ascontiguousarray(array) for name, array in inputs.items()}, materials.inputs)
    save_file({name: np.ascontiguousarray(array) for name, array in outputs.items()}, materials.reference)
    tensors: dict[str, Array] = {}
    for name, case in edge_cases(model, inputs, max_batch).items():
        answer = source.infer(case)
        if all(np.isfinite(array).all() for array in answer.values() if array.dtype.kind == "f"):
            tensors |= {f"{name}/in/{key}": np.ascontiguousarray(array) for key, array in case.items()}
            tensors |= {f"{name}/out/{key}": np.ascontiguousarray(array) for key, array in answer.items()}
    save_file(tensors, materials.edges)
    return outputs


def prove(
    runner: Runner, alone: Runner, model: CapturedModel, materials: Materials, precision: str, score_output: str,
    advance: Callable[[int, int], None],
) -> tuple[Proof, dict[str, Array], dict[str, Array]]:  # fmt: skip
    """Return what the variant does with data and edge cases, its logits for all samples, and its golden outputs.

    Args:
        runner: The variant, with all threads it may use.
        alone: The variant, with one thread.
        model: The captured model.
        materials: The data and the source's answers.
        precision: The variant's.
        score_output: The output whose values are returned for all samples; empty: none.
        advance: Told (done, total).
    """
    inputs, reference = load_file(materials.inputs), load_file(materials.reference)
    total = len(next(iter(inputs.values())))
    meter, kept, previous = ParityMeter(), [], 0
    rows = golden_rows(total)
    together: dict[str, list[Array]] = {spec.name: [] for spec in model.outputs}
    for done, asked in requests(model, inputs, BATCH):
        outputs = as_samples(model, runner.infer(asked))
        expected = {name: array[previous:done] for name, array in reference.items()}
        broken = _broken(outputs, expected)
        if broken:
            return Proof(None, (), broken), {}, {}
        meter.add({name: outputs[name] for name in expected}, expected)
        if score_output:
            kept.append(outputs[score_output].copy())
        for row in rows:
            if previous <= row < done:
                for name in together:
                    together[name].append(outputs[name][row - previous : row - previous + 1].copy())
        previous = done
        advance(done, total)
    golden = one_by_one(alone, model, inputs, rows)
    broken = check_batching(
        golden, {name: np.concatenate(parts) for name, parts in together.items()}, tolerance(golden, precision)
    )
    logits = {score_output: np.concatenate(kept)} if score_output else {}
    return Proof(meter.result(), _edge_results(runner, materials), broken), logits, golden


def _edge_results(runner: Runner, materials: Materials) -> tuple[EdgeResult, ...]:
    tensors = load_file(materials.edges)
    results = []
    for name in dict.fromkeys(key.split("/", 1)[0] for key in tensors):
        parts = {side: f"{name}/{side}/" for side in ("in", "out")}
        case, expected = (
            {key.removeprefix(start): array for key, array in tensors.items() if key.startswith(start)}
            for start in parts.values()
        )
        try:
            outputs = runner.infer(case)
        except InputError as error:
            results.append(EdgeResult(name, 0.0, 0.0, error.message))
            continue
        broken = _broken(outputs, expected)
        if broken:
            results.append(EdgeResult(name, 0.0, 0.0, broken))
            continue
        meter = ParityMeter()
        meter.add({key: outputs[key] for key in expected}, expected)
        parity = meter.result()
        results.append(EdgeResult(name, parity.max_absolute, parity.difference))
    return tuple(results)


def verdict(proof: Proof, precision: str, guard: GuardSection, *, source_value: float, value: float) -> str:
    """Return why a variant may not go into a bundle, or nothing.

    Args:
        proof: What was measured.
        precision: The variant's.
        guard: What is allowed.
        source_value: The source's metric.
        value: The variant's.
    """
    # (1), (2)
    if proof.broken or proof.parity is None:
        return proof.broken
    for edge in proof.edges:
        if edge.broken:
            return f"{edge.name}: {edge.broken}"
    # (3)
    if precision == "fp32":
        if proof.parity.difference > guard.max_difference:
            return f"it differs from the source by {proof.parity.difference:.3g}, allowed is {guard.max_difference:g}"
        for edge in proof.edges:
            if edge.difference > guard.max_difference:
                return (
                    f"{edge.name}: it differs from the source by {edge.difference:.3g}, "
                    f"allowed is {guard.max_difference:g}"
                )
        return ""
    # (4)
    if source_value - value > guard.max_accuracy_drop + _ROUNDING:
        fall = f"{source_value - value:.4f} ({source_value:.4f} to {value:.4f})"
        return f"its {guard.metric} fell by {fall}, allowed is {guard.max_accuracy_drop:g}"
    least = LEAST_COSINE[precision]
    if proof.parity.cosine < least:
        return f"its outputs have a cosine of {proof.parity.cosine:.4f} with the source's, the least allowed is {least}"
    return ""


def check_source(outputs: Mapping[str, Array], model: CapturedModel, rows: int, *, what: str) -> None:
    """Check that a source model's own outputs are what its file declares.

    Raises:
        VerificationError: They are not.
    """
    for spec in model.outputs:
        broken = _undeclared(spec, outputs.get(spec.name), rows)
        if broken:
            raise VerificationError(f"the {what} model itself: {broken}", reason="broken-source")


def _undeclared(spec: TensorSpec, array: Array | None, rows: int) -> str:
    if array is None:
        return f"gives no output {spec.name!r}"
    shape = array.shape if len(spec.shape) == array.ndim else array.shape[1:]
    fits = len(shape) == len(spec.shape) and all(
        want in (-1, got) or (place == 0 and want == 1)
        for place, (want, got) in enumerate(zip(spec.shape, shape, strict=True))
    )
    if array.dtype != DTYPES[spec.datatype] or not fits or len(array) != rows:
        return (
            f"output {spec.name!r} is {array.dtype}{list(array.shape)} for {rows} samples, "
            f"declared is {spec.datatype}{list(spec.shape)}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return f"output {spec.name!r} holds values that are not finite"
    return ""


def _broken(outputs: Mapping[str, Array], expected: Mapping[str, Array]) -> str:
    for name, want in expected.items():
        array = outputs.get(name)
        if array is None:
            return f"gives no output {name!r}"
        if array.dtype != want.dtype or array.shape != want.shape:
            return (
                f"output {name!r} is {array.dtype}{list(array.shape)}, the source's is {want.dtype}{list(want.shape)}"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"output {name!r} holds values that are not finite"
    return ""


def golden_rows(count: int) -> list[int]:
    """Return the rows that become golden inputs, spread evenly."""
    return sorted({int(row) for row in np.linspace(0, count - 1, min(count, GOLDEN_ROWS)).round()})


def one_by_one(
    runner: Runner, model: CapturedModel, inputs: Mapping[str, Array], rows: Sequence[int]
) -> dict[str, Array]:
    """Return the outputs for these rows, each run alone."""
    parts = [as_samples(model, runner.infer(request(model, inputs, row, row + 1))) for row in rows]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_batching(alone: Mapping[str, Array], batched: Mapping[str, Array], limit: float) -> str:
    """Return why rows alone and the same rows in a batch do not give the same, or nothing: rule (2)."""
    for name, together in batched.items():
        array = alone[name]
        if array.shape != together.shape:
            return f"output {name!r} has another shape for a row alone"
        difference = float(np.abs(array.astype(np.float64) - together).max())
        if difference > limit:
            return f"output {name!r} of a row alone differs by {difference:.3g} from the same row in a batch"
    return ""


def tolerance(golden: Mapping[str, Array], precision: str, *, seen: bool = True) -> float:
    """Return by how much another machine's outputs may differ from the golden ones.

    Args:
        golden: The golden outputs.
        precision: The variant's.
        seen: Whether the golden outputs are the variant's own; otherwise they are the source's.
    """
    spread = max((float(np.ptp(array)) for array in golden.values() if array.dtype.kind == "f"), default=0.0)
    return max(_LEAST_TOLERANCE, (_TOLERANCE if seen else _UNSEEN)[precision] * spread)
