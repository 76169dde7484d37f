"""How the difference of an element is predicted: its context is a sum of small numbers that the decoder knows.

scale = clip(tensor's number + row's + column's + that of the old value's feature, 0, 127)

Where the change of a matrix is nearly of low rank, as fine-tuning's often is, the delta carries integer factors whose
product predicts it: the residual is coded, and for integers the part of the prediction below one step (`bucket`) makes
contexts of its own: context = 8 * scale + bucket. Products of such integers are exact in double precision, in any
order, so every machine predicts the same.

The numbers are logarithms of how far elements of that row, column and feature move, on a grid; the maker fits them,
the delta carries them. A model, shared by the tensors of a kind, holds the numbers of the features and the symbol
frequencies of every context.
"""

from __future__ import annotations

import math
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

MAX_SCALES: Final = 128
CONTEXTS: Final = 8 * MAX_SCALES
MAX_GROUPS: Final = 160
MAX_RANK: Final = 64
BLOCK: Final = 1 << 18  # elements
MAX_ROW: Final = 1 << 16
_BUCKETS: Final = np.minimum(np.searchsorted((2, 4, 8, 16, 32, 64, 96), np.arange(129), side="right"), 7).astype(
    np.uint8
)
_TABLE_ENTRY_BITS: Final = 11.0
INT_STEPS: Final = 4.0  # contexts per octave
FLOAT_STEPS: Final = 3.0
_INT_OCTAVES: Final = 13.0  # how rare a change can be and still have a context of its own
_SMALLEST_SIDE: Final = 32  # rows and columns of a matrix that has factors
_TRIED_RANK: Final = 32
_FACTOR_BITS: Final = 7.0  # of one number of a factor, about
_EDGE: Final = 1.3  # of the largest singular value of noise: what is above is signal
_FACTOR_NOISE: Final = 0.05  # rounding the factors may add this share to the variance of what is left
_FLOAT_BIAS: Final = {Kind.FLOAT16: 25, Kind.BFLOAT16: 134, Kind.FLOAT32: 150}  # of the exponent of a last place
_LARGEST_CHANGE: Final = 1e3  # what moved further is an outlier that would hide the rest
_INT16: Final = 32767.0
_CAP: Final = 8  # a difference counts for no more than this when rates are fitted


@dataclass(frozen=True, slots=False)
class Model:
    """What tensors of one kind share."""

    kind: Kind
    feature_numbers: I16  # 256
    groups: U8  # per context, 1024: its row of `frequencies`
    frequencies: U16  # groups x symbols
    raw: bool  # whether raw bits follow symbols

    @cached_property
    def table(self) -> Table:
        """The frequencies made ready for decoding."""
        return Table(self.frequencies)

    @cached_property
    def bit_counts(self) -> U8 | None:
        """Raw bits per symbol; None where there are none."""
        return elements.bit_counts(self.kind) if self.raw else None


@dataclass(frozen=True, slots=True)
class Factors:
    """A prediction of low rank: the values change by (left @ right.T) * 2^shift."""

    left: I16  # rows x rank
    right: I16  # columns x rank
    shift: int


@dataclass(frozen=True, slots=True)
class Numbers:
    """What one tensor adds: one number, and more per row and per column; an empty array is all zeros."""

    base: int = 0  # -32768 to 32767
    rows: I8 = field(default_factory=lambda: np.zeros(0, np.int8))
    columns: I8 = field(default_factory=lambda: np.zeros(0, np.int8))
    factors: Factors | None = None


