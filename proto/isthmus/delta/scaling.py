"""Finds tensors that are another one times a number, as the scales of biases are those of weights times one scale."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from isthmus.delta.alignment import Pair
from isthmus.delta.early import scaled
from isthmus.delta.elements import Kind
from isthmus.delta.pieces import MAX_EARLY

_LONGEST: Final = MAX_EARLY >> 3  # bytes of a tensor that is looked at
_LOOKED_AT: Final = 64  # tensors of the same length that may be the source
_NEAR: Final = 3  # places of the last bit that a quotient may be off by
_HEAD: Final = 16  # numbers that are compared first
_CLOSE: Final = 1e-6

Numbers = NDArray[np.float32]
Scaled = dict[Pair, tuple[Pair, float]]


def find_scaled(pairs: Iterable[Pair], base: memoryview, target: memoryview) -> Scaled:
    """Return for tensors of single precision that moved their source and their scale, where every bit comes out."""
    found: Scaled = {}
    sources: dict[int, list[tuple[Pair, Numbers]]] = defaultdict(list)
    for pair in pairs:
        if pair.kind is not Kind.FLOAT32 or pair.length > _LONGEST:
            continue
        new = target[pair.offset : pair.offset + pair.length]
        if new == base[pair.old_offset : pair.old_offset + pair.length]:
            continue
        numbers, known = np.frombuffer(new, "<f4"), sources[pair.length]
        del known[:-_LOOKED_AT]
        for place in _alike(numbers, [other for _, other in known]):
            source, other = known[place]
            if (scale := _scale(other, numbers)) is not None:
                found[pair] = source, scale
                break
            if (scale := _scale(numbers, other)) is not None and all(one is not source for one, _ in found.values()):
                found[source] = pair, scale
                known[place] = pair, numbers
                break
        else:
            known.append((pair, numbers))
    return found


def _alike(numbers: Numbers, known: Sequence[Numbers]) -> list[int]:
    """Return which arrays begin as these numbers do, times something."""
    if not known:
        return []
    heads, head = np.stack([other[:_HEAD] for other in known]).astype(np.float64), numbers[:_HEAD].astype(np.float64)
    with np.errstate(all="ignore"):
        products = heads * (head[0] / heads[:, :1])
        near = np.abs(products - head) <= _CLOSE * np.abs(head)
    found: list[int] = np.flatnonzero(near.all(axis=1)).tolist()
    return found


def _scale(source: Numbers, wanted: Numbers) -> float | None:
    """Return the number that makes `wanted` of the source."""
    with np.errstate(all="ignore"):
        pattern = int((wanted[:1] / source[:1]).view(np.uint32)[0])
    if not np.isfinite(source).all():
        return None  # machines make different bits of inf * 0 and of NaN
    for step in sorted(range(-_NEAR, _NEAR + 1), key=abs):
        candidate = float(np.uint32(max(0, pattern + step) & 0xFFFFFFFF).view(np.float32))
        if math.isfinite(candidate) and scaled(source.tobytes(), candidate) == wanted.tobytes():
            return candidate
    return None
