"""How the difference of an element is predicted: its context is a sum of small numbers that the decoder knows.

context = clip(tensor's number + row's + column's + that of the old value's feature, 0, contexts - 1)

The numbers are logarithms of how far elements of that row, column and feature move, on a grid; the maker fits them,
the delta carries them. A model, shared by the tensors of a kind, holds the numbers of the features and the symbol
frequencies of every context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from isthmus.delta import elements
from isthmus.delta.elements import FLOATS, Differences, Ints, Kind
from isthmus.delta.rans import TOTAL, U8, U16, Table

I8 = NDArray[np.int8]
I16 = NDArray[np.int16]
F64 = NDArray[np.float64]
Counts = NDArray[np.int64]

MAX_CONTEXTS: Final = 128
BLOCK: Final = 1 << 18  # elements
MAX_ROW: Final = 1 << 16
_TABLE_ENTRY_BITS: Final = 11.0
INT_STEPS: Final = 4.0  # contexts per octave
FLOAT_STEPS: Final = 3.0
_INT_OCTAVES: Final = 13.0  # how rare a change can be and still have a context of its own
_CAP: Final = 8  # a difference counts for no more than this when rates are fitted


@dataclass(frozen=True, slots=False)
class Model:
    """What tensors of one kind share."""

    kind: Kind
    feature_numbers: I16  # 256
    groups: U8  # per context: its row of `frequencies`
    frequencies: U16  # groups x symbols
    raw: bool  # whether raw bits follow symbols

    @cached_property
    def table(self) -> Table:
        """The frequencies made ready for decoding."""
        return Table(self.frequencies[self.groups])

    @cached_property
    def bit_counts(self) -> U8 | None:
        """Raw bits per symbol; None where there are none."""
        return elements.bit_counts(self.kind) if self.raw else None


@dataclass(frozen=True, slots=True)
class Numbers:
    """What one tensor adds: one number, and more per row and per column; an empty array is all zeros."""

    base: int = 0  # -32768 to 32767
    rows: I8 = field(default_factory=lambda: np.zeros(0, np.int8))
    columns: I8 = field(default_factory=lambda: np.zeros(0, np.int8))


def block_rows(row: int) -> int:
    """Return how many rows are coded together."""
    return max(1, BLOCK // row)


def contexts(features: U8, numbers: Numbers, feature_numbers: I16, limit: int, row: int, first_row: int) -> U8:
    """Return the context of each element of a block that begins with `first_row`."""
    total = (feature_numbers + np.int16(numbers.base)).take(features)
    rows = -(-total.size // row)
    whole = total.size // row
    if numbers.rows.size:
        mine = numbers.rows[first_row : first_row + rows].astype(np.int16)
        total[: whole * row].reshape(whole, row)[:] += mine[:whole, None]
        total[whole * row :] += mine[-1] if rows > whole else 0
    if numbers.columns.size:
        mine = numbers.columns.astype(np.int16)
        total[: whole * row].reshape(whole, row)[:] += mine
        total[whole * row :] += mine[: total.size - whole * row]
    np.clip(total, 0, limit - 1, out=total)
    return total.astype(np.uint8)


# Fitting: only the maker does it.


def fit_numbers(old: Ints, difference: Differences, kind: Kind, row: int) -> Numbers:
    """Fit a tensor's rows and columns."""
    if kind in FLOATS:
        return _fit_floats(old, difference, kind, row)
    return _fit_integers(difference, row)


