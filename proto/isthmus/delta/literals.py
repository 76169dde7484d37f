"""Packs what is no tensor: runs of the new file, compressed with what the old file has near them as dictionary."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final

import zstandard

from isthmus.delta.segments import MAX_DICTIONARY, MAX_SECTION, Section

_HARD: Final = 1 << 22  # bytes of literals that are compressed hard; more must not take minutes

Run = tuple[int, int]  # offset, bytes


def pack_literals(
    literals: Sequence[Run], base: memoryview, target: memoryview, free: Sequence[Run]
) -> tuple[list[Section], list[bytes]]:
    """Return the sections of literals and their frames; `free` is what tensors do not use of the old file."""
    sections, frames = [], []
    total = sum(length for _, length in literals)
    level = 19 if total <= _HARD else 9
    for runs in _sections(literals):
        data = b"".join(target[offset : offset + length] for offset, length in runs)
        middle = runs[len(runs) // 2][0] * len(base) // max(1, len(target))
        known = _nearest(free, middle)
        dictionary = b"".join(base[offset : offset + length] for offset, length in known)
        frame = compress(data, level, dictionary)
        sections.append(Section(len(data), len(frame), known))
        frames.append(frame)
    return sections, frames


def _sections(literals: Sequence[Run]) -> Iterator[list[Run]]:
    runs: list[Run] = []
    room = MAX_SECTION
    for offset, length in literals:
        while length:
            taken = min(length, room)
            runs.append((offset, taken))
            offset, length, room = offset + taken, length - taken, room - taken
            if not room:
                yield runs
                runs, room = [], MAX_SECTION
    if runs:
        yield runs


def _nearest(free: Sequence[Run], middle: int) -> tuple[Run, ...]:
    """Return the runs around a place of the old file, as many as a dictionary may hold."""
    chosen: list[Run] = []
    room = MAX_DICTIONARY
    right = bisect_left(free, (middle, 0))
    left = right - 1
    while room and len(chosen) < 4000 and (left >= 0 or right < len(free)):
        ahead = free[right][0] - middle if right < len(free) else 1 << 62
        behind = middle - sum(free[left]) if left >= 0 else 1 << 62
        if ahead < behind:
            offset, length = free[right]
            chosen.append((offset, min(length, room)))
            right += 1
        else:
            offset, length = free[left]
            begin = min(max(offset, middle - room // 2), offset + length - min(length, room))
            chosen.append((begin, min(length, room)))
            left -= 1
        room -= chosen[-1][1]
    return tuple(sorted(chosen))


def compress(data: bytes, level: int, dictionary: bytes = b"") -> bytes:
    """Return a frame, compressed with what is known."""
    window = max(10, min(26, (len(data) + len(dictionary)).bit_length()))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, source_size=len(data), window_log=window, write_content_size=True, enable_ldm=bool(dictionary)
    )
    known = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT) if dictionary else None
    return zstandard.ZstdCompressor(dict_data=known, compression_params=parameters).compress(data)
