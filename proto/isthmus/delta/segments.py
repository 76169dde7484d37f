"""Format 2 after the header: groups of segments, each group with its map, its literal sections and its coded tensors.

`docs/delta-format.md` describes every field. Nothing here trusts what it reads: each count, offset and length is
compared with its bound before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import BinaryIO, Final

import numpy as np
import zstandard

from isthmus.delta import elements
from isthmus.delta.elements import FLOATS, Kind
from isthmus.delta.factors import KIND, LEAST_SHIFT, MAX_NUMBERS, MAX_RANK, MAX_SCALE, Outline
from isthmus.delta.fields import Reader, pack_numbers, pack_signed
from isthmus.delta.model import BLOCK, CONTEXTS, MAX_ROW, Model, Numbers
from isthmus.delta.rans import MAX_LANES, U8, U32
from isthmus.errors import DeltaError

GROUP_HEADER: Final = struct.Struct("<QIIQQI")
MAX_MAP: Final = 1 << 24  # bytes
MAX_GROUP: Final = 1 << 28  # bytes of target that a group makes
MAX_SECTION: Final = 1 << 23  # bytes of literals in one zstd frame
MAX_DICTIONARY: Final = 1 << 23  # bytes of the old file that a section may refer to
_MAX_TABLES: Final = 1 << 10  # tables of all models of a group
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


@dataclass(frozen=True, slots=True)
class Section:
    """Literal bytes, compressed together."""

    length: int
    packed: int  # bytes of the zstd frame
    dictionary: tuple[tuple[int, int], ...]  # runs (offset, length) of the old file that the frame refers to


@dataclass(frozen=True, slots=True)
class Group:
    """What one group of a delta says, without its payload."""

    length: int  # bytes of the new file
    sections: Sequence[Section]
    models: Sequence[Model]
    segments: Sequence[Segment]
    lanes: int
    words: int
    halvings: Sequence[int]  # coded elements before each halving of the lanes
    factor_model: int  # the model of the factors' numbers

    @property
    def payload(self) -> int:
        """Bytes that follow the map."""
        return sum(section.packed for section in self.sections) + 4 * self.lanes + 2 * self.words


def pack_map(
    sections: Sequence[Section],
    models: Sequence[Model],
    segments: Sequence[Segment],
    halvings: Sequence[int],
    factor_model: int,
) -> bytes:
    """Return the map's bytes."""
    out = bytearray(struct.pack("<HHIB", len(sections), len(models), len(segments), len(halvings)))
    out += pack_numbers((*halvings, factor_model))
    for section in sections:
        out += struct.pack("<IIH", section.length, section.packed, len(section.dictionary))
        for offset, length in section.dictionary:
            out += struct.pack("<QI", offset, length)
    for model in models:
        rows, symbols = model.frequencies.shape
        out += struct.pack("<BBBB", model.kind, rows, symbols, model.raw)
        out += model.feature_numbers.astype("<i2").tobytes() + model.groups.tobytes()
        out += model.frequencies.astype("<u2").tobytes()
    out += bytes(segment.piece for segment in segments)
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


def read_group(file: BinaryIO, *, left: int, old_length: int) -> Group:
    """Read a group's header and map at the file's position.

    Args:
        file: The delta.
        left: Bytes of the target that are still to be made.
        old_length: Bytes of the base.

    Raises:
        DeltaError: A field is out of its bounds.
    """
    header = file.read(GROUP_HEADER.size)
    if len(header) != GROUP_HEADER.size:
        raise DeltaError("the delta ends before the target is complete")
    length, packed, raw, _, words, lanes = GROUP_HEADER.unpack(header)
    if not 0 < length <= min(left, MAX_GROUP) or max(packed, raw) > MAX_MAP:
        raise DeltaError(f"expected a group of 1 to {min(left, MAX_GROUP)} bytes with a map up to {MAX_MAP}")
    if not 0 <= lanes <= MAX_LANES or words > 4 * MAX_GROUP:
        raise DeltaError(f"expected up to {MAX_LANES} lanes, got {lanes}")
    reader = Reader(_unpack(file.read(packed), packed, raw))
    section_count, model_count, segment_count, halving_count = reader.fields("<HHIB")
    *halvings, factor_model = reader.numbers(halving_count + 1)
    sections = [_section(reader, old_length) for _ in range(section_count)]
    models = _models(reader, model_count)
    segments = _segments(reader, segment_count, models, old_length, length)
    reader.end()
    _check_factors(segments, models, factor_model)
    literal = sum(segment.length for segment in segments if segment.piece is Piece.LITERAL)
    if literal != sum(section.length for section in sections):
        raise DeltaError("the literal sections are not as long as the segments that need them")
    if halving_count > lanes.bit_length() or halvings != sorted(halvings):
        raise DeltaError("the lanes are halved too often, or out of order")
    if lanes == 0 and any(segment.piece is Piece.TENSOR for segment in segments):
        raise DeltaError("expected lanes for the tensors, got none")
    return Group(length, sections, models, segments, lanes, words, halvings, factor_model)


