"""How the difference of an element is predicted: its context is a sum of small numbers that the decoder knows.

scale = clip(tensor's number + row's + column's + that of the old value's feature, 0, 127)

Where the change of a matrix is nearly of low rank, as fine-tuning's often is, the delta carries integer factors whose
product predicts it; where channels of floats were rescaled, it carries their gains. The residual is coded, and for
integers the part of the prediction below one step (`bucket`) makes contexts of its own: context = 8 * scale + bucket.
Products of such integers are exact in double precision, in any order, so every machine predicts the same.

The numbers are logarithms of how far elements of that row, column and feature move, on a grid; `isthmus.delta.fitting`
finds them, the delta carries them. Rows may be still: they are as they were, and nothing of them is coded. A model,
shared by tensors of a kind, holds the numbers of the features and the symbol frequencies of every context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.delta import elements
from isthmus.delta.elements import FLOATS, Ints, Kind
from isthmus.delta.factors import I16, Factors
from isthmus.delta.rans import PRECISION, U8, U16, U32, Table

I8 = NDArray[np.int8]
F64 = NDArray[np.float64]

MAX_SCALES: Final = 128
CONTEXTS: Final = 8 * MAX_SCALES
BLOCK: Final = 1 << 18  # elements
MAX_ROW: Final = 1 << 16
STILL: Final = -128  # the number of a row of which no element moves
Lines = slice | NDArray[np.intp]
_BUCKETS: Final = np.searchsorted((2, 4, 8, 16, 32, 64, 96), np.abs(np.arange(256) - 128), side="right").astype(
    np.uint8
)
_NORMAL: Final = 1000  # a power of two below it is a number of double precision: to multiply by it is the same
_NARROW: Final = 6  # to the left: so far 24 bits may be shifted in 32


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
    def slots(self) -> U32:
        """The first slot of the table of each context."""
        return self.groups.astype(np.uint32) << np.uint32(PRECISION)

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
    factors: Factors | None = None

    @property
    def still_rows(self) -> int:
        """How many rows do not move."""
        return int(np.count_nonzero(self.rows == STILL))


def block_rows(row: int) -> int:
    """Return how many rows are coded together."""
    return max(1, BLOCK // row)


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of one tensor, of rows that are not still, in a block."""

    numbers: Numbers
    row: int
    size: int
    lines: Lines  # the rows
    first: int = 0  # of those rows among the tensor's that are not still

    @property
    def whole_rows(self) -> slice:
        """The rows among the tensor's that are not still."""
        return slice(self.first, self.first + -(-self.size // self.row))


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a block's elements are expected to move by."""

    moves: NDArray[np.integer[Any]] | None = None  # modulo 2^width
    buckets: U8 | None = None  # how far an integer is expected to move below one step
    flips: NDArray[np.bool_] | None = (
        None  # where it is coded with its sign turned: that is downwards, or a float negative
    )


def predict(kind: Kind, old: Ints, parts: Sequence[Part]) -> Prediction:
    """Return the prediction for a block of old elements, which are those of the parts."""
    flips = old < old.dtype.type(1 << (8 * old.itemsize - 1)) if kind in FLOATS else None
    if all(part.numbers.factors is None for part in parts):
        return Prediction(flips=flips)
    if len(parts) == 1:
        return _predict_part(kind, old, parts[0], flips)
    moves = np.zeros(old.size, old.dtype)
    buckets = None if kind in FLOATS else np.zeros(old.size, np.uint8)
    turned = np.zeros(old.size, bool) if flips is None else flips
    at = 0
    for part in parts:
        place = slice(at, at + part.size)
        at += part.size
        if part.numbers.factors is not None:
            mine = _predict_part(kind, old[place], part, turned[place])
            moves[place] = mine.moves
            if buckets is not None:
                buckets[place], turned[place] = mine.buckets, mine.flips
    return Prediction(moves, buckets, turned)


def _predict_part(kind: Kind, old: Ints, part: Part, flips: NDArray[np.bool_] | None) -> Prediction:
    factors = part.numbers.factors
    if factors is None:
        return Prediction(flips=flips)
    product = None
    if factors.left.shape[1]:
        left, right = factors.parts
        product = (left[part.whole_rows] @ right).ravel()
    if kind in FLOATS:
        return Prediction(_predict_floats(kind, old, part, product), flips=flips)
    if product is None:
        product = np.zeros(old.size, np.float32)
    return _predict_integers(product, max(-60, min(20, factors.shift + 8)))


def _predict_floats(kind: Kind, old: Ints, part: Part, product: NDArray[np.floating[Any]] | None) -> Ints:
    factors = part.numbers.factors
    values = elements.to_values(old, kind)
    finite = np.isfinite(values)
    with np.errstate(all="ignore"):
        if factors is not None and factors.gains is not None:
            gains = factors.gains
            channels = part.row // gains.width
            begin = part.first * channels
            square = values.reshape(-1, gains.width)
            square *= gains.factors(slice(begin, begin + square.shape[0]))[:, None]
        if factors is not None and product is not None:
            change = product.astype(np.float64)
            values += change * 2.0**factors.shift if abs(factors.shift) < _NORMAL else np.ldexp(change, factors.shift)
        moves = elements.from_values(values, kind)
    moves -= old
    if not finite.all():
        moves[~finite] = 0
    return moves


def _predict_integers(product: NDArray[np.floating[Any]], shift: int) -> Prediction:
    """Return the prediction in steps, and what is left of it in 1/256 of a step; halves are rounded up."""
    narrow = product.dtype == np.float32 and shift <= _NARROW
    fine: NDArray[np.signedinteger[Any]] = product.astype(np.int32 if narrow else np.int64)
    if shift >= 0:
        fine <<= shift
    else:
        down = min(-shift, 31) if narrow else -shift
        fine += 1 << (down - 1)
        fine >>= down
    fine += 128
    rest = fine.astype(np.uint8)
    fine >>= 8
    return Prediction(fine, _BUCKETS.take(rest, mode="clip"), rest < 128)


def contexts(old: Ints, kind: Kind, feature_numbers: I16, parts: Sequence[Part], buckets: U8 | None = None) -> U16:
    """Return the context of each element of a block, which are those of the parts."""
    bases = np.array([part.numbers.base for part in parts], np.int16)
    if feature_numbers.any():
        numbers = feature_numbers.take(elements.key_features(kind))
        total = numbers.take(elements.keys(old, kind), mode="clip")  # keys are within: faster than to check that
        total += bases[0] if len(parts) == 1 else np.repeat(bases, [part.size for part in parts])
    else:
        total = np.repeat(bases, [part.size for part in parts])
    at = 0
    for part in parts:
        if part.numbers.rows.size or part.numbers.columns.size:
            _add_lines(total[at : at + part.size], part)
        at += part.size
    np.clip(total, 0, MAX_SCALES - 1, out=total)
    total <<= 3
    if buckets is not None:
        total |= buckets
    return total.view(np.uint16)


def _add_lines(total: I16, part: Part) -> None:
    """Add the numbers of rows and columns."""
    size, row, numbers = part.size, part.row, part.numbers
    rows, whole = -(-size // row), size // row
    square = total[: whole * row].reshape(whole, row)
    if numbers.rows.size:
        mine = numbers.rows[part.lines].astype(np.int16)
        square += mine[:whole, None]
        total[whole * row :] += mine[-1] if rows > whole else 0
    if numbers.columns.size:
        aside = numbers.columns.astype(np.int16)
        square += aside
        total[whole * row :] += aside[: size - whole * row]
