"""Pairs the tensors of a new file with those of the old one, and cuts what is left into runs that can be coded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from isthmus.delta import elements, model
from isthmus.delta.elements import FLOATS, Kind
from isthmus.delta.layout import Tensor
from isthmus.digests import sha256_bytes

CHUNK: Final = 1 << 20  # bytes of an unknown file whose kind is found together
_SAMPLE: Final = 1 << 15  # bytes
_UNKNOWN_ROW: Final = 256  # elements
_TRIED: Final = (Kind.FLOAT32, Kind.FLOAT16, Kind.INT8)
_GOOD: Final = 0.9  # of its plain size: what codes no better is left to zstd


@dataclass(frozen=True, slots=True)
class Pair:
    """A run of the new file and the run of the old file that it is like."""

    offset: int
    old_offset: int
    length: int
    kind: Kind
    row: int
    channel: int = 0  # elements of a row as the tensor says; rows may be joined to longer ones


def pair_tensors(old: Sequence[Tensor], new: Sequence[Tensor], base: memoryview, target: memoryview) -> list[Pair]:
    """Return the pairs in the order of the new file, without overlap there.

    Tensors are paired by name, then by content, then by kind and shape in their order.
    """
    known = [tensor for tensor in old if tensor.kind is not None]
    wanted = [tensor for tensor in new if tensor.kind is not None]
    pairs: list[Pair] = []
    keys: tuple[Callable[[Tensor, memoryview], object], ...] = (
        lambda tensor, _: (tensor.name, tensor.kind, tensor.row),
        lambda tensor, data: (tensor.length, sha256_bytes(bytes(data[tensor.offset : tensor.offset + tensor.length]))),
        lambda tensor, _: (tensor.kind, tensor.row, tensor.length),
        lambda tensor, _: (tensor.name, tensor.kind),
    )
    for key in keys:
        waiting: dict[object, list[Tensor]] = defaultdict(list)
        for tensor in known:
            waiting[key(tensor, base)].append(tensor)
        left = []
        for tensor in wanted:
            candidates = waiting.get(key(tensor, target))
            if candidates:
                match = candidates.pop(0)
                known.remove(match)
                pairs.append(_pair(tensor, match))
            else:
                left.append(tensor)
        wanted = left
    for section, match in _places(old, new, len(base), len(target)):
        pairs += _guess(section, match, base, target)
    return sorted(pairs, key=lambda pair: pair.offset)


def _pair(new: Tensor, old: Tensor) -> Pair:
    kind = new.kind or Kind.INT8
    length = min(new.length, old.length)
    length -= length % elements.width(kind)
    row = max(1, new.row)
    count = elements.count(kind, length)
    if row > model.MAX_ROW:  # a row as long as a tensor: any width does
        row = 512
    while row < 64 and row * 2 <= count:
        row *= 2
    return Pair(new.offset, old.offset, length, kind, row, new.row if row % max(1, new.row) == 0 else 0)


def _places(old: Sequence[Tensor], new: Sequence[Tensor], old_size: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the runs of which only the place is known; whole files when nothing is."""
    if not new or not old:
        whole = Tensor("", 0, size, None, 0)
        yield whole, replace(whole, length=old_size)
        return
    named = {tensor.name: tensor for tensor in old if tensor.kind is None}
    for tensor in new:
        if tensor.kind is None and tensor.name in named:
            yield tensor, named[tensor.name]


def _guess(new: Tensor, old: Tensor, base: memoryview, target: memoryview) -> list[Pair]:
    """Cut a run into chunks and find for each the kind of its elements and its distance in the old file."""
    pairs: list[Pair] = []
    shifts = sorted({0, old.length - new.length}, key=abs)
    for at in range(0, new.length - 3, CHUNK):
        size = min(CHUNK, new.length - at) & ~3
        best, cost = None, _GOOD
        for shift in shifts:
            begin = old.offset + at + shift
            if begin < old.offset or begin + size > old.offset + old.length:
                continue
            for kind in _TRIED:
                pair = Pair(new.offset + at, begin, size, kind, _UNKNOWN_ROW)
                share = sampled_cost(pair, base, target)
                if share < cost:
                    best, cost = pair, share
        if best is None:
            continue
        last = pairs[-1] if pairs else None
        if last and _follows(last, best):
            pairs[-1] = replace(last, length=last.length + best.length)
        else:
            pairs.append(best)
    return pairs


def _follows(last: Pair, pair: Pair) -> bool:
    return (
        last.kind is pair.kind
        and last.offset + last.length == pair.offset
        and last.old_offset + last.length == pair.old_offset
    )


def sampled_cost(pair: Pair, base: memoryview, target: memoryview) -> float:
    """Return the share of a pair's bytes that coding needs, estimated on a sample from its middle."""
    size = min(pair.length, _SAMPLE) // elements.width(pair.kind) * elements.width(pair.kind)
    skip = (pair.length - size) // 2 // elements.width(pair.kind) * elements.width(pair.kind)
    if not size:
        return 1.0
    old = elements.to_ints(base[pair.old_offset + skip : pair.old_offset + skip + size], pair.kind)
    new = elements.to_ints(target[pair.offset + skip : pair.offset + skip + size], pair.kind)
    difference = elements.differences(old, new, pair.kind)
    symbols, _ = elements.to_symbols(difference, pair.kind)
    groups = np.zeros(symbols.size, np.int64)
    if pair.kind in FLOATS:
        groups = elements.features(old, pair.kind).astype(np.int64) >> (2 if pair.kind is Kind.FLOAT16 else 0)
    width = elements.symbol_count(pair.kind)
    counts = np.bincount(groups * width + symbols, minlength=256 * width).reshape(-1, width)
    row, symbol = np.nonzero(counts)
    used = counts[row, symbol].astype(np.float64)
    coded = -(used * np.log2(used / counts.sum(axis=1)[row])).sum()
    raw = float((counts.sum(axis=0) * elements.bit_counts(pair.kind)).sum())
    table = 6.0 * used.size  # what the sample has learnt by heart
    return float(coded + raw + table) / 8 / size
