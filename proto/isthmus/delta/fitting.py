"""Fits the model of `isthmus.delta.model` to a change: numbers of rows and columns, factors, frequencies.

Only the maker of a delta does this. Whatever a number, a factor or a table costs is weighed against what it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from isthmus.delta import elements
from isthmus.delta.elements import FLOATS, Differences, Ints, Kind
from isthmus.delta.factors import I16, LEAST_SHIFT, Factors, Gains
from isthmus.delta.model import CONTEXTS, F64, I8, Model, Numbers, Prediction
from isthmus.delta.rans import TOTAL, U16

Counts = NDArray[np.int64]
Worth = Callable[[F64], float]

MAX_GROUPS: Final = 160
_TABLE_ENTRY_BITS: Final = 11.0
INT_STEPS: Final = 4.0  # contexts per octave
FLOAT_STEPS: Final = 3.0
_INT_OCTAVES: Final = 13.0  # how rare a change can be and still have a context of its own
_SMALLEST_SIDE: Final = 32  # rows and columns of a matrix that has factors
_TRIED_RANK: Final = 32
_FACTOR_BITS: Final = 7.0  # of one number of a factor, about
_SMALLEST_CHANNEL: Final = 8
_GAIN_BITS: Final = 11.0  # of a gain, about
_FACTOR_NOISE: Final = 0.05  # rounding the factors may add this share to the variance of what is left
_EDGES: Final = (1.3, 1.6)  # of the largest singular value of noise: what is above is signal
_FLOAT_BIAS: Final = {Kind.FLOAT16: 25, Kind.BFLOAT16: 134, Kind.FLOAT32: 150}  # of the exponent of a last place
_LARGEST_CHANGE: Final = 1e3  # what moved further is an outlier that would hide the rest
_INT16: Final = 32767.0
_GRIDS: Final = (1, 2, 4, 8)
_PRIORS: Final = (0.5, 4.0)  # events that a line is believed to have had as the others
_LARGEST_NUMBER: Final = 120
_NUMBER_BITS: Final = 5.0  # of each number that occurs, beyond its entropy
_ARRAY_BITS: Final = 40.0
_CAP: Final = 8  # a difference counts for no more than this when rates are fitted


def fit_factors(old: Ints, new: Ints, kind: Kind, row: int, channel: int) -> list[Factors]:
    """Find what predicts enough of the change to pay for itself, perhaps in more than one way.

    Args:
        old: The old elements.
        new: The new ones.
        kind: What they are.
        row: Elements of a row.
        channel: Elements that may have been rescaled together; 0 where that is not known.
    """
    rows = old.size // row
    if rows * row != old.size or kind is Kind.INT4:
        return []
    gains = None
    if kind in FLOATS:
        with np.errstate(all="ignore"):
            values = elements.to_values(old, kind)
            moved = elements.to_values(new, kind) - values
            steps = np.exp2(elements.exponents(kind) - _FLOAT_BIAS[kind])[elements.features(old, kind)]
        moved[~(np.abs(moved) < _LARGEST_CHANGE)] = 0
        floor = float(np.square(np.minimum(steps, 1.0)).sum()) / 12
        gains = _fit_gains(values, moved, channel, floor)
    else:
        moved = elements.differences(old, new, kind).astype(np.float64)
        floor = 0.0
    found = _fit_ranks(moved.reshape(rows, row), kind, floor)
    if gains is None:
        return found
    none = np.zeros((rows, 0), np.int16), np.zeros((row, 0), np.int16)
    return [Factors(*none, 0, gains), *(replace(factors, gains=gains) for factors in found)]


def _fit_gains(values: F64, moved: F64, channel: int, floor: float) -> Gains | None:
    """Find by how much channels were rescaled, and take that from what moved; None where it would not pay."""
    if channel < _SMALLEST_CHANNEL or values.size % channel:
        return None
    with np.errstate(all="ignore"):
        lines = np.where(np.abs(values) < _LARGEST_CHANGE, values, 0.0).reshape(-1, channel)
    change = moved.reshape(-1, channel)
    weights = np.square(lines).sum(axis=1)
    sizes = np.divide((lines * change).sum(axis=1), weights, out=np.zeros(weights.size), where=weights > 0)
    before = np.square(change).sum(axis=1)
    after = before - np.square(sizes) * weights
    least = 1e-30 + floor / weights.size
    saved = channel / 2 * float(np.log2((before + least) / (np.maximum(after, 0) + least)).sum())
    if saved < _GAIN_BITS * weights.size:
        return None
    rest, total = float(np.maximum(after, 0).sum()) + floor, float(weights.sum())
    step = max(math.sqrt(12 * _FACTOR_NOISE * rest / total), float(np.abs(sizes).max()) / _INT16)
    shift = min(0, max(LEAST_SHIFT, math.ceil(math.log2(step))))
    numbers = np.clip(np.round(sizes / 2.0**shift), -_INT16, _INT16).astype(np.int16)
    change -= lines * (numbers * 2.0**shift)[:, None]
    return Gains(numbers, channel, shift)


def _fit_ranks(moved: F64, kind: Kind, floor: float) -> list[Factors]:
    rows, row = moved.shape
    if min(rows, row) < _SMALLEST_SIDE:
        return []
    total = float(np.square(moved).sum())
    if not 1e-60 < total < 1e60:
        return []
    left, sizes, right = _largest_parts(moved)
    rest = np.maximum(total - np.cumsum(np.square(sizes)), 1e-9 * total) + floor
    if kind in FLOATS:
        saved = moved.size / 2 * np.log2(np.concatenate(([total + floor], rest[:-1])) / rest)
        worth = np.cumsum(saved - _FACTOR_BITS * (rows + row))
        ranks = {int(np.argmax(worth)) + 1 if worth.max() > 0 else 0}
    else:  # rounding to steps is noise: what rises above its singular values is signal
        noise = np.sqrt(rest / moved.size) * (math.sqrt(rows) + math.sqrt(row))
        ranks = {int(np.count_nonzero(sizes > edge * noise)) for edge in _EDGES}
    return [
        _rounded(left[:, :rank], sizes[:rank], right[:rank], _FACTOR_NOISE * rest[rank - 1] / moved.size)
        for rank in sorted(ranks - {0})
    ]


def _rounded(left: F64, sizes: F64, right: F64, noise: float) -> Factors:
    """Return factors whose product is off by so much variance."""
    nuclear = float(sizes.sum())
    step = math.sqrt(12 * noise / (nuclear / left.shape[0] + nuclear / right.shape[1]))
    lines, aside = left * np.sqrt(sizes), right.T * np.sqrt(sizes)
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
    left = difference
    if prediction.moves is not None:
        left = elements.wrapped(left - prediction.moves.astype(left.dtype), kind)
    if prediction.flips is not None:
        left = elements.wrapped(np.where(prediction.flips, -left, left), kind)
    return left


def fit_numbers(old: Ints, difference: Differences, kind: Kind, row: int) -> Numbers:
    """Fit the numbers of rows, none of them still, and columns."""
    if kind in FLOATS:
        return _fit_floats(old, difference, kind, row)
    return _fit_integers(difference, row)


def _fit_floats(old: Ints, difference: Differences, kind: Kind, row: int) -> Numbers:
    size = np.log2(np.abs(difference.astype(np.float32)) + np.float32(0.5))
    size += elements.exponents(kind).astype(np.float32).take(elements.features(old, kind))
    rows, whole = -(-size.size // row), size.size // row
    counts = np.full(rows, row, np.float64)
    counts[-1] = size.size - (rows - 1) * row
    base = round(float(size.mean(dtype=np.float64)) * FLOAT_STEPS)
    middle = base / FLOAT_STEPS
    lines = (np.add.reduceat(size, np.arange(0, size.size, row), dtype=np.float64) - middle * counts) / (counts + 4)
    chosen = _best([lines * FLOAT_STEPS], _worth_of_scales(lines, counts))
    columns = np.zeros(0, np.int8)
    if whole >= 8:
        taken = chosen[:whole].sum() / FLOAT_STEPS if chosen.size else 0.0
        sums = size[: whole * row].reshape(whole, row).sum(axis=0, dtype=np.float64) - middle * whole - taken
        aside = sums / (whole + 4)
        columns = _best([aside * FLOAT_STEPS], _worth_of_scales(aside, np.full(row, float(whole))))
    return Numbers(base, chosen, columns)


def _fit_integers(difference: Differences, row: int) -> Numbers:
    size = np.minimum(
        np.abs(difference.astype(np.int64, copy=False) if difference.itemsize > 1 else difference.astype(np.int16)),
        _CAP,
    ).astype(np.float32)
    rows, whole = -(-size.size // row), size.size // row
    counts = np.full(rows, row, np.float64)
    counts[-1] = size.size - (rows - 1) * row
    sums = np.add.reduceat(size, np.arange(0, size.size, row)).astype(np.float64)
    rate = (float(sums.sum()) + 0.5) / size.size
    base = round((math.log2(rate) + _INT_OCTAVES) * INT_STEPS)
    lines = _fit_rates(sums, counts * rate)
    columns = np.zeros(0, np.int8)
    if whole >= 8:
        factor = np.exp2(lines[:whole] / INT_STEPS).mean() if lines.size else 1.0
        down = size[: whole * row].reshape(whole, row).sum(axis=0, dtype=np.float64)
        columns = _fit_rates(down, np.full(row, whole * rate * factor))
    return Numbers(base, lines, columns)


def _worth_of_scales(octaves: F64, counts: F64) -> Worth:
    """Return what numbers save where lines of so many elements deviate by so many octaves, as normal deviates would."""
    return lambda numbers: float(
        math.log(2) * (counts * (np.square(octaves) - np.square(octaves - numbers / FLOAT_STEPS))).sum()
    )


def _fit_rates(events: F64, expected: F64) -> I8:
    """Return numbers for lines that have had some events where so many were expected."""

    def worth(numbers: F64) -> float:
        octaves = numbers / INT_STEPS
        return float((events * octaves - expected * (np.exp2(octaves) - 1) / math.log(2)).sum())

    return _best([np.log2((events + prior) / (expected + prior)) * INT_STEPS for prior in _PRIORS], worth)


def _best(candidates: Sequence[F64], worth: Worth) -> I8:
    """Return the numbers, on the best of some grids, that save the most bits beyond their own; none if none does."""
    found, most = np.zeros(0, np.int8), 0.0
    for values in candidates:
        for step in _GRIDS if values.size > 1 else ():
            numbers = np.clip(np.round(values / step) * step, -_LARGEST_NUMBER, _LARGEST_NUMBER).astype(np.int8)
            gain = worth(numbers.astype(np.float64)) - _bits(numbers)
            if gain > most:
                found, most = numbers, gain
    return found


def _bits(numbers: I8) -> float:
    """Return what numbers cost, about."""
    counts = np.bincount(numbers.view(np.uint8))
    counts = counts[counts > 0]
    return float((counts * np.log2(numbers.size / counts)).sum()) + _NUMBER_BITS * counts.size + _ARRAY_BITS


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