def _unpack(data: bytes, packed: int, raw: int) -> bytes:
    if len(data) != packed:
        raise DeltaError("the delta ends within a map")
    return decompress(data, raw)


def decompress(frame: bytes, length: int, dictionary: bytes = b"") -> bytes:
    """Decompress a frame that announces exactly `length` bytes.

    Raises:
        DeltaError: The frame announces or holds anything else.
    """
    try:
        if zstandard.frame_content_size(frame) != length:
            raise DeltaError(f"expected a frame of {length} bytes")
        known = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        decompressor = zstandard.ZstdDecompressor(dict_data=known if dictionary else None)
        data = decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DeltaError(f"a compressed frame is damaged ({error})") from error
    if len(data) != length:
        raise DeltaError(f"expected a frame of {length} bytes, got {len(data)}")
    return data


def _section(reader: Reader, old_length: int) -> Section:
    length, packed, runs = reader.fields("<IIH")
    dictionary = []
    for _ in range(runs):
        offset, size = reader.fields("<QI")
        if offset + size > old_length:
            raise DeltaError("a section refers to bytes outside of the base")
        dictionary.append((offset, size))
    total = sum(size for _, size in dictionary)
    if not 0 < length <= MAX_SECTION or not 0 < packed <= 2 * MAX_SECTION or total > MAX_DICTIONARY:
        raise DeltaError(f"expected a section of up to {MAX_SECTION} bytes, got {length} with {total} referred to")
    return Section(length, packed, tuple(dictionary))


def _models(reader: Reader, count: int) -> list[Model]:
    models: list[Model] = []
    for _ in range(count):
        kind, rows, symbols, raw = reader.fields("<BBBB")
        if kind not in set(Kind) or not rows:
            raise DeltaError("a model has an unknown kind or no contexts")
        if not 0 < symbols <= elements.symbol_count(Kind(kind)) or raw > 1:
            raise DeltaError("a model has too many symbols")
        features = reader.array("<i2", 256).astype(np.int16)
        groups: U8 = reader.array(np.uint8, CONTEXTS).astype(np.uint8)
        frequencies = reader.array("<u2", rows * symbols).astype(np.uint16).reshape(rows, symbols)
        if int(groups.max()) >= rows:
            raise DeltaError("a context has no frequencies")
        models.append(Model(Kind(kind), features, groups, frequencies, bool(raw)))
        if sum(model.frequencies.shape[0] for model in models) > _MAX_TABLES:
            raise DeltaError(f"expected up to {_MAX_TABLES} frequency tables in a group")
    return models


def _segments(reader: Reader, count: int, models: Sequence[Model], old_length: int, length: int) -> list[Segment]:
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
    scales = reader.array("<f4", len(plain)).tolist()
    for segment, number, scale in zip(plain, sources, scales, strict=True):
        source = tensors[number] if number < len(tensors) else None
        if source is None or not source.early or source.length != segment.length:
            raise DeltaError("a scaled tensor has no source")
        if models[source.model].kind is not Kind.FLOAT32:
            raise DeltaError("the source of a scaled tensor is of another kind")
        made.append(Segment(Piece.SCALED, segment.length, source=number, scale=scale))
    return made


def _check_factors(segments: Sequence[Segment], models: Sequence[Model], model: int) -> None:
    outlines = [segment.factors for segment in segments if segment.factors]
    if outlines and (model >= len(models) or models[model].kind is not KIND):
        raise DeltaError("the factors have no model")
    if sum(outline.numbers for outline in outlines) > MAX_NUMBERS:
        raise DeltaError(f"expected up to {MAX_NUMBERS} numbers in the factors of a group")


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


def read_states(data: bytes) -> U32:
    """Return the lanes' states."""
    return np.frombuffer(data, "<u4").astype(np.uint32)
