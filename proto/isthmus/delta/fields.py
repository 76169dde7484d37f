"""Fields of a group's map: fixed ones, arrays, and numbers that take as many bytes as they need."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np
from numpy.typing import DTypeLike, NDArray

from isthmus.errors import DeltaError

_LONGEST = 9  # bytes of a number: 63 bits


def pack_numbers(numbers: Iterable[int]) -> bytes:
    """Return unsigned numbers, each in groups of seven bits, the low ones first (LEB128)."""
    out = bytearray()
    for number in numbers:
        while number > 127:
            out.append(number & 127 | 128)
            number >>= 7
        out.append(number)
    return bytes(out)


def pack_signed(numbers: Iterable[int]) -> bytes:
    """Return signed numbers, of which those near zero are short: 0, -1, 1, -2, 2 become 0, 1, 2, 3, 4."""
    return pack_numbers(number << 1 if number >= 0 else -2 * number - 1 for number in numbers)


class Reader:
    """Reads fields from a map's bytes.

    All methods raise `DeltaError` where the bytes end too early.
    """

    def __init__(self, data: bytes) -> None:
        """Begin with the first byte."""
        self._data = data
        self._at = 0

    def fields(self, layout: str) -> tuple[int, ...]:
        """Return the fields of a `struct` layout."""
        return struct.unpack(layout, self._take(struct.calcsize(layout)))

    def array(self, dtype: DTypeLike, count: int) -> NDArray[np.generic]:
        """Return `count` fields of one type."""
        return np.frombuffer(self._take(np.dtype(dtype).itemsize * count), dtype)

    def numbers(self, count: int) -> list[int]:
        """Return `count` numbers of `pack_numbers`."""
        found: list[int] = []
        value = shift = 0
        while len(found) < count:
            if self._at == len(self._data) or shift == 7 * _LONGEST:
                raise DeltaError("a number in the map of a group has no end")
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                found.append(value)
                value = shift = 0
        return found

    def signed(self, count: int) -> list[int]:
        """Return `count` numbers of `pack_signed`."""
        return [number >> 1 if not number & 1 else -(number >> 1) - 1 for number in self.numbers(count)]

    def end(self) -> None:
        """Check that everything has been read."""
        if self._at != len(self._data):
            raise DeltaError("the map of a group goes on after its last field")

    def _take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) != size:
            raise DeltaError("the map of a group ends too early")
        self._at += size
        return taken
