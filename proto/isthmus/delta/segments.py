"""Format 2 after the header: groups of segments, each group with its map, its literal sections and its coded tensors.

`docs/delta-format.md` describes every field. Nothing here trusts what it reads: each count, offset and length is
compared with its bound before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import BinaryIO, Final

import numpy as np
import zstandard
from numpy.typing import DTypeLike, NDArray

from isthmus.delta import elements
from isthmus.delta.elements import Kind
from isthmus.delta.model import CONTEXTS, I16, MAX_RANK, MAX_ROW, Factors, Model, Numbers
from isthmus.delta.rans import MAX_LANES, U8, U32
from isthmus.errors import DeltaError

GROUP_HEADER: Final = struct.Struct("<QIIQQI")
MAX_MAP: Final = 1 << 24  # bytes
MAX_GROUP: Final = 1 << 28  # bytes of target that a group makes
MAX_SECTION: Final = 1 << 23  # bytes of literals in one zstd frame
MAX_DICTIONARY: Final = 1 << 23  # bytes of the old file that a section may refer to
_MAX_TABLES: Final = 1 << 10  # tables of all models of a group


class Piece(IntEnum):
    """Where the bytes of a segment come from."""

    COPY = 0
    LITERAL = 1
    TENSOR = 2


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of the new file."""

    piece: Piece
    length: int  # bytes
    old_offset: int = 0
    model: int = 0  # number in the group's models
    row: int = 1  # elements
    numbers: Numbers = field(default_factory=Numbers)


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

    @property
    def payload(self) -> int:
        """Bytes that follow the map."""
        return sum(section.packed for section in self.sections) + 4 * self.lanes + 2 * self.words


def pack_map(sections: Sequence[Section], models: Sequence[Model], segments: Sequence[Segment]) -> bytes:
    """Return the map's bytes."""
    out = bytearray(struct.pack("<HHI", len(sections), len(models), len(segments)))
    for section in sections:
        out += struct.pack("<IIH", section.length, section.packed, len(section.dictionary))
        for offset, length in section.dictionary:
            out += struct.pack("<QI", offset, length)
    for model in models:
        rows, symbols = model.frequencies.shape
        out += struct.pack("<BBBB", model.kind, rows, symbols, model.raw)
        out += model.feature_numbers.astype("<i2").tobytes() + model.groups.tobytes()
        out += model.frequencies.astype("<u2").tobytes()
    numbers = bytearray()
    for segment in segments:
        out += struct.pack("<BQ", segment.piece, segment.length)
        if segment.piece is not Piece.LITERAL:
            out += struct.pack("<Q", segment.old_offset)
        if segment.piece is Piece.TENSOR:
            mine = segment.numbers
            flags = bool(mine.rows.size) | bool(mine.columns.size) << 1
            rank = mine.factors.left.shape[1] if mine.factors else 0
            shift = mine.factors.shift if mine.factors else 0
            out += struct.pack("<HIhBBh", segment.model, segment.row, mine.base, flags, rank, shift)
            numbers += mine.rows.tobytes() + mine.columns.tobytes()
            if mine.factors:
                numbers += pack_factors(mine.factors)
    return bytes(out + numbers)


def pack_factors(factors: Factors) -> bytes:
    """Return the factors' bytes: for each factor all low bytes, then all high ones, one rank after the other."""
    planes = [
        np.ascontiguousarray(part.T, "<i2").view(np.uint8).reshape(-1, 2).T.tobytes()
        for part in (factors.left, factors.right)
    ]
    return b"".join(planes)


