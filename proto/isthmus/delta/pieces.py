"""The segments of a group: where the bytes of the new file come from, in their order.

Nothing here trusts what it reads: each count, offset and length is compared with its bound before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import numpy as np

from isthmus.delta import elements
from isthmus.delta.elements import FLOATS, Kind
from isthmus.delta.factors import LEAST_SHIFT, MAX_RANK, MAX_SCALE, Outline
from isthmus.delta.fields import Reader, pack_numbers, pack_signed
from isthmus.delta.model import BLOCK, MAX_ROW, Model, Numbers
from isthmus.errors import DeltaError

MAX_EARLY: Final = 1 << 22  # bytes of the early tensors of a group: a decoder holds them until it is their turn
_ROWS, _COLUMNS, _EARLY = 1, 2, 4  # flags of a tensor
_MAX_NUMBER: Final = 1 << 12


class Piece(IntEnum):
    """Where the bytes of a segment come from."""

    COPY = 0
    LITERAL = 1
    TENSOR = 2
    SCALED = 3


_PIECES: Final = tuple(Piece)
_BASED: Final = (Piece.COPY, Piece.TENSOR)  # what refers to the base


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of the new file."""

    piece: Piece
    length: int  # bytes
    old_offset: int = 0
    model: int = 0  # number in the group's models
    row: int = 1  # elements
    numbers: Numbers = field(default_factory=Numbers)
    factors: Outline | None = None
    early: bool = False  # coded before what is not, with others of its model
    source: int = 0  # number of the early tensor, among the tensors of its group, whose new values are scaled
    scale: float = 1.0


def pack_segments(segments: Sequence[Segment]) -> bytes:
    """Return the segments' fields."""
    out = bytearray(segment.piece for segment in segments)
    out += pack_numbers(segment.length for segment in segments)
    out += pack_signed(_distances(segments))
    tensors = [segment for segment in segments if segment.piece is Piece.TENSOR]
    outlines = [segment.factors for segment in tensors]
    out += pack_numbers(segment.model for segment in tensors)
    out += pack_numbers(segment.row for segment in tensors)
    out += pack_signed(segment.numbers.base for segment in tensors)
    out += bytes(_flags(segment) for segment in tensors)
    out += bytes(outline.rank if outline else 0 for outline in outlines)
    out += pack_signed(outline.shift for outline in outlines if outline and outline.rank)
    out += pack_numbers(outline.width if outline else 0 for outline in outlines)
    out += pack_signed(outline.gain_shift for outline in outlines if outline and outline.width)
    out += b"".join(outline.scales.tobytes() for outline in outlines if outline)
    out += b"".join(segment.numbers.rows.tobytes() for segment in tensors)
    out += b"".join(segment.numbers.columns.tobytes() for segment in tensors)
    scaled = [segment for segment in segments if segment.piece is Piece.SCALED]
    out += pack_numbers(segment.source for segment in scaled)
    out += np.array([segment.scale for segment in scaled], "<f4").tobytes()
    return bytes(out)


def _distances(segments: Sequence[Segment]) -> Iterator[int]:
    """Yield how far from the end of the last one each run of the base begins."""
    end = 0
    for segment in segments:
        if segment.piece in _BASED:
            yield segment.old_offset - end
            end = segment.old_offset + segment.length


def _flags(segment: Segment) -> int:
    numbers = segment.numbers
    return bool(numbers.rows.size) * _ROWS | bool(numbers.columns.size) * _COLUMNS | segment.early * _EARLY


def read_segments(reader: Reader, count: int, models: Sequence[Model], old_length: int, length: int) -> list[Segment]:
    """Read the segments of a group of `length` bytes.

    Raises:
        DeltaError: A field is out of its bounds.
    """
    numbers = reader.array(np.uint8, count).tolist()
    if max(numbers, default=0) > max(Piece):
        raise DeltaError("a segment is of no known kind")
    pieces = [_PIECES[number] for number in numbers]
    lengths = reader.numbers(count)
    if 0 in lengths or sum(lengths) != length:
        raise DeltaError(f"expected segments of {length} bytes, got {sum(lengths)}")
    distances = iter(reader.signed(sum(pieces.count(piece) for piece in _BASED)))
    end, plain = 0, []
    for piece, size in zip(pieces, lengths, strict=True):
        begin = 0
        if piece in _BASED:
            begin = end + next(distances)
            end = begin + size
            if not 0 <= begin <= end <= old_length:
                raise DeltaError("a segment refers to bytes outside of the base")
        plain.append(Segment(piece, size, begin))
    tensors = _tensors(reader, [segment for segment in plain if segment.piece is Piece.TENSOR], models)
    _check_early(tensors, models)
    scaled = _scaled(reader, [segment for segment in plain if segment.piece is Piece.SCALED], tensors, models)
    made = {Piece.TENSOR: iter(tensors), Piece.SCALED: iter(scaled)}
    return [next(made[segment.piece]) if segment.piece in made else segment for segment in plain]


