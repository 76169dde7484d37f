"""Inputs that calibration data lack: the smallest and largest batch, lengths and values.

A compiler's bugs live at the edges of shapes: a batch of two where one was traced, the shortest sequence, padding only.
Values stay within what the samples hold (a token of 10^9 or a negative mask tests nothing), but all of them at one end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from compiler.capture import CapturedModel
from compiler.data import BATCH_AXIS, is_batchable, request
from isthmus.tensors import Array

LARGEST_BATCH: Final = 64  # what is tried at most, whatever the model would take
LONGEST: Final = 4096


def edge_cases(model: CapturedModel, inputs: Mapping[str, Array], max_batch: int) -> dict[str, dict[str, Array]]:
    """Return requests by the name of what is special about each.

    Args:
        model: The captured model.
        inputs: Samples, the first axis counts them.
        max_batch: The largest batch that the recipe allows.
    """
    first = request(model, inputs, 0, 1)
    cases: dict[str, dict[str, Array]] = {"batch 1": first}
    if is_batchable(model):
        for batch in sorted({2, min(max_batch, LARGEST_BATCH)} - {1}):
            cases[f"batch {batch}"] = _batch(inputs, model, batch)
    for axis, (shortest, longest) in model.lengths.items():
        if axis != BATCH_AXIS:
            cases[f"{axis} {shortest}"] = _resized(model, first, axis, shortest)
            cases[f"{axis} {min(longest, LONGEST)}"] = _resized(model, first, axis, min(longest, LONGEST))
    for name, choose in _VALUES.items():
        cases[name] = {key: np.full_like(array, choose(inputs[key])) for key, array in first.items()}
    return cases


_VALUES: Final[Mapping[str, Callable[[Array], Any]]] = {
    "smallest values": lambda samples: samples.min(),
    "largest values": lambda samples: samples.max(),
}


def _batch(inputs: Mapping[str, Array], model: CapturedModel, batch: int) -> dict[str, Array]:
    rows = np.arange(batch) % len(next(iter(inputs.values())))
    return {spec.name: inputs[spec.name][rows] for spec in model.inputs}


def _resized(model: CapturedModel, first: Mapping[str, Array], axis: str, length: int) -> dict[str, Array]:
    """Return the request with one axis cut, or filled up by repeating, to this length wherever it occurs."""
    result = {}
    for name, array in first.items():
        names = model.axes.get(name, ())
        places = [place for place, found in enumerate(names) if found == axis]
        for place in places:
            array = np.take(array, np.arange(length) % array.shape[place], axis=place)
        result[name] = array
    return result
