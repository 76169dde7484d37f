"""Labelled and unlabelled samples: safetensors files with tensors named as the model's inputs, and "labels".

Every tensor is checked against the model before a stage sees it. Safetensors can hold nothing that executes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from safetensors import SafetensorError, safe_open

from compiler.evaluate import Labels
from isthmus.bundle import TensorSpec
from isthmus.digests import sha256_file
from isthmus.errors import InputError
from isthmus.tensors import DTYPES, Array

LABELS: Final = "labels"
MAX_DATA_BYTES: Final = 8 << 30


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs by name, one sample per row."""

    inputs: dict[str, Array]
    sha256: str

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True, slots=True)
class LabelledSamples(Samples):
    """Samples with the class of each."""

    labels: Labels


def load_samples(path: Path, specs: Sequence[TensorSpec]) -> Samples:
    """Return the inputs in `path`; other tensors in the file are passed over.

    Raises:
        InputError: Unreadable, or a tensor is missing or is not what the model takes.
    """
    arrays = _read(path, [spec.name for spec in specs])
    for spec in specs:
        _check(path, spec, arrays[spec.name])
    if len({len(array) for array in arrays.values()}) != 1:
        rows = {name: len(array) for name, array in arrays.items()}
        raise InputError(f"{path}: all tensors must have the same number of rows, got {rows}")
    return Samples(arrays, sha256_file(path))


def load_labelled(path: Path, specs: Sequence[TensorSpec], *, classes: int) -> LabelledSamples:
    """Return the inputs and labels in `path`.

    Raises:
        InputError: As `load_samples`, or labels are missing or are not classes.
    """
    samples = load_samples(path, specs)
    labels = _read(path, [LABELS])[LABELS]
    if labels.dtype != np.int64 or labels.shape != (len(samples),):
        raise InputError(f"{path}: {LABELS!r}: expected int64[{len(samples)}], got {labels.dtype}{list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"{path}: {LABELS!r}: expected classes 0 to {classes - 1}, got {labels.min()} to {labels.max()}"
        )
    return LabelledSamples(samples.inputs, samples.sha256, labels)


def run_in_batches(
    infer: Callable[[Mapping[str, Array]], dict[str, Array]],
    inputs: Mapping[str, Array],
    *,
    batch: int,
    advance: Callable[[int, int], None],
) -> dict[str, Array]:
    """Return the outputs for all rows, running `batch` of them at a time; `advance` is told (done, total)."""
    total = len(next(iter(inputs.values())))
    parts: list[dict[str, Array]] = []
    for start, rows in _slices(inputs, batch):
        parts.append(infer(rows))
        advance(min(start + batch, total), total)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _slices(inputs: Mapping[str, Array], batch: int) -> Iterator[tuple[int, dict[str, Array]]]:
    total = len(next(iter(inputs.values())))
    for start in range(0, total, batch):
        yield start, {name: array[start : start + batch] for name, array in inputs.items()}


def _read(path: Path, names: Sequence[str]) -> dict[str, Array]:
    try:
        if path.stat().st_size > MAX_DATA_BYTES:
            raise InputError(f"{path}: expected at most {MAX_DATA_BYTES} bytes")
        with safe_open(path, "numpy") as file:
            present = set(file.keys())
            missing = [name for name in names if name not in present]
            if missing:
                raise InputError(
                    f"{path}: missing tensor {missing[0]!r}; the file has {', '.join(sorted(present)[:20])}"
                )
            return {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}",
            hint="data.calibration and data.quantization name safetensors files",
        ) from error
    except (SafetensorError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not a safetensors file: {error}", hint="safetensors.numpy.save_file writes one"
        ) from error


def _check(path: Path, spec: TensorSpec, array: Array) -> None:
    if array.dtype != DTYPES[spec.datatype] or array.shape[1:] != spec.shape[1:] or len(array) == 0:
        raise InputError(
            f"{path}: {spec.name!r}: expected {DTYPES[spec.datatype]}{['samples', *spec.shape[1:]]}, "
            f"got {array.dtype}{list(array.shape)}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{path}: {spec.name!r} holds values that are not finite")