def _check_early(tensors: Sequence[Segment], models: Sequence[Model]) -> None:
    early = [segment for segment in tensors if segment.early]
    largest = max((elements.count(models[segment.model].kind, segment.length) for segment in early), default=0)
    if sum(segment.length for segment in early) > MAX_EARLY or largest > BLOCK:
        raise DeltaError(f"expected up to {MAX_EARLY} bytes of early tensors in a group")
    if any(segment.numbers.still_rows for segment in early):
        raise DeltaError("an early tensor has still rows")


def _scaled(
    reader: Reader, plain: Sequence[Segment], tensors: Sequence[Segment], models: Sequence[Model]
) -> list[Segment]:
    sources, made = reader.numbers(len(plain)), []
    read = reader.array("<f4", len(plain))
    if not np.isfinite(read).all():
        raise DeltaError("the scale of a scaled tensor is not finite")
    scales = read.tolist()
    for segment, number, scale in zip(plain, sources, scales, strict=True):
        source = tensors[number] if number < len(tensors) else None
        if source is None or not source.early or source.length != segment.length:
            raise DeltaError("a scaled tensor has no source")
        if models[source.model].kind is not Kind.FLOAT32:
            raise DeltaError("the source of a scaled tensor is of another kind")
        made.append(Segment(Piece.SCALED, segment.length, source=number, scale=scale))
    return made


def _tensors(reader: Reader, plain: Sequence[Segment], models: Sequence[Model]) -> list[Segment]:
    count = len(plain)
    chosen, widths, bases = reader.numbers(count), reader.numbers(count), reader.signed(count)
    sizes = [
        _elements(segment.length, model, row, base, models)
        for segment, model, row, base in zip(plain, chosen, widths, bases, strict=True)
    ]
    rows = [-(-size // row) for size, row in zip(sizes, widths, strict=True)]
    flags = reader.array(np.uint8, count).tolist()
    ranks = reader.array(np.uint8, count).tolist()
    if max(flags, default=0) > _ROWS | _COLUMNS | _EARLY or max(ranks, default=0) > MAX_RANK:
        raise DeltaError("a tensor has unknown numbers, or too many factors")
    shifts = reader.signed(count - ranks.count(0))
    channels = reader.numbers(count)
    gain_shifts = reader.signed(count - channels.count(0))
    if max(map(abs, shifts), default=0) > _MAX_NUMBER or not all(LEAST_SHIFT <= one <= 0 for one in gain_shifts):
        raise DeltaError("the factors of a tensor are out of scale")
    ahead, gains_ahead = iter(shifts), iter(gain_shifts)
    scales = [
        reader.array(np.uint8, 2 * rank + bool(width)).astype(np.uint8)
        for rank, width in zip(ranks, channels, strict=True)
    ]
    if max((int(scale.max(initial=0)) for scale in scales), default=0) > MAX_SCALE:
        raise DeltaError("the numbers of a factor are out of scale")
    lines = [
        reader.array(np.int8, size if flag & _ROWS else 0).astype(np.int8)
        for size, flag in zip(rows, flags, strict=True)
    ]
    columns = [
        reader.array(np.int8, row if flag & _COLUMNS else 0).astype(np.int8)
        for row, flag in zip(widths, flags, strict=True)
    ]
    made = []
    for number, segment in enumerate(plain):
        numbers = Numbers(bases[number], lines[number], columns[number])
        scale, still = scales[number], numbers.still_rows
        if (scale.size or still) and rows[number] * widths[number] != sizes[number]:
            raise DeltaError("a tensor with factors or still rows is not made of whole rows")
        width = channels[number]
        if width and (models[chosen[number]].kind not in FLOATS or widths[number] % width):
            raise DeltaError("the rows of a tensor with gains are not made of channels, or hold no floats")
        shift, gain_shift = (next(ahead) if ranks[number] else 0), (next(gains_ahead) if width else 0)
        shape = rows[number] - still, widths[number]
        outline = Outline(shift, scale, *shape, width, gain_shift) if scale.size else None
        place = Piece.TENSOR, segment.length, segment.old_offset
        early = bool(flags[number] & _EARLY)
        made.append(Segment(*place, chosen[number], widths[number], numbers, outline, early))
    return made


def _elements(length: int, model: int, row: int, base: int, models: Sequence[Model]) -> int:
    """Return how many elements a tensor has."""
    if model >= len(models) or not 0 < row <= MAX_ROW or abs(base) > _MAX_NUMBER:
        raise DeltaError("a tensor has no model, or rows that are too long")
    kind = models[model].kind
    if length % elements.width(kind):
        raise DeltaError("a tensor is not made of whole elements")
    return elements.count(kind, length)
