"""Labelled and unlabelled samples: safetensors files with tensors named as the model's inputs, and "labels".

Every tensor is checked against the model before a stage sees it. Safetensors can hold nothing that executes.

The first axis of every tensor counts samples. A model whose inputs all have a symbolic batch axis in front takes
several of them as one request; any other takes the tensor of one sample, with a batch axis of one where it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from safetensors import SafetensorError, safe_open

from compiler.capture import CapturedModel
from compiler.evaluate import Labels
from isthmus.bundle import TensorSpec
from isthmus.digests import sha256_file
from isthmus.errors import InputError
from isthmus.tensors import DTYPES, Array

LABELS: Final = "labels"
BATCH_AXIS: Final = "batch"
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
    """Samples with the class of each, or its tokens."""

    labels: Labels


def load_samples(path: Path, model: CapturedModel) -> Samples:
    """Return the inputs in `path`; other tensors in the file are passed over.

    Raises:
        InputError: Unreadable, or a tensor is missing or is not what the model takes.
    """
    arrays = _read(path, [spec.name for spec in model.inputs])
    for spec in model.inputs:
        _check(path, spec, model, arrays[spec.name])
    if len({len(array) for array in arrays.values()}) != 1:
        rows = {name: len(array) for name, array in arrays.items()}
        raise InputError(f"{path}: all tensors must have the same number of rows, got {rows}")
    return Samples(arrays, sha256_file(path))


def load_labelled(path: Path, model: CapturedModel, *, classes: int, sequences: bool = False) -> LabelledSamples:
    """Return the inputs and labels in `path`.

    Args:
        path: A safetensors file.
        model: What takes the inputs.
        classes: How many there are; of sequences, how many tokens.
        sequences: Whether a label is a row of tokens, packed to the left, with 0 after its end.

    Raises:
        InputError: As `load_samples`, or labels are missing or are not classes.
    """
    samples = load_samples(path, model)
    labels = _read(path, [LABELS])[LABELS]
    shape = (len(samples), "tokens") if sequences else (len(samples),)
    if labels.dtype != np.int64 or labels.ndim != len(shape) or len(labels) != len(samples) or labels.size == 0:
        expected = f"int64[{', '.join(map(str, shape))}]"
        raise InputError(f"{path}: {LABELS!r}: expected {expected}, got {labels.dtype}{list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"{path}: {LABELS!r}: expected {'tokens' if sequences else 'classes'} 0 to {classes - 1}, "
            f"got {labels.min()} to {labels.max()}"
        )
    if sequences and ((labels[:, 1:] != 0) & (labels[:, :-1] == 0)).any():
        raise InputError(
            f"{path}: {LABELS!r}: expected tokens first and 0 after them, got a token after a 0",
            hint="0 is the blank, or padding: no label holds it before its end",
        )
    return LabelledSamples(samples.inputs, samples.sha256, labels)


def has_labels(path: Path) -> bool:
    """Return whether the samples in `path` come with labels."""
    try:
        with safe_open(path, "numpy") as file:
            return LABELS in set(file.keys())
    except (OSError, SafetensorError):
        return False


def is_batchable(model: CapturedModel) -> bool:
    """Return whether several samples can be one request: every input and output has the batch axis in front."""
    return all(_batch_in_front(spec, model) for spec in (*model.inputs, *model.outputs))


def request(model: CapturedModel, inputs: Mapping[str, Array], start: int, stop: int) -> dict[str, Array]:
    """Return samples `start` to `stop` as one request; more than one only where `is_batchable`."""
    if is_batchable(model):
        return {spec.name: inputs[spec.name][start:stop] for spec in model.inputs}
    if stop - start != 1:
        raise ValueError(f"a model that cannot be batched takes one sample at a time, not {stop - start}")
    return {
        # An input without axes is an array too: libraries refuse numbers.
        spec.name: inputs[spec.name][start:stop]
        if _counts_samples(spec, model)
        else np.asarray(inputs[spec.name][start])
        for spec in model.inputs
    }


def as_samples(model: CapturedModel, outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the outputs of one request with an axis in front that counts samples."""
    if is_batchable(model):
        return dict(outputs)
    by_name = {spec.name: spec for spec in model.outputs}
    return {
        name: array if name in by_name and _counts_samples(by_name[name], model) else array[None]
        for name, array in outputs.items()
    }


def _counts_samples(spec: TensorSpec, model: CapturedModel) -> bool:
    """Return whether the tensor's own first axis is its batch: symbolic, or fixed to one."""
    fixed = spec.shape[:1] == (1,) and BATCH_AXIS not in model.axes.get(spec.name, ())
    return fixed or _batch_in_front(spec, model)


def _batch_in_front(spec: TensorSpec, model: CapturedModel) -> bool:
    return spec.shape[:1] == (-1,) and model.axes.get(spec.name, (BATCH_AXIS,))[0] == BATCH_AXIS


def requests(model: CapturedModel, inputs: Mapping[str, Array], batch: int) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yield (number of samples so far, request) over all samples, `batch` at a time where the model can."""
    total = len(next(iter(inputs.values())))
    step = batch if is_batchable(model) else 1
    for start in range(0, total, step):
        stop = min(start + step, total)
        yield stop, request(model, inputs, start, stop)


def run_over(
    infer: Callable[[Mapping[str, Array]], dict[str, Array]],
    model: CapturedModel,
    inputs: Mapping[str, Array],
    *,
    batch: int,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, Array]:
    """Return the outputs for all samples, running `batch` of them at a time; `advance` is told (done, total)."""
    total = len(next(iter(inputs.values())))
    parts: list[dict[str, Array]] = []
    for done, rows in requests(model, inputs, batch):
        parts.append(as_samples(model, infer(rows)))
        if advance is not None:
            advance(done, total)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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


def _check(path: Path, spec: TensorSpec, model: CapturedModel, array: Array) -> None:
    own = spec.shape[1:] if _counts_samples(spec, model) else spec.shape
    fits = array.ndim == len(own) + 1 and all(want in (-1, got) for want, got in zip(own, array.shape[1:], strict=True))
    if array.dtype != DTYPES[spec.datatype] or not fits or len(array) == 0:
        expected = ", ".join(["samples", *(str(axis) if axis > 0 else "any" for axis in own)])
        raise InputError(
            f"{path}: {spec.name!r}: expected {DTYPES[spec.datatype]}[{expected}], got {array.dtype}{list(array.shape)}"
        )
    names = model.axes.get(spec.name, ("",) * len(spec.shape))[len(spec.shape) - len(own) :]
    for name, got in zip(names, array.shape[1:], strict=True):
        shortest, longest = model.lengths.get(name, (1, got)) if name != BATCH_AXIS else (1, got)
        if not shortest <= got <= longest:
            raise InputError(
                f"{path}: {spec.name!r}: axis {name!r} must be {shortest} to {longest} long, got {got}",
                hint="give samples of another length, or other lengths in the recipe",
            )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{path}: {spec.name!r} holds values that are not finite")