def _fit_floats(old: Ints, difference: Differences, kind: Kind, row: int) -> Numbers:
    known = elements.exponents(kind)[elements.features(old, kind)]
    size = np.log2(np.abs(difference) + 0.5) + known
    rows, whole = -(-size.size // row), size.size // row
    sums = np.add.reduceat(size, np.arange(0, size.size, row))
    counts = np.full(rows, row, np.float64)
    counts[-1] = size.size - (rows - 1) * row
    mean = size.mean()
    lines = (sums + mean * 4) / (counts + 4)
    columns = np.zeros(0)
    if whole >= 8:
        square = size[: whole * row].reshape(whole, row)
        columns = (square.sum(axis=0) - lines[:whole].sum()) / (whole + 4)
    return _numbers(lines * FLOAT_STEPS, 1, columns * FLOAT_STEPS)


def _fit_integers(difference: Differences, row: int) -> Numbers:
    size = np.minimum(np.abs(difference), _CAP).astype(np.float32)
    rows, whole = -(-size.size // row), size.size // row
    sums = np.add.reduceat(size, np.arange(0, size.size, row)).astype(np.float64)
    counts = np.full(rows, row, np.float64)
    counts[-1] = size.size - (rows - 1) * row
    rate = (sums.sum() + 0.5) / size.size
    columns = np.ones(row)
    lines = np.full(rows, rate)
    if whole >= 8:
        square = size[: whole * row].reshape(whole, row)
        down = square.sum(axis=0, dtype=np.float64)
        for _ in range(2):
            lines = (sums + 1.0 * rate) / (counts * columns.mean() + 1.0)
            columns = (down + 1.0) / (lines[:whole].sum() + 1.0)
    else:
        lines = (sums + 1.0 * rate) / (counts + 1.0)
    per_row = sums.sum() / rows
    coarse = 1 if per_row > 60 else 2 if per_row > 8 else 3
    offset = _INT_OCTAVES * INT_STEPS
    aside = np.log2(columns) * INT_STEPS if whole >= 8 else np.zeros(0)
    return _numbers(np.log2(lines) * INT_STEPS + offset, coarse, aside)


def _numbers(lines: F64, coarse: int, columns: F64) -> Numbers:
    base = round(float(np.median(lines)))
    rows = _grid(lines - base, coarse) if lines.size > 1 else np.zeros(0, np.int8)
    return Numbers(base, rows, _grid(columns, 1))


def _grid(values: F64, step: int) -> I8:
    return np.clip(np.round(values / step) * step, -127, 127).astype(np.int8)


def fit_model(kind: Kind, counts: Counts, feature_numbers: I16) -> Model:
    """Make a model of how often each symbol came in each context (contexts x symbols): alike contexts share a row."""
    used = np.flatnonzero(counts.any(axis=1))
    members = [[int(at)] for at in used] or [[0]]
    sums = [counts[at].astype(np.float64) for at in used] or [np.eye(1, counts.shape[1])[0]]
    costs = [_cost(row) for row in sums]
    joins = [_cost(left + right) for left, right in pairwise(sums)]
    while len(sums) > 1:
        gains = [costs[at] + costs[at + 1] - joins[at] for at in range(len(joins))]
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        members[best] += members.pop(best + 1)
        sums[best] = sums[best] + sums.pop(best + 1)
        costs[best] = joins[best]
        del costs[best + 1], joins[best]
        if best < len(joins):
            joins[best] = _cost(sums[best] + sums[best + 1])
        if best:
            joins[best - 1] = _cost(sums[best - 1] + sums[best])
    groups = np.zeros(counts.shape[0], np.uint8)
    for number, contexts_of in enumerate(members):
        groups[contexts_of[0] :] = number
    used_symbols = int(np.flatnonzero(counts.any(axis=0)).max(initial=0)) + 1
    frequencies = np.stack([_normalise(row[:used_symbols]) for row in sums])
    raw = bool(elements.bit_counts(kind)[:used_symbols].any())
    return Model(kind, feature_numbers, groups, frequencies, raw)


def _cost(counts: F64) -> float:
    present = counts[counts > 0]
    total = present.sum()
    shares = np.maximum(present / total, 1 / TOTAL)
    return float(-(present * np.log2(shares)).sum() + _TABLE_ENTRY_BITS * present.size)


def _normalise(counts: F64) -> U16:
    """Scale counts to frequencies that add up to TOTAL, every symbol that came keeping at least 1."""
    present = counts > 0
    scaled = np.where(present, np.maximum(1, np.floor(counts * (TOTAL / counts.sum()))), 0).astype(np.int64)
    rest = TOTAL - int(scaled.sum())
    order = np.argsort(-counts)
    while rest:
        if rest > 0:
            scaled[order[0]] += rest
            rest = 0
        else:
            taken = min(-rest, int(scaled[order[0]]) - 1, max(1, -rest // 2))
            scaled[int(np.argmax(scaled))] -= taken
            rest += taken
    return scaled.astype(np.uint16)
