"""Rebuilds a file from format 2, one bounded block at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from isthmus.delta import elements, model
from isthmus.delta.container import Header, Method
from isthmus.delta.early import decode_early, moved, read_exactly, scaled
from isthmus.delta.elements import Kind
from isthmus.delta.factors import read
from isthmus.delta.memory import keep_freed_memory
from isthmus.delta.model import Model, Part
from isthmus.delta.pieces import Piece, Segment
from isthmus.delta.rans import U16, Decoder
from isthmus.delta.segments import Group, Section, decompress, read_group, read_states
from isthmus.digests import CHUNK
from isthmus.errors import DeltaError


def rebuild_groups(file: BinaryIO, old: Path, *, length: int, old_length: int) -> Iterator[bytes]:
    """Yield the bytes of the target; `file` is at the first group.

    Raises:
        DeltaError: The delta is malformed.
    """
    left = length
    keep_freed_memory()
    with old.open("rb") as base:
        while left:
            group = read_group(file, left=left, old_length=old_length)
            left -= group.length
            yield from _rebuild_group(file, base, group)
    if file.read(1):
        raise DeltaError("the delta goes on after the target is complete")


def describe(file: BinaryIO, header: Header) -> list[dict[str, int | float | str]]:
    """Return what the target is made of, and what the delta's bytes are; `file` is behind the header.

    Raises:
        DeltaError: The delta is malformed.
    """
    if header.method is not Method.SEGMENTS:
        return []
    found: Counter[str] = Counter()
    segments: Counter[str] = Counter()
    packed: Counter[str] = Counter()
    left = header.target_length
    while left:
        at = file.tell()
        group = read_group(file, left=left, old_length=header.base_length)
        left -= group.length
        for segment in group.segments:
            tensor = segment.piece is Piece.TENSOR
            name = group.models[segment.model].kind.name.lower() if tensor else segment.piece.name.lower()
            found[name] += segment.length
            segments[name] += 1
        packed["map"] += file.tell() - at
        packed["literal"] += sum(section.packed for section in group.sections)
        packed["coded tensors"] += 4 * group.lanes + 2 * group.words
        file.seek(group.payload, os.SEEK_CUR)
    names = dict.fromkeys((*found, *packed))
    return [
        {
            "part": name,
            "segments": segments[name],
            "target_bytes": found[name],
            "target_share": round(found[name] / header.target_length, 4),
            "delta_bytes": packed[name],
        }
        for name in names
    ]


def _rebuild_group(file: BinaryIO, base: BinaryIO, group: Group) -> Iterator[bytes]:
    begin = file.tell()
    literals = _Literals(file, base, group.sections, begin)
    coded = begin + sum(section.packed for section in group.sections)
    file.seek(coded)
    states = read_exactly(file, 4 * group.lanes)
    words = _Words(file, coded + 4 * group.lanes, group.words)
    decoder = Decoder(read_states(states), words.take, group.halvings)
    tensors = _with_factors(group, decoder)
    early = decode_early(base, tensors, group.models, decoder)
    waiting = iter(enumerate(tensors))
    for segment in group.segments:
        if segment.piece is Piece.LITERAL:
            yield from literals.take(segment.length)
        elif segment.piece is Piece.COPY:
            base.seek(segment.old_offset)
            for at in range(0, segment.length, CHUNK):
                yield read_exactly(base, min(CHUNK, segment.length - at))
        elif segment.piece is Piece.SCALED:
            yield scaled(early[segment.source], segment.scale)
        else:
            number, tensor = next(waiting)
            if tensor.early:
                yield early[number]
            else:
                yield from _tensor(base, tensor, group.models[tensor.model], decoder)
    decoder.finish()
    file.seek(begin + group.payload)


def _with_factors(group: Group, decoder: Decoder) -> list[Segment]:
    """Return the tensors of a group, with the numbers of their factors."""
    tensors = [segment for segment in group.segments if segment.piece is Piece.TENSOR]
    outlines = [segment.factors for segment in tensors if segment.factors]
    if not outlines:
        return tensors
    mine = group.models[group.factor_model]
    made = read(outlines, lambda part: decoder.decode(mine.slots.take(part, mode="clip"), mine.table, mine.bit_counts))
    return [
        replace(segment, numbers=replace(segment.numbers, factors=next(made))) if segment.factors else segment
        for segment in tensors
    ]


@dataclass(slots=True)
class _Words:
    file: BinaryIO
    at: int
    left: int

    def take(self, count: int) -> U16:
        self.file.seek(self.at)
        count = min(count, self.left)
        data = read_exactly(self.file, 2 * count)
        self.at += 2 * count
        self.left -= count
        return np.frombuffer(data, "<u2").astype(np.uint16)


class _Literals:
    """Hands out the literal bytes, one section in memory."""

    def __init__(self, file: BinaryIO, base: BinaryIO, sections: Sequence[Section], at: int) -> None:
        self._file, self._base, self._sections, self._at = file, base, iter(sections), at
        self._data = memoryview(b"")

    def take(self, length: int) -> Iterator[bytes]:
        while length:
            if not self._data:
                self._next()
            yield bytes(self._data[:length])
            taken = min(length, len(self._data))
            self._data = self._data[taken:]
            length -= taken

    def _next(self) -> None:
        section = next(self._sections)
        self._file.seek(self._at)
        frame = read_exactly(self._file, section.packed)
        self._at += section.packed
        self._data = memoryview(decompress(frame, section.length, dictionary(self._base, section.dictionary)))


def dictionary(base: BinaryIO, runs: tuple[tuple[int, int], ...]) -> bytes:
    """Return the bytes of the old file that a section refers to."""
    parts = []
    for offset, size in runs:
        base.seek(offset)
        parts.append(read_exactly(base, size))
    return b"".join(parts)


def blocks(kind: Kind, segment: Segment) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, offset in bytes, length in bytes) of each block of a tensor."""
    rows = model.block_rows(segment.row)
    if kind is Kind.INT4 and segment.row % 2:
        rows += rows % 2  # a block is whole bytes
    size = rows * segment.row * elements.width(kind) // (2 if kind is Kind.INT4 else 1)
    for number, at in enumerate(range(0, segment.length, size)):
        yield number * rows, at, min(size, segment.length - at)


def _tensor(base: BinaryIO, segment: Segment, mine: Model, decoder: Decoder) -> Iterator[bytes]:
    lines = segment.numbers.rows
    before = 0  # rows before this block that are not still
    for first_row, at, size in blocks(mine.kind, segment):
        base.seek(segment.old_offset + at)
        old = elements.to_ints(read_exactly(base, size), mine.kind)
        rows = -(-old.size // segment.row)
        moving = np.flatnonzero(lines[first_row : first_row + rows] != model.STILL)
        if moving.size == rows or not lines.size:
            new = _moved(old, segment, mine, decoder, slice(first_row, first_row + rows), before)
            before += rows
        else:
            new = old.copy()
            square = new.reshape(rows, segment.row)
            part = square[moving]
            square[moving] = _moved(part.ravel(), segment, mine, decoder, moving + first_row, before).reshape(
                part.shape
            )
            before += moving.size
        yield elements.to_bytes(new, mine.kind)


def _moved(
    old: elements.Ints, segment: Segment, mine: Model, decoder: Decoder, lines: model.Lines, first: int
) -> elements.Ints:
    """Return the new elements of the rows `lines`, which begin with the row `first` of those that are not still."""
    return moved(old, [Part(segment.numbers, segment.row, old.size, lines, first)], mine, decoder)