def block_rows(row: int) -> int:
    """Return how many rows are coded together."""
    return max(1, BLOCK // row)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a block's elements are expected to move by."""

    moves: NDArray[np.int64] | None = None
    buckets: U8 | None = None  # how far an integer is expected to move below one step
    flips: NDArray[np.bool_] | None = None  # where that is downwards: the residual is coded with its sign turned


def predict(kind: Kind, old: Ints, factors: Factors | None, row: int, first_row: int) -> Prediction:
    """Return the prediction for a block of old elements that begins with `first_row`."""
    if factors is None:
        return Prediction()
    rows = -(-old.size // row)
    left = factors.left[first_row : first_row + rows].astype(np.float64)
    product = (left @ factors.right.T.astype(np.float64)).ravel()[: old.size]
    if kind in FLOATS:
        values = elements.to_values(old, kind)
        with np.errstate(all="ignore"):
            there = elements.from_values(values + np.ldexp(product, factors.shift), kind)
        moves = there.astype(np.int64) - old.astype(np.int64)
        return Prediction(np.where(np.isfinite(values), moves, 0))
    shift = max(-60, min(20, factors.shift + 8))
    fine = product.astype(np.int64)
    fine = fine << shift if shift >= 0 else (fine + (1 << (-shift - 1))) >> -shift
    moves = (fine + 128) >> 8
    fine -= moves << 8
    return Prediction(moves, _BUCKETS.take(np.abs(fine)), fine < 0)


def contexts(features: U8, numbers: Numbers, feature_numbers: I16, buckets: U8 | None, row: int, first_row: int) -> U16:
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
    np.clip(total, 0, MAX_SCALES - 1, out=total)
    total <<= 3
    if buckets is not None:
        total |= buckets
    return total.view(np.uint16)


# Fitting: only the maker does it.


def fit_factors(old: Ints, new: Ints, kind: Kind, row: int) -> Factors | None:
    """Find factors whose product predicts enough of the change to pay for themselves; None where there are none."""
    rows = old.size // row
    if min(rows, row) < _SMALLEST_SIDE or rows * row != old.size or kind is Kind.INT4:
        return None
    if kind in FLOATS:
        with np.errstate(all="ignore"):
            moved = elements.to_values(new, kind) - elements.to_values(old, kind)
            steps = np.exp2(elements.exponents(kind) - _FLOAT_BIAS[kind])[elements.features(old, kind)]
        moved[~(np.abs(moved) < _LARGEST_CHANGE)] = 0
        floor = float(np.square(np.minimum(steps, 1.0)).sum()) / 12
    else:
        moved = elements.differences(old, new, kind).astype(np.float64)
        floor = 0.0
    moved = moved.reshape(rows, row)
    total = float(np.square(moved).sum())
    if not 1e-60 < total < 1e60:
        return None
    left, sizes, right = _largest_parts(moved)
    rest = np.maximum(total - np.cumsum(np.square(sizes)), 1e-9 * total) + floor
    gains = old.size / 2 * np.log2(np.concatenate(([total + floor], rest[:-1])) / rest)
    if kind in FLOATS:
        worth = np.cumsum(gains - _FACTOR_BITS * (rows + row))
        rank = int(np.argmax(worth)) + 1 if worth.max() > 0 else 0
    else:  # rounding to steps is noise: what rises above its singular values is signal
        edge = np.sqrt(rest / old.size) * (math.sqrt(rows) + math.sqrt(row))
        rank = int(np.count_nonzero(sizes > _EDGE * edge))
    if not rank:
        return None
    noise = _FACTOR_NOISE * rest[rank - 1] / old.size
    nuclear = float(sizes[:rank].sum())
    step = math.sqrt(12 * noise / (nuclear / rows + nuclear / row))
    lines = left[:, :rank] * np.sqrt(sizes[:rank])
    aside = right[:rank].T * np.sqrt(sizes[:rank])
    largest = max(float(np.abs(lines).max()), float(np.abs(aside).max()))
    shift = math.floor(2 * math.log2(max(step, largest / 32000)))
    step = 2.0 ** (shift / 2)
    if largest / step > _INT16:
        shift += 1
        step = 2.0 ** (shift / 2)
    return Factors(np.round(lines / step).astype(np.int16), np.round(aside / step).astype(np.int16), shift)


def _largest_parts(matrix: F64) -> tuple[F64, F64, F64]:
    """Return the largest singular parts (Halko, Martinsson, Tropp: "Finding structure with randomness", 2011)."""
    rank = min(_TRIED_RANK, min(matrix.shape) // 4)
    basis = matrix.T @ np.random.default_rng(0).normal(size=(matrix.shape[0], rank + 8))
    for _ in range(2):
        basis, _ = np.linalg.qr(matrix @ basis)
        basis = matrix.T @ basis
    basis, _ = np.linalg.qr(basis)
    left, sizes, right = np.linalg.svd(matrix @ basis, full_matrices=False)
    return left[:, :rank], sizes[:rank], (right @ basis.T)[:rank]


def residual(difference: Differences, prediction: Prediction, kind: Kind) -> Differences:
    """Return what is coded: the difference less its prediction."""
    if prediction.moves is None:
        return difference
    half = 1 << (elements.bits(kind) - 1)
    left = difference - prediction.moves
    if prediction.flips is not None:
        left = np.where(prediction.flips, -left, left)
    return ((left + half) & (2 * half - 1)) - half


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
    grid: I8 = np.clip(np.round(values / step) * step, -127, 127).astype(np.int8)
    return grid


def fit_model(kind: Kind, counts: Counts, feature_numbers: I16) -> Model:
    """Make a model of how often each symbol came in each context (CONTEXTS x symbols): alike contexts share a row."""
    used_symbols = int(np.flatnonzero(counts.any(axis=0)).max(initial=0)) + 1
    groups = np.zeros(CONTEXTS, np.uint8)
    rows: list[U16] = []
    for bucket in range(8):
        chain = counts[bucket::8]
        penalty = 0.0 if bucket == 0 else _TABLE_ENTRY_BITS
        for first, total in _joined(chain, penalty):
            groups[first * 8 + bucket :: 8] = len(rows)
            rows.append(_normalise(total[:used_symbols]))
    if not rows:
        rows.append(_normalise(np.eye(1, used_symbols)[0]))
    raw = bool(elements.bit_counts(kind)[:used_symbols].any())
    return Model(kind, feature_numbers, groups, np.stack(rows), raw)


def _joined(counts: Counts, penalty: float) -> list[tuple[int, F64]]:
    """Join neighbouring contexts while that saves; return the first context and the sum of each group."""
    used = np.flatnonzero(counts.any(axis=1))
    firsts = [int(at) for at in used]
    sums = [counts[at].astype(np.float64) for at in used]
    costs = [_cost(row) for row in sums]
    joins = [_cost(left + right) for left, right in pairwise(sums)]
    while len(sums) > 1:
        gains = [costs[at] + costs[at + 1] - joins[at] + penalty for at in range(len(joins))]
        best = int(np.argmax(gains))
        if gains[best] <= 0 and len(sums) <= MAX_GROUPS // 8:
            break
        del firsts[best + 1]
        sums[best] = sums[best] + sums.pop(best + 1)
        costs[best] = joins[best]
        del costs[best + 1], joins[best]
        if best < len(joins):
            joins[best] = _cost(sums[best] + sums[best + 1])
        if best:
            joins[best - 1] = _cost(sums[best - 1] + sums[best])
    return list(zip(firsts, sums, strict=True))


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
