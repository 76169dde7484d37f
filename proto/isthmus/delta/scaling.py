"""Finds tensors that are another one times a number, as the scales of biases are those of weights times one scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

import numpy as np

from isthmus.delta.alignment import Pair
from isthmus.delta.early import scaled
from isthmus.delta.elements import Kind
from isthmus.delta.segments import MAX_EARLY

_LONGEST: Final = MAX_EARLY >> 3  # bytes of a tensor that is looked at
_LOOKED_AT: Final = 64  # tensors of the same length that may be the source
_NEAR: Final = 3  # places of the last bit that a quotient may be off by

Scaled = dict[Pair, tuple[Pair, float]]


def find_scaled(pairs: Iterable[Pair], base: memoryview, target: memoryview) -> Scaled:
    """Return for tensors of single precision that moved their source and their scale, where every bit comes out."""
    found: Scaled = {}
    sources: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        new = bytes(target[pair.offset : pair.offset + pair.length])
        if pair.kind is not Kind.FLOAT32 or pair.length > _LONGEST:
            continue
        if new == base[pair.old_offset : pair.old_offset + pair.length]:
            continue
        known = sources[pair.length]
        for source in reversed(known[-_LOOKED_AT:]):
            other = bytes(target[source.offset : source.offset + source.length])
            if (scale := _scale(other, new)) is not None:
                found[pair] = source, scale
                break
            if (scale := _scale(new, other)) is not None and all(one is not source for one, _ in found.values()):
                found[source] = pair, scale
                known[known.index(source)] = pair
                break
        else:
            known.append(pair)
    return found


def _scale(source: bytes, wanted: bytes) -> float | None:
    """Return the number that makes `wanted` of the source."""
    numbers, products = np.frombuffer(source, "<f4"), np.frombuffer(wanted, "<f4")
    with np.errstate(all="ignore"):
        scale = np.float32(products[0] / numbers[0])
        near = np.isclose(numbers[:16] * scale, products[:16], rtol=1e-6, atol=0)
    if not np.isfinite(scale) or not near.all():
        return None
    pattern = int(scale.view(np.uint32))
    for step in sorted(range(-_NEAR, _NEAR + 1), key=abs):
        candidate = float(np.uint32(max(0, pattern + step)).view(np.float32))
        if scaled(source, candidate) == wanted:
            return candidate
    return None
