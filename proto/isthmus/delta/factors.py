"""Factors of a change, and how they are coded: as 16-bit numbers, before all tensors of their group.

A change of low rank has a left and a right factor: matrices with a column, here *vector*, per rank. Where whole
channels were rescaled, as where a normalisation is folded into weights, a vector of *gains* has a number per channel.
The context of a vector's numbers is how large they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.delta import elements
from isthmus.delta.elements import Kind
from isthmus.delta.rans import U8, U16, U32

I16 = NDArray[np.int16]

KIND: Final = Kind.INT16
MAX_RANK: Final = 64
MAX_NUMBERS: Final = 1 << 22  # of all factors of a group
MAX_SCALE: Final = 127
LEAST_SHIFT: Final = -36  # of gains
_EXACT: Final = 1 << 24  # below it single precision holds every integer
_STEPS: Final = 4  # scales per octave
_SMALLEST: Final = 2  # octaves below one that a scale can say
_CHUNK: Final = 1 << 18  # numbers that are decoded together


@dataclass(frozen=True, slots=True)
class Gains:
    """What channels are multiplied by: 1 + number * 2^shift; exact in double precision, as `shift` is -36 to 0."""

    numbers: I16
    width: int  # elements of a channel
    shift: int

    def factors(self, channels: slice) -> NDArray[np.float64]:
        """Return what some channels are multiplied by."""
        return 1.0 + self.numbers[channels] * 2.0**self.shift


@dataclass(frozen=True, slots=False)
class Factors:
    """A prediction: the values are multiplied by the gains, and change by (left @ right.T) * 2^shift."""

    left: I16  # rows that are not still x rank
    right: I16  # columns x rank
    shift: int
    gains: Gains | None = None

    @property
    def numbers(self) -> int:
        """How many numbers there are."""
        return self.left.size + self.right.size + (self.gains.numbers.size if self.gains else 0)

    @cached_property
    def parts(self) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
        """Both factors in a precision in which every product is exact, whatever the order of its sums."""
        left, right = (
            np.maximum(part.max(axis=0, initial=0).astype(np.int64), -part.min(axis=0, initial=0).astype(np.int64))
            for part in (self.left, self.right)
        )
        dtype = np.float32 if int((left * right).sum()) < _EXACT else np.float64
        return self.left.astype(dtype), np.ascontiguousarray(self.right.T.astype(dtype))


@dataclass(frozen=True, slots=True)
class Outline:
    """What is known of factors before their numbers are read."""

    shift: int
    scales: U8  # of each vector of the left factor, then of each of the right one, then of the gains
    rows: int
    columns: int
    width: int = 0  # elements that share a gain; 0 where there are no gains
    gain_shift: int = 0

    @property
    def rank(self) -> int:
        """How many vectors each factor has."""
        return self.scales.size // 2

    @property
    def gains(self) -> int:
        """How many gains there are."""
        return self.rows * self.columns // self.width if self.width else 0

    @property
    def numbers(self) -> int:
        """How many numbers there are."""
        return self.rank * (self.rows + self.columns) + self.gains

    @property
    def sizes(self) -> list[int]:
        """How many numbers each vector has."""
        return [self.rows] * self.rank + [self.columns] * self.rank + [self.gains] * bool(self.width)


def outline(factors: Factors) -> Outline:
    """Return what a delta says of factors beforehand."""
    scales = np.array([_scale(vector) for vector in _vectors(factors)], np.uint8)
    shape = factors.left.shape[0], factors.right.shape[0]
    gains = factors.gains
    return Outline(factors.shift, scales, *shape, gains.width if gains else 0, gains.shift if gains else 0)


def _vectors(factors: Factors) -> list[I16]:
    vectors = [vector for part in (factors.left, factors.right) for vector in part.T]
    return [*vectors, factors.gains.numbers] if factors.gains else vectors


def _scale(vector: I16) -> int:
    size = math.sqrt(float(np.square(vector.astype(np.float64)).mean()))
    return min(MAX_SCALE, max(0, round((math.log2(max(size, 1e-9)) + _SMALLEST) * _STEPS)))


def code(made: Sequence[Factors]) -> Iterator[tuple[U16, U8, U32]]:
    """Yield contexts, symbols and raw bits of the numbers, in parts that are coded one after the other."""
    numbers = np.concatenate([vector for factors in made for vector in _vectors(factors)])
    contexts = _contexts([outline(factors) for factors in made])
    symbols, raw = elements.to_symbols(numbers, KIND)
    for at in range(0, numbers.size, _CHUNK):
        part = slice(at, at + _CHUNK)
        yield contexts[part], symbols[part], raw[part]


def read(outlines: Sequence[Outline], decode: Callable[[U16], tuple[U8, U32 | None]]) -> Iterator[Factors]:
    """Yield factors; `decode` returns the symbols and raw bits of the next elements, which have these contexts."""
    contexts = _contexts(outlines)
    numbers = np.empty(contexts.size, np.int16)
    for at in range(0, contexts.size, _CHUNK):
        part = contexts[at : at + _CHUNK]
        none = np.zeros(part.size, np.uint16)
        numbers[at : at + _CHUNK] = elements.move(none, *decode(part), KIND).view(np.int16)
    at = 0
    for one in outlines:
        middle, end = at + one.rank * one.rows, at + one.rank * (one.rows + one.columns)
        left, right = (
            numbers[at:middle].reshape(one.rank, one.rows).T,
            numbers[middle:end].reshape(one.rank, one.columns).T,
        )
        at += one.numbers
        gains = Gains(numbers[end:at], one.width, one.gain_shift) if one.width else None
        yield Factors(left, right, one.shift, gains)


def _contexts(outlines: Sequence[Outline]) -> U16:
    scales = np.concatenate([one.scales for one in outlines]).astype(np.uint16) << np.uint16(3)
    contexts: U16 = np.repeat(scales, [size for one in outlines for size in one.sizes])
    return contexts


def bits(factors: Factors) -> float:
    """Return what factors cost, about: the entropy of each vector, and a few bits more."""
    total = 0.0
    for vector in _vectors(factors):
        counts = np.bincount(vector.astype(np.int64) - int(vector.min()))
        counts = counts[counts > 0]
        total += float((counts * np.log2(vector.size / counts)).sum()) + 10
    return total
