"""Decodes many tensors together: decoding pays for every call, and small tensors would be little else.

Early tensors come before all others of their group, those of a model side by side in blocks. They are held until it is
their turn in the new file, so their bytes are bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from isthmus.delta import elements, model
from isthmus.delta.elements import Kind
from isthmus.delta.model import Model, Part
from isthmus.delta.pieces import Segment
from isthmus.delta.rans import Decoder
from isthmus.errors import DeltaError


def read_exactly(file: BinaryIO, size: int) -> bytes:
    """Return the next bytes of a file.

    Raises:
        DeltaError: There are fewer.
    """
    data = file.read(size)
    if len(data) != size:
        raise DeltaError("the delta or its base ends too early")
    return data


def early_blocks(tensors: Sequence[Segment], kinds: Sequence[Kind]) -> Iterator[list[int]]:
    """Yield the numbers of the early tensors that are decoded together; `kinds` are those of the models."""
    by_model: dict[int, list[int]] = {}
    for place, segment in enumerate(tensors):
        if segment.early:
            by_model.setdefault(segment.model, []).append(place)
    for number in sorted(by_model):
        block: list[int] = []
        filled = 0
        for place in by_model[number]:
            size = elements.count(kinds[number], tensors[place].length)
            if block and filled + size > model.BLOCK:
                yield block
                block, filled = [], 0
            block.append(place)
            filled += size
        yield block


def decode_early(
    base: BinaryIO, tensors: Sequence[Segment], models: Sequence[Model], decoder: Decoder
) -> dict[int, bytes]:
    """Return the new bytes of the early tensors by their numbers.

    Raises:
        DeltaError: The base or the coded tensors end too early.
    """
    found: dict[int, bytes] = {}
    for block in early_blocks(tensors, [mine.kind for mine in models]):
        chosen = [tensors[number] for number in block]
        mine = models[chosen[0].model]
        old = elements.to_ints(b"".join(_old(base, segment) for segment in chosen), mine.kind)
        new = elements.to_bytes(moved(old, [_part(segment, mine.kind) for segment in chosen], mine, decoder), mine.kind)
        at = 0
        for number, segment in zip(block, chosen, strict=True):
            found[number] = new[at : at + segment.length]
            at += segment.length
    return found


def _part(segment: Segment, kind: Kind) -> Part:
    size = elements.count(kind, segment.length)
    return Part(segment.numbers, segment.row, size, slice(0, -(-size // segment.row)))


def _old(base: BinaryIO, segment: Segment) -> bytes:
    base.seek(segment.old_offset)
    return read_exactly(base, segment.length)


def moved(old: elements.Ints, parts: Sequence[Part], mine: Model, decoder: Decoder) -> elements.Ints:
    """Return the new elements of a block.

    Raises:
        DeltaError: The coded tensors end too early.
    """
    expected = model.predict(mine.kind, old, parts)
    contexts = model.contexts(old, mine.kind, mine.feature_numbers, parts, expected.buckets)
    symbols, raw = decoder.decode(mine.slots.take(contexts, mode="clip"), mine.table, mine.bit_counts)
    return elements.move(old, symbols, raw, mine.kind, expected.moves, expected.flips)


def scaled(source: bytes, scale: float) -> bytes:
    """Return single precision numbers multiplied by another."""
    with np.errstate(all="ignore"):
        product = np.frombuffer(source, "<f4") * np.float32(scale)
    return product.astype("<f4").tobytes()
