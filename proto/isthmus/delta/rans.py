"""Interleaved rANS in numpy: many lanes are coded side by side, one symbol of every lane in a step.

A lane is a 32-bit state; 16-bit words move between the lanes and one common stream. Frequencies have 12 bits, and each
symbol has a context that chooses its frequencies. Only integers are used, so every machine decodes the same. Symbols
may be followed by raw bits, which go through the same states. Lanes go on from one array to the next.

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
_LOW: Final = np.uint32(1 << 16)  # a state is never below this between steps
_WORD: Final = np.uint32(16)
_SHIFT: Final = np.uint32(PRECISION)
_MASK: Final = np.uint32(TOTAL - 1)
_FREQUENCY_MASK: Final = np.uint32(2 * TOTAL - 1)
_SYMBOL_SHIFT: Final = np.uint32(2 * PRECISION + 1)

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


def encode(arrays: Sequence[Coded], lanes: int) -> tuple[U32, U16]:
    """Code the arrays, the last one first; return the states that decoding starts from and the words."""
    state = np.full(lanes, _LOW, np.uint32)
    emitted: list[U16] = []
    for coded in reversed(arrays):
        starts = np.zeros_like(coded.frequencies)
        starts[:, 1:] = np.cumsum(coded.frequencies[:, :-1], axis=1)
        width = coded.frequencies.shape[1]
        frequencies, begins = coded.frequencies.astype(np.uint32).ravel(), starts.astype(np.uint32).ravel()
        size = coded.symbols.size
        for at in range((size - 1) // lanes * lanes, -1, -lanes) if size else ():
            symbols = coded.symbols[at : at + lanes]
            active = state[: symbols.size]
            if coded.bit_counts is not None and coded.bits is not None:
                counts = coded.bit_counts[symbols].astype(np.uint32)
                if counts.any():
                    bits = coded.bits[at : at + lanes]
                    high = np.maximum(counts, 16) - 16
                    if high.any():
                        _push_bits(active, bits >> _WORD, high, emitted)
                    _push_bits(active, bits & np.uint32(0xFFFF), np.minimum(counts, 16), emitted)
            index = coded.contexts[at : at + lanes].astype(np.int32) * width + symbols
            frequency = frequencies[index]
            full = (active >> np.uint32(32 - PRECISION)) >= frequency
            _emit(active, full, emitted)
            quotient, rest = np.divmod(active, frequency)
            active[:] = (quotient << _SHIFT) + rest + begins[index]
    words = np.concatenate(emitted[::-1]) if emitted else np.zeros(0, np.uint16)
    return state, words


def _emit(active: U32, full: NDArray[np.bool_], emitted: list[U16]) -> None:
    if full.any():
        emitted.append(active[full].astype(np.uint16))
        active[full] >>= _WORD


def _push_bits(active: U32, bits: U32, counts: U32, emitted: list[U16]) -> None:
    full = (active.astype(np.uint64) << counts.astype(np.uint64)) >> np.uint64(32) != 0
    _emit(active, full, emitted)
    active[:] = (active << counts) | bits


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
            rows.append(symbol << int(_SYMBOL_SHIFT) | row[symbol] << PRECISION | bias)
        self.entries = np.concatenate(rows).astype(np.uint32)


class Decoder:
    """Decodes arrays in the order in which they were given to `encode`."""

    def __init__(self, states: U32, words: Callable[[int], U16]) -> None:
        """Start from `states`; `words(n)` returns the next n words or fewer when there are no more."""
        self._state = states.copy()
        self._words = words
        self._buffer = np.zeros(0, np.uint16)
        self._at = 0

    def decode(self, contexts: U8, table: Table, bit_counts: U8 | None) -> tuple[U8, U32 | None]:
        """Return the symbols of these contexts (all below `table.contexts`), and their raw bits if any has some.

        Raises:
            DeltaError: The words end too early.
        """
        size, lanes = contexts.size, self._state.size
        symbols = np.empty(size, np.uint8)
        bits: U32 | None = None
        entries = table.entries
        for at in range(0, size, lanes):
            state = self._state[: min(lanes, size - at)]
            slot = contexts[at : at + lanes].astype(np.uint32)
            slot <<= _SHIFT
            slot |= state & _MASK
            entry = entries.take(slot)
            np.right_shift(entry, _SYMBOL_SHIFT, out=slot)
            symbols[at : at + lanes] = slot
            state >>= _SHIFT
            state *= (entry >> _SHIFT) & _FREQUENCY_MASK
            entry &= _MASK
            state += entry
            self._refill(state)
            if bit_counts is not None:
                counts = bit_counts.take(slot)
                if counts.any():
                    bits = np.zeros(size, np.uint32) if bits is None else bits
                    bits[at : at + lanes] = self._pull_bits(state, counts)
        return symbols, bits

    def _pull_bits(self, state: U32, counts: U8) -> U32:
        low = np.minimum(counts, 16).astype(np.uint32)
        bits: U32 = state & ((np.uint32(1) << low) - np.uint32(1))
        state >>= low
        self._refill(state)
        if int(counts.max()) > 16:
            high = (np.maximum(counts, 16) - np.uint8(16)).astype(np.uint32)
            bits |= (state & ((np.uint32(1) << high) - np.uint32(1))) << _WORD
            state >>= high
            self._refill(state)
        return bits

    def _refill(self, state: U32) -> None:
        empty = np.flatnonzero(state < _LOW)
        count = empty.size
        if not count:
            return
        end = self._at + count
        if end > self._buffer.size:
            more = self._words(max(count, 1 << 18))
            self._buffer = np.concatenate((self._buffer[self._at :], more))
            self._at, end = 0, count
            if end > self._buffer.size:
                raise DeltaError("the coded tensors end too early")
        state[empty] = (state[empty] << _WORD) | self._buffer[self._at : end]
        self._at = end

    def finish(self) -> None:
        """Check that everything was used up.

        Raises:
            DeltaError: Words are left, or a lane does not end where the encoder began.
        """
        if self._at != self._buffer.size or self._words(1).size or (self._state != _LOW).any():
            raise DeltaError("the coded tensors go on after the last element")
