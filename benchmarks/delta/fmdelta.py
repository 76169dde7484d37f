"""A coder after FM-Delta (W. Ning et al., FM-Delta: Lossless Compression for Storing Massive Fine-tuned Foundation
Models, NeurIPS 2024), written from the paper's description. It runs in the environment of the tools.

Tensors of both versions are aligned. A float becomes an integer in an order-preserving way, integers stay as they are;
the difference is coded as a class (its sign and bit length) by a range coder whose model adapts, and the bits below the
leading one as they are. The range coder is `constriction`'s; its model is renewed every `_CHUNK` values.
"""

from __future__ import annotations

from typing import Any, Final

import constriction
import numpy as np

Array = np.ndarray[Any, Any]

_CHUNK: Final = 1 << 16
_WIDTHS: Final = {"f32": 32, "f16": 16, "i32": 32, "i8": 8, "u8": 8, "i64": 64}
_FLOATS: Final = {"f32", "f16"}


def encode(old: bytes, new: bytes, dtype: str) -> tuple[bytes, bytes]:
    """Return the coded classes and the raw bits of one type's values, all tensors in a row."""
    width = _WIDTHS[dtype]
    difference = _difference(_ordered(old, dtype), _ordered(new, dtype), width)
    encoder, counts, raw = constriction.stream.queue.RangeEncoder(), _Counts(width), []
    for start in range(0, len(difference), _CHUNK):
        part = difference[start : start + _CHUNK]
        magnitude = np.abs(part).astype(np.uint64)
        length = _bit_length(magnitude)
        classes = (np.sign(part) * length + width).astype(np.int32)
        encoder.encode(classes, counts.model())
        counts.learn(classes)
        for bits in range(2, width + 1):
            rest = magnitude[length == bits] - np.uint64(1 << (bits - 1))
            raw.append(_pack(rest, bits - 1))
    return encoder.get_compressed().tobytes(), b"".join(raw)


def decode(old: bytes, count: int, dtype: str, classes: bytes, raw: bytes) -> bytes:
    """Return the new values."""
    width = _WIDTHS[dtype]
    before = _ordered(old, dtype)
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(classes, np.uint32))
    counts, at, parts = _Counts(width), 0, []
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        symbols = decoder.decode(counts.model(), size)
        counts.learn(symbols)
        signed = symbols.astype(np.int64) - width
        length = np.abs(signed)
        magnitude = np.where(length > 0, np.int64(1) << np.maximum(length - 1, 0), 0)
        for bits in range(2, width + 1):
            chosen = np.flatnonzero(length == bits)
            octets = (len(chosen) * (bits - 1) + 7) // 8
            magnitude[chosen] += _unpack(raw[at : at + octets], len(chosen), bits - 1)
            at += octets
        parts.append(before[start : start + size] + np.sign(signed) * magnitude)
    return _stored(np.concatenate(parts) if parts else before[:0], dtype)


class _Counts:
    """How often each class has been seen."""

    def __init__(self, width: int) -> None:
        self._seen: Array = np.full(2 * width + 1, 0.5)

    def model(self) -> Any:
        return constriction.stream.model.Categorical(self._seen / self._seen.sum(), perfect=False)

    def learn(self, symbols: Array) -> None:
        self._seen = self._seen * 0.9 + np.bincount(symbols, minlength=len(self._seen)) + 1e-3


def _ordered(data: bytes, dtype: str) -> Array:
    """Return integers in the order of the values."""
    if dtype not in _FLOATS:
        return np.frombuffer(data, {"i32": "<i4", "i8": "i1", "u8": "u1", "i64": "<i8"}[dtype]).astype(np.int64)
    width = _WIDTHS[dtype]
    bits = np.frombuffer(data, f"<u{width // 8}").astype(np.int64)
    top = 1 << (width - 1)
    return np.where(bits < top, bits, top - 1 - bits)  # -0 lies below 0


def _stored(ordered: Array, dtype: str) -> bytes:
    if dtype not in _FLOATS:
        width = _WIDTHS[dtype]
        return ordered.astype(np.int64).view(np.uint64).astype(f"<u{width // 8}").tobytes()
    width = _WIDTHS[dtype]
    top = 1 << (width - 1)
    return np.where(ordered >= 0, ordered, top - 1 - ordered).astype(f"<u{width // 8}").tobytes()


def _difference(old: Array, new: Array, width: int) -> Array:
    """Return the difference; integers of 8 bits wrap around, which never makes it longer."""
    difference = new - old
    if width == 8:
        difference = (difference + 128) % 256 - 128
    return difference


def _bit_length(magnitude: Array) -> Array:
    length = np.zeros(len(magnitude), np.int64)
    rest = magnitude.copy()
    for step in (32, 16, 8, 4, 2, 1):
        more = rest >= np.uint64(1 << step)
        length += more * step
        rest = np.where(more, rest >> np.uint64(step), rest)
    return length + (rest > 0)


def _pack(values: Array, bits: int) -> bytes:
    shifts = np.arange(bits, dtype=np.uint64)
    return np.packbits(((values[:, None] >> shifts) & np.uint64(1)).astype(np.uint8)).tobytes()


def _unpack(data: bytes, count: int, bits: int) -> Array:
    found = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits)
    values: Array = (found.astype(np.int64) << np.arange(bits)).sum(axis=1)
    return values
