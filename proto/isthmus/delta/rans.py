"""Interleaved rANS in numpy: many lanes are coded side by side, one symbol of every lane in a step.

A lane is a 32-bit state; 16-bit words move between the lanes and one common stream. Frequencies have 12 bits, and each
symbol has a context that chooses its frequencies. Only integers are used, so every machine decodes the same. Symbols
may be followed by raw bits, which go through the same states. Lanes go on from one array to the next.

An encoder begins with few lanes. Whenever enough words have been written it doubles them, and each new lane takes a
word back as its first state: so a lane costs its last state only, of which half is coded symbols. The decoder meets
that in reverse: at certain elements half of its lanes give their words back.

Source: J. Duda, "Asymmetric numeral systems" (arXiv:1311.2540); F. Giesen, "Interleaved entropy coders"
(arXiv:1402.3392).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import DeltaError

PRECISION: Final = 12  # bits of a frequency
TOTAL: Final = 1 << PRECISION
MAX_SYMBOLS: Final = 127
MAX_LANES: Final = 1 << 15
FEWEST_LANES: Final = 1 << 5  # what an encoder begins with at least, where it may have more
_LOW: Final = np.uint32(1 << 16)  # a state is never below this between steps
_WORD: Final = np.uint32(16)
_SHIFT: Final = np.uint32(PRECISION)
_MASK: Final = np.uint32(TOTAL - 1)
_SYMBOL_BITS: Final = 7
_FREQUENCY_SHIFT: Final = np.uint32(PRECISION + _SYMBOL_BITS)
_SYMBOL_MASK: Final = np.uint32((1 << _SYMBOL_BITS) - 1)
_READ: Final = 1 << 18  # words that are read at once

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Coded:
    """What one array becomes: a symbol per element, its context, and the raw bits that follow the symbol."""

    symbols: U8
    contexts: U8
    frequencies: U16  # contexts x symbols, each row adds up to TOTAL
    bit_counts: U8 | None  # per symbol: 0 to 32; None where no symbol is followed by bits
    bits: U32 | None  # per element


@dataclass(frozen=True, slots=True)
class Stream:
    """Coded arrays."""

    states: U32  # that decoding starts from, one per lane
    words: U16
    halvings: list[int]  # elements before each halving of the lanes, in the order of decoding


def encode(arrays: Sequence[Coded], lanes: int) -> Stream:
    """Code the arrays, the last one first, with up to `lanes` lanes (a power of two)."""
    encoder = _Encoder(lanes)
    left = sum(coded.symbols.size for coded in arrays)
    for coded in reversed(arrays):
        left -= coded.symbols.size
        encoder.push(coded, left)
    return encoder.stream()


class _Encoder:
    """Writes words from the last to the first."""

    def __init__(self, lanes: int) -> None:
        self._most = lanes
        self._state = np.full(min(lanes, FEWEST_LANES), _LOW, np.uint32)
        self._emitted: list[U16] = []  # parts in the order in which they were written, the words of each ascending
        self._written = 0
        self._halvings: list[int] = []

    def stream(self) -> Stream:
        words = np.concatenate(self._emitted[::-1]) if self._emitted else np.zeros(0, np.uint16)
        return Stream(self._state, words, self._halvings[::-1])

    def push(self, coded: Coded, before: int) -> None:
        """Code an array; `before` elements precede it."""
        width = coded.frequencies.shape[1]
        frequencies = coded.frequencies.astype(np.uint32)
        begins = np.zeros_like(frequencies)
        np.cumsum(frequencies[:, :-1], axis=1, out=begins[:, 1:])
        index = coded.contexts.astype(np.int32) * width + coded.symbols
        frequency, begin = frequencies.ravel().take(index), begins.ravel().take(index)
        counts = None
        if coded.bit_counts is not None and coded.bits is not None:
            counts = coded.bit_counts.take(coded.symbols).astype(np.uint32)
        end = coded.symbols.size
        while end:
            lanes = self._state.size
            at = (end - 1) // lanes * lanes
            active = self._state[: end - at]
            if counts is not None and coded.bits is not None:
                self._push_bits(active, coded.bits[at:end], counts[at:end])
            self._push(active, frequency[at:end], begin[at:end])
            end = at
            if at % (2 * lanes) == 0 and 2 * lanes <= self._most and self._written >= 4 * lanes:
                self._double(before + at)

    def _double(self, place: int) -> None:
        taken: list[U16] = []
        left = self._state.size
        while left:
            part = self._emitted.pop()
            taken.append(part[:left])
            if part.size > left:
                self._emitted.append(part[left:])
            left -= taken[-1].size
        self._written -= self._state.size
        self._state = np.concatenate((self._state, np.concatenate(taken).astype(np.uint32) | _LOW))
        self._halvings.append(place)

    def _push(self, active: U32, frequency: U32, begin: U32) -> None:
        self._emit(active, (active >> np.uint32(32 - PRECISION)) >= frequency)
        quotient, rest = np.divmod(active, frequency)
        quotient <<= _SHIFT
        quotient += rest
        np.add(quotient, begin, out=active)

    def _push_bits(self, active: U32, bits: U32, counts: U32) -> None:
        if counts.any():
            high: U32 = np.maximum(counts, np.uint32(16)) - np.uint32(16)
            if high.any():
                self._push_few_bits(active, bits >> _WORD, high)
            self._push_few_bits(active, bits & np.uint32(0xFFFF), np.minimum(counts, np.uint32(16)))

    def _push_few_bits(self, active: U32, bits: U32, counts: U32) -> None:
        self._emit(active, (active.astype(np.uint64) << counts.astype(np.uint64)) >> np.uint64(32) != 0)
        active <<= counts
        active |= bits

    def _emit(self, active: U32, full: NDArray[np.bool_]) -> None:
        (chosen,) = full.nonzero()
        if chosen.size:
            state = active.take(chosen)
            self._emitted.append(state.astype(np.uint16))
            self._written += chosen.size
            active[chosen] = state >> _WORD


class Table:
    """Frequencies made ready for decoding: one entry per context and slot."""

    def __init__(self, frequencies: U16) -> None:
        """Build the table.

        Raises:
            DeltaError: A row does not add up to `TOTAL`.
        """
        if (frequencies.sum(axis=1, dtype=np.int64) != TOTAL).any():
            raise DeltaError(f"frequencies do not add up to {TOTAL}")
        self.contexts, symbols = frequencies.shape
        rows = []
        for row in frequencies.astype(np.int64):
            symbol = np.repeat(np.arange(symbols), row)
            bias = np.arange(TOTAL) - np.repeat(np.cumsum(row) - row, row)
            rows.append(row[symbol] << int(_FREQUENCY_SHIFT) | symbol << PRECISION | bias)
        self.entries = np.concatenate(rows).astype(np.uint32)


class _Raw:
    """Raw bits per symbol: those that are pulled first, and those above."""

    def __init__(self, counts: U8) -> None:
        self.low = np.minimum(counts, 16).astype(np.uint32)
        self.low_mask = (np.uint32(1) << self.low) - np.uint32(1)
        high = np.maximum(counts, 16).astype(np.uint32) - np.uint32(16)
        self.high = high if high.any() else None


def _symbols(entries: U32) -> U8:
    return (entries >> _SHIFT).astype(np.uint8) & np.uint8(_SYMBOL_MASK)


class Decoder:
    """Decodes arrays in the order in which they were given to `encode`."""

    def __init__(self, states: U32, words: Callable[[int], U16], halvings: Sequence[int]) -> None:
        """Start from `states`; `words(n)` returns the next n words or fewer when there are no more."""
        self._state = states.copy()
        self._words = words
        self._buffer = np.zeros(0, np.uint16)
        self._at = 0
        self._halvings = list(halvings)
        self._done = 0  # elements
        self._scratch = np.empty((2, states.size), np.uint32)

    def decode(self, slots: U32, table: Table, bit_counts: U8 | None) -> tuple[U8, U32 | None]:
        """Return the symbols of elements, and their raw bits if any has some.

        Args:
            slots: For each element `TOTAL` times its context, which is below `table.contexts`; it is overwritten.
            table: The frequencies.
            bit_counts: Raw bits per symbol.

        Raises:
            DeltaError: The words end too early.
        """
        size, at = slots.size, 0
        bits = np.zeros(size, np.uint32) if bit_counts is not None else None
        raw = _Raw(bit_counts) if bit_counts is not None else None
        while at < size:
            while self._halvings and self._done >= self._halvings[0]:
                self._halve()
            end = min(at + self._state.size, size)
            state, entry = self._state[: end - at], slots[at:end]
            self._step(state, entry, table.entries)
            if bits is not None and raw is not None:
                self._pull_bits(state, _symbols(entry), raw, bits[at:end])
            self._done += end - at
            at = end
        return _symbols(slots), bits

    def _step(self, state: U32, entry: U32, entries: U32) -> None:
        """Decode a symbol of each lane; `entry` holds the first slots of the tables and becomes the entries."""
        slot, frequency = self._scratch[0, : state.size], self._scratch[1, : state.size]
        np.bitwise_and(state, _MASK, out=slot)
        slot |= entry
        entries.take(slot, out=entry, mode="clip")  # slots are within the table: faster than to check that
        state >>= _SHIFT
        np.right_shift(entry, _FREQUENCY_SHIFT, out=frequency)
        state *= frequency
        np.bitwise_and(entry, _MASK, out=slot)
        state += slot
        self._refill(state)

    def _pull_bits(self, state: U32, symbols: U8, raw: _Raw, bits: U32) -> None:
        low = raw.low.take(symbols, mode="clip")  # symbols are within
        np.bitwise_and(state, raw.low_mask.take(symbols, mode="clip"), out=bits)
        state >>= low
        self._refill(state)
        if raw.high is not None:
            high = raw.high.take(symbols, mode="clip")
            if high.any():
                bits |= (state & ((np.uint32(1) << high) - np.uint32(1))) << _WORD
                state >>= high
                self._refill(state)

    def _refill(self, state: U32) -> None:
        (empty,) = (state < _LOW).nonzero()
        count = empty.size
        if not count:
            return
        end = self._at + count
        if end > self._buffer.size:
            more = self._words(max(count, _READ))
            self._buffer = np.concatenate((self._buffer[self._at :], more))
            self._at, end = 0, count
            if end > self._buffer.size:
                raise DeltaError("the coded tensors end too early")
        refilled = state.take(empty)
        refilled <<= _WORD
        refilled |= self._buffer[self._at : end]
        state[empty] = refilled
        self._at = end

    def _halve(self) -> None:
        if self._done != self._halvings.pop(0) or self._state.size < 2:
            raise DeltaError("the lanes are halved where they cannot be")
        half = self._state.size // 2
        back = self._state[half:]
        if (back >> _WORD != 1).any():
            raise DeltaError("a lane holds no word where it ends")
        self._buffer = np.concatenate((back.astype(np.uint16), self._buffer[self._at :]))
        self._at = 0
        self._state = self._state[:half].copy()

    def finish(self) -> None:
        """Check that everything was used up.

        Raises:
            DeltaError: Words are left, or a lane does not end where the encoder began.
        """
        while self._halvings and self._halvings[0] == self._done:
            self._halve()
        if self._halvings or self._at != self._buffer.size or self._words(1).size or (self._state != _LOW).any():
            raise DeltaError("the coded tensors go on after the last element")
