"""How near a variant's outputs are to the source's, collected batch by batch: outputs may be larger than memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from isthmus.tensors import Array


@dataclass(frozen=True, slots=True)
class Parity:
    """The worst over all outputs."""

    max_absolute: float  # largest absolute difference of any value
    max_relative: float  # the same, as a share of the range that this output of the source has
    difference: float  # absolute, or relative for outputs whose range is larger than 1
    cosine: float  # between all values of an output, as one vector
    agreement: float  # share of rows of the first floating-point output with the same largest entry


class ParityMeter:
    """Takes outputs of both models and sums up."""

    def __init__(self) -> None:
        self._outputs: dict[str, _Sums] = {}

    def add(self, ours: Mapping[str, Array], source: Mapping[str, Array]) -> None:
        """Take the outputs of one request; both have the same names and shapes."""
        for name, theirs in source.items():
            self._outputs.setdefault(name, _Sums()).add(ours[name], theirs)

    def result(self) -> Parity:
        """Return the worst over all outputs so far."""
        sums = list(self._outputs.values())
        ranked = [entry for entry in sums if entry.rows]
        return Parity(
            max_absolute=max(entry.largest for entry in sums),
            max_relative=max(entry.relative for entry in sums),
            difference=max(min(entry.largest, entry.relative) for entry in sums),
            cosine=min(entry.cosine for entry in sums),
            agreement=ranked[0].same / ranked[0].rows if ranked else 1.0,
        )


class _Sums:
    """The sums over one output."""

    def __init__(self) -> None:
        self.largest = 0.0
        self.low, self.high = math.inf, -math.inf
        self.dot = self.ours = self.theirs = 0.0
        self.rows = self.same = 0

    def add(self, ours: Array, theirs: Array) -> None:
        if theirs.size == 0:
            return
        first, second = ours.astype(np.float64), theirs.astype(np.float64)
        self.largest = max(self.largest, float(np.abs(first - second).max()))
        self.low, self.high = min(self.low, float(second.min())), max(self.high, float(second.max()))
        self.dot += float(np.vdot(first, second))
        self.ours += float(np.vdot(first, first))
        self.theirs += float(np.vdot(second, second))
        if theirs.dtype.kind == "f" and theirs.ndim > 1 and theirs.shape[-1] > 1:
            same = first.argmax(axis=-1) == second.argmax(axis=-1)
            self.rows += same.size
            self.same += int(same.sum())

    @property
    def relative(self) -> float:
        # An output that hardly moves (a probability of about 0.98 on all samples) is measured by its own size.
        span = max(self.high - self.low, abs(self.high), abs(self.low)) if self.high >= self.low else 0.0
        return self.largest / span if span > 0 else self.largest

    @property
    def cosine(self) -> float:
        if self.ours == 0.0 or self.theirs == 0.0:
            return 1.0 if self.ours == self.theirs else 0.0
        return min(1.0, self.dot / math.sqrt(self.ours * self.theirs))