class _Reader:
    """Reads fields from the map's bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def fields(self, layout: str) -> tuple[int, ...]:
        size = struct.calcsize(layout)
        return struct.unpack(layout, self._take(size))

    def array(self, dtype: DTypeLike, count: int) -> NDArray[np.generic]:
        return np.frombuffer(self._take(np.dtype(dtype).itemsize * count), dtype)

    def end(self) -> None:
        if self._at != len(self._data):
            raise DeltaError("the map of a group goes on after its last field")

    def _take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) != size:
            raise DeltaError("the map of a group ends too early")
        self._at += size
        return taken


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
    reader = _Reader(_unpack(file.read(packed), packed, raw))
    section_count, model_count, segment_count = reader.fields("<HHI")
    sections = [_section(reader, old_length) for _ in range(section_count)]
    models = _models(reader, model_count)
    segments = _segments(reader, segment_count, models, old_length, length)
    reader.end()
    literal = sum(segment.length for segment in segments if segment.piece is Piece.LITERAL)
    if literal != sum(section.length for section in sections):
        raise DeltaError("the literal sections are not as long as the segments that need them")
    if lanes == 0 and any(segment.piece is Piece.TENSOR for segment in segments):
        raise DeltaError("expected lanes for the tensors, got none")
    return Group(length, sections, models, segments, lanes, words)


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


def _section(reader: _Reader, old_length: int) -> Section:
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


def _models(reader: _Reader, count: int) -> list[Model]:
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


def _segments(reader: _Reader, count: int, models: Sequence[Model], old_length: int, length: int) -> list[Segment]:
    plain: list[tuple[Segment, int, int, int, int]] = []
    made = 0
    for _ in range(count):
        piece, size = reader.fields("<BQ")
        if piece not in set(Piece) or not 0 < size <= length - made:
            raise DeltaError("a segment is of no known kind, or longer than its group")
        made += size
        old_offset = 0
        if piece != Piece.LITERAL:
            (old_offset,) = reader.fields("<Q")
            if old_offset + size > old_length:
                raise DeltaError("a segment refers to bytes outside of the base")
        segment = Segment(Piece(piece), size, old_offset)
        plain.append(_tensor(reader, segment, models) if piece == Piece.TENSOR else (segment, 0, 0, 0, 0))
    if made != length:
        raise DeltaError(f"expected segments of {length} bytes, got {made}")
    return [_with_numbers(reader, *entry) for entry in plain]


def _tensor(reader: _Reader, segment: Segment, models: Sequence[Model]) -> tuple[Segment, int, int, int, int]:
    model, row, base, flags, rank, shift = reader.fields("<HIhBBh")
    if model >= len(models) or not 0 < row <= MAX_ROW or flags > 3 or rank > MAX_RANK:
        raise DeltaError("a tensor has no model, or rows that are too long")
    kind = models[model].kind
    if segment.length % elements.width(kind):
        raise DeltaError("a tensor is not made of whole elements")
    rows = -(-elements.count(kind, segment.length) // row)
    if rank and rows * row != elements.count(kind, segment.length):
        raise DeltaError("a tensor with factors is not made of whole rows")
    made = Segment(segment.piece, segment.length, segment.old_offset, model, row, Numbers(base))
    return made, rows if flags & 1 or rank else 0, flags, rank, shift


def _with_numbers(reader: _Reader, segment: Segment, rows: int, flags: int, rank: int, shift: int) -> Segment:
    if segment.piece is not Piece.TENSOR:
        return segment
    lines = reader.array(np.int8, rows if flags & 1 else 0).astype(np.int8)
    columns = reader.array(np.int8, segment.row if flags & 2 else 0).astype(np.int8)
    factors = None
    if rank:
        factors = Factors(_factor(reader, rows, rank), _factor(reader, segment.row, rank), shift)
    return replace(segment, numbers=Numbers(segment.numbers.base, lines, columns, factors))


def _factor(reader: _Reader, size: int, rank: int) -> I16:
    planes = reader.array(np.uint8, 2 * size * rank).reshape(2, -1)
    values: I16 = planes.T.copy().view("<i2").astype(np.int16).reshape(rank, size).T
    return values


def read_states(data: bytes) -> U32:
    """Return the lanes' states."""
    return np.frombuffer(data, "<u4").astype(np.uint32)
