"""Format 2 after the header: groups of segments, each group with its map, its literal sections and its coded tensors.

`docs/delta-format.md` describes every field. Nothing here trusts what it reads: each count, offset and length is
compared with its bound before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final

import numpy as np
import zstandard

from isthmus.delta import elements
from isthmus.delta.elements import Kind
from isthmus.delta.factors import KIND, MAX_NUMBERS
from isthmus.delta.fields import Reader, pack_numbers
from isthmus.delta.model import CONTEXTS, Model
from isthmus.delta.pieces import Piece, Segment, pack_segments, read_segments
from isthmus.delta.rans import MAX_LANES, U8, U32
from isthmus.errors import DeltaError

GROUP_HEADER: Final = struct.Struct("<QIIQQI")
MAX_MAP: Final = 1 << 24  # bytes
MAX_GROUP: Final = 1 << 28  # bytes of target that a group makes
MAX_SECTION: Final = 1 << 23  # bytes of literals in one zstd frame
MAX_DICTIONARY: Final = 1 << 23  # bytes of the old file that a section may refer to
_MAX_TABLES: Final = 1 << 10  # tables of all models of a group


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
    out += pack_segments(segments)
    return bytes(out)


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
    segments = read_segments(reader, segment_count, models, old_length, length)
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


def _check_factors(segments: Sequence[Segment], models: Sequence[Model], model: int) -> None:
    outlines = [segment.factors for segment in segments if segment.factors]
    if outlines and (model >= len(models) or models[model].kind is not KIND):
        raise DeltaError("the factors have no model")
    if sum(outline.numbers for outline in outlines) > MAX_NUMBERS:
        raise DeltaError(f"expected up to {MAX_NUMBERS} numbers in the factors of a group")


def read_states(data: bytes) -> U32:
    """Return the lanes' states."""
    return np.frombuffer(data, "<u4").astype(np.uint32)
