"""What a weight is: element kinds, their order-preserving integers, and differences as symbols with raw bits.

Values become unsigned integers in the order of the values; (new - old) modulo 2^width is read as a signed number d.
With a = |d| > 0, e = floor(log2 a) and m mantissa bits, the symbol is 1 + 2 * (e * 2^m + the m bits below a's leading
bit) + (d < 0); the max(0, e - m) bits below those follow raw. No difference is symbol 0.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.delta.rans import U8, U32

Ints = NDArray[np.unsignedinteger[Any]]
Differences = NDArray[np.signedinteger[Any]]


class Kind(IntEnum):
    """Element kinds; INT4 is two elements in a byte, differenced as nibbles."""

    INT8 = 1
    INT16 = 2
    INT32 = 3
    FLOAT16 = 4
    BFLOAT16 = 5
    FLOAT32 = 6
    INT4 = 7


_DTYPES: Final[dict[Kind, np.dtype[Any]]] = {
    Kind.INT8: np.dtype("<u1"),
    Kind.INT16: np.dtype("<u2"),
    Kind.INT32: np.dtype("<u4"),
    Kind.FLOAT16: np.dtype("<u2"),
    Kind.BFLOAT16: np.dtype("<u2"),
    Kind.FLOAT32: np.dtype("<u4"),
    Kind.INT4: np.dtype("<u1"),
}
_MANTISSA: Final = {
    Kind.INT8: 2,
    Kind.INT16: 2,
    Kind.INT32: 1,
    Kind.FLOAT16: 2,
    Kind.BFLOAT16: 2,
    Kind.FLOAT32: 1,
    Kind.INT4: 2,
}
_FEATURE_SHIFT: Final = {
    Kind.INT8: 0,
    Kind.INT16: 8,
    Kind.INT32: 24,
    Kind.FLOAT16: 8,
    Kind.BFLOAT16: 7,
    Kind.FLOAT32: 23,
    Kind.INT4: 0,
}
FLOATS: Final = frozenset({Kind.FLOAT16, Kind.BFLOAT16, Kind.FLOAT32})


@cache
def width(kind: Kind) -> int:
    """Return the bytes that one stored element has (for INT4 the byte of two)."""
    return int(_DTYPES[kind].itemsize)


def count(kind: Kind, length: int) -> int:
    """Return how many elements `length` bytes hold."""
    return length * 2 if kind is Kind.INT4 else length // width(kind)


@cache
def bits(kind: Kind) -> int:
    """Return the bits of one element."""
    return 4 if kind is Kind.INT4 else 8 * width(kind)


def to_ints(data: bytes | memoryview | NDArray[np.uint8], kind: Kind) -> Ints:
    """Return the elements of `data` as unsigned integers in the order of their values."""
    raw = np.frombuffer(data, _DTYPES[kind])
    if kind is Kind.INT4:
        nibbles = np.empty(raw.size * 2, np.uint8)
        nibbles[0::2] = raw & 15
        nibbles[1::2] = raw >> 4
        return nibbles
    if kind in FLOATS:
        turn = _signs(raw)
        turn |= _top(raw)
        turn ^= raw
        return turn
    return raw


def to_bytes(values: Ints, kind: Kind) -> bytes:
    """Undo `to_ints`."""
    if kind is Kind.INT4:
        return ((values[0::2] & 15) | (values[1::2] << 4 & 0xF0)).astype(np.uint8).tobytes()
    return (_stored(values) if kind in FLOATS else values).tobytes()


def _stored(values: Ints) -> Ints:
    turn = ~_signs(values)
    turn |= _top(values)
    turn ^= values
    return turn


def _signs(values: Ints) -> Ints:
    """Return all ones where the highest bit is set."""
    signed = values.view(f"<i{values.itemsize}")
    return (signed >> (8 * values.itemsize - 1)).view(values.dtype)


def _top(values: Ints) -> Any:
    return values.dtype.type(1 << (8 * values.itemsize - 1))


def keys(values: Ints, kind: Kind) -> Ints:
    """Return for each old element the bits that decide on its feature."""
    shift = _FEATURE_SHIFT[kind]
    if not shift:
        return values
    shifted: Ints = values >> values.dtype.type(shift)
    return shifted.astype(np.uint8 if bits(kind) - shift == 8 else np.uint16)


@cache
def key_features(kind: Kind) -> U8:
    """Return the feature of each key: what helps to predict how an old element moves, its value or its exponent."""
    count = 1 << (bits(kind) - _FEATURE_SHIFT[kind])
    key = np.arange(count)
    if kind in FLOATS:  # keys below the middle are those of negative numbers, the other way round
        key = np.where(key < count // 2, count // 2 - 1 - key, key - count // 2)
    return key.astype(np.uint8)


def features(values: Ints, kind: Kind) -> U8:
    """Return the feature of each old element."""
    return key_features(kind).take(keys(values, kind)) if _FEATURE_SHIFT[kind] else values


def exponents(kind: Kind) -> NDArray[np.float64]:
    """Return for each feature of a float its binary exponent: how much coarser the grid of the values is there."""
    feature = np.arange(256)
    exponent = feature >> 2 if kind is Kind.FLOAT16 else feature
    return np.maximum(exponent, 1).astype(np.float64)


def to_values(ints: Ints, kind: Kind) -> NDArray[np.float64]:
    """Return the numbers that integers of `to_ints` stand for."""
    if kind not in FLOATS:
        return ints.astype(np.float64)
    stored = _stored(ints)
    with np.errstate(invalid="ignore"):
        if kind is Kind.FLOAT16:
            return stored.view("<f2").astype(np.float64)
        if kind is Kind.BFLOAT16:
            return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return stored.view("<f4").astype(np.float64)


def from_values(values: NDArray[np.float64], kind: Kind) -> Ints:
    """Return the integers of the floats that are nearest to `values`, ties to even, by way of single precision."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        single = values.astype("<f4")
        if kind is Kind.FLOAT16:
            return to_ints(single.astype("<f2").view(np.uint8), kind)
    if kind is Kind.BFLOAT16:
        pattern = single.view(np.uint32)
        odd = (pattern >> np.uint32(16)) & np.uint32(1)
        return to_ints(((pattern + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype("<u2").view(np.uint8), kind)
    return to_ints(single.view(np.uint8), kind)


@cache
def symbol_count(kind: Kind) -> int:
    """Return how many symbols the kind has."""
    return 3 + 2 * ((bits(kind) - 1) << _MANTISSA[kind])


@cache
def bit_counts(kind: Kind) -> U8:
    """Return for each symbol how many raw bits follow it."""
    exponent = (np.maximum(np.arange(symbol_count(kind)), 1) - 1) // 2 >> _MANTISSA[kind]
    return np.maximum(exponent - _MANTISSA[kind], 0).astype(np.uint8)


def differences(old: Ints, new: Ints, kind: Kind) -> Differences:
    """Return the signed modular differences."""
    return wrapped((new - old).view(f"<i{old.itemsize}"), kind)


def wrapped(difference: Differences, kind: Kind) -> Differences:
    """Return differences modulo 2^width, which those of whole bytes are already, between -2^(width-1) and its end."""
    return ((difference + 8) & 15) - 8 if kind is Kind.INT4 else difference


def to_symbols(difference: Differences, kind: Kind) -> tuple[U8, U32]:
    """Return the symbol and the raw bits of each difference."""
    if bits(kind) <= 16:
        symbols, raw = _known_symbols(kind)
        place = difference.view(f"<u{difference.itemsize}")
        return symbols.take(place), raw.take(place)
    return _to_symbols(difference.astype(np.int64), kind)


@cache
def _known_symbols(kind: Kind) -> tuple[U8, U32]:
    """Return the symbol and the raw bits of each difference of up to 16 bits, read as an unsigned number."""
    size = width(kind)
    numbers = np.arange(1 << 8 * size).astype(f"<u{size}").view(f"<i{size}")
    return _to_symbols(wrapped(numbers, kind).astype(np.int64), kind)


def _to_symbols(difference: Differences, kind: Kind) -> tuple[U8, U32]:
    mantissa = _MANTISSA[kind]
    size = np.abs(difference)
    pattern = size.astype(np.float64).view(np.int64) >> (52 - mantissa)
    cls = pattern - (1023 << mantissa)
    symbols = np.where(size == 0, 0, 1 + 2 * cls + (difference < 0)).astype(np.uint8)
    masks = (1 << bit_counts(kind).astype(np.int64)) - 1
    return symbols, (size & masks.take(symbols)).astype(np.uint32)


@cache
def _bases(kind: Kind) -> Ints:
    """Return for each symbol its difference without raw bits, modulo 2^width."""
    mantissa = _MANTISSA[kind]
    symbols = np.arange(symbol_count(kind))
    cls = (np.maximum(symbols, 1) - 1) // 2
    exponent, top = cls >> mantissa, cls & ((1 << mantissa) - 1)
    shifts = exponent - mantissa
    leading = top | 1 << mantissa
    base = np.where(shifts >= 0, leading << np.maximum(shifts, 0), leading >> np.maximum(-shifts, 0))
    signed = np.where(symbols == 0, 0, np.where((symbols - 1) & 1, -base, base))
    found: Ints = (signed & ((1 << bits(kind)) - 1)).astype(_DTYPES[kind])
    return found


def move(
    old: Ints,
    symbols: U8,
    raw: U32 | None,
    kind: Kind,
    moves: NDArray[np.integer[Any]] | None = None,
    flips: NDArray[np.bool_] | None = None,
) -> Ints:
    """Return the new elements: `old` moved as predicted and by what the symbols and raw bits say, modulo 2^width."""
    dtype = old.dtype
    base = _bases(kind).take(symbols, mode="clip")
    if raw is not None:
        extra = raw.astype(dtype)
        turn = (symbols & np.uint8(1)).astype(dtype)
        turn -= dtype.type(1)  # all ones where it goes down, or where there is no difference and no bits
        extra ^= turn
        extra -= turn
        base += extra
    if flips is not None:
        turn = np.negative(flips.view(np.uint8)).astype(dtype) if dtype.itemsize == 1 else -flips.astype(dtype)
        base ^= turn  # all ones where the sign turns
        base -= turn
    if moves is not None:
        base += moves.astype(dtype)
    base += old
    return base
