"""Makes the body of format 2: segments from pairs of tensors, models fitted to them, literals packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from isthmus.delta import elements, factors, fitting, model
from isthmus.delta.alignment import Pair, sampled_cost
from isthmus.delta.early import early_blocks
from isthmus.delta.elements import FLOATS, Kind
from isthmus.delta.factors import MAX_NUMBERS, Factors
from isthmus.delta.literals import Run, compress, pack_literals
from isthmus.delta.memory import keep_freed_memory
from isthmus.delta.model import Model, Numbers, Part
from isthmus.delta.pieces import MAX_EARLY, Piece, Segment
from isthmus.delta.rans import U8, U16, U32, Coded, Stream, encode
from isthmus.delta.rebuild import blocks
from isthmus.delta.scaling import find_scaled
from isthmus.delta.segments import GROUP_HEADER, MAX_GROUP, pack_map

_PART: Final = 1 << 25  # bytes: longer pairs and gaps are cut, so that a group can end between their parts
_LANE_SHARE: Final = 0.008  # of what is coded may go into the lanes
_LITTLE_LANE_SHARE: Final = 0.002  # does not matter
_LANES_PER_SYMBOL: Final = 18000.0  # and byte of the target: more hardly make it faster
_LANE_BITS: Final = 8.8  # that a lane costs
_MOST_LANES: Final = 14  # as a power of two
_STILL: Final = 0.1  # of the rows: so many that are still are left out
_UNALIKE: Final = 0.97  # a pair that costs this share of its size is no pair


@dataclass(slots=True)
class _Draft:
    segment: Segment
    kind: Kind
    contexts: U16  # of the elements in rows that are not still
    symbols: U8
    raw: U32

    @property
    def group(self) -> tuple[Kind, bool]:
        """What tensors must have in common to share a model: their kind, and whether raw bits follow their symbols."""
        return self.kind, bool(self.symbols.size) and bool(elements.bit_counts(self.kind)[self.symbols.max()])


def write_groups(pairs: Sequence[Pair], base: memoryview, target: memoryview) -> Iterator[bytes]:
    """Yield the body's groups."""
    keep_freed_memory()
    free = _complement([(pair.old_offset, pair.length) for pair in pairs], len(base))
    for group in _grouped(_runs(pairs, len(target))):
        yield _write_group(group, base, target, free)


def _runs(pairs: Sequence[Pair], size: int) -> Iterator[Pair | Run]:
    """Yield pairs and the gaps between them, none longer than `_PART`, in the order of the new file."""
    at = 0
    for pair in pairs:
        yield from _cut_gap(at, pair.offset)
        at = pair.offset + pair.length
        yield from _cut_pair(pair)
    yield from _cut_gap(at, size)


def _cut_gap(begin: int, end: int) -> Iterator[Run]:
    for at in range(begin, end, _PART):
        yield at, min(_PART, end - at)


def _cut_pair(pair: Pair) -> Iterator[Pair]:
    block = 2 * model.block_rows(pair.row) * pair.row * elements.width(pair.kind)
    size = max(1, _PART // block) * block
    for at in range(0, pair.length, size):
        length = min(size, pair.length - at)
        yield replace(pair, offset=pair.offset + at, old_offset=pair.old_offset + at, length=length)


def _grouped(runs: Iterator[Pair | Run]) -> Iterator[list[Pair | Run]]:
    group: list[Pair | Run] = []
    filled = 0
    for run in runs:
        size = run.length if isinstance(run, Pair) else run[1]
        if group and filled + size > MAX_GROUP:
            yield group
            group, filled = [], 0
        group.append(run)
        filled += size
    if group:
        yield group


def _complement(runs: Sequence[Run], size: int) -> list[Run]:
    """Return the runs of a file that none of `runs` covers."""
    left, at = [], 0
    for offset, length in sorted(runs):
        if offset > at:
            left.append((at, offset - at))
        at = max(at, offset + length)
    if at < size:
        left.append((at, size - at))
    return left


def _write_group(runs: Sequence[Pair | Run], base: memoryview, target: memoryview, free: Sequence[Run]) -> bytes:
    segments, drafts, literals = _drafted(runs, base, target)
    models, arrays = _fit(drafts, segments)
    stream = _code(arrays, sum(segment.length for segment in segments))
    sections, frames = pack_literals(literals, base, target, free)
    segments = _merged(segments)
    raw = pack_map(sections, models, segments, stream.halvings, max(0, len(models) - 1))
    packed = compress(raw, 19)
    length = sum(segment.length for segment in segments)
    lanes, words = stream.states.size, stream.words
    header = GROUP_HEADER.pack(length, len(packed), len(raw), sum(map(len, frames)), words.size, lanes)
    return b"".join((header, packed, *frames, stream.states.astype("<u4").tobytes(), words.astype("<u2").tobytes()))


def _drafted(
    runs: Sequence[Pair | Run], base: memoryview, target: memoryview
) -> tuple[list[Segment], dict[int, _Draft], list[Run]]:
    """Return segments without models, what is coded by the number of its segment, and the literals."""
    scaled = find_scaled((run for run in runs if isinstance(run, Pair)), base, target)
    made: dict[Pair | Run, _Draft | Segment | Run] = {}
    held: set[Pair] = set()  # sources: all of them must be early
    room = MAX_NUMBERS
    for run in sorted(runs, key=lambda run: run in scaled):  # sources first
        if not isinstance(run, Pair):
            made[run] = run
        elif (
            run in scaled
            and _may_be_early(made[scaled[run][0]])
            and (scaled[run][0] in held or sum(one.length for one in held) + run.length <= MAX_EARLY)
        ):
            held.add(scaled[run][0])
            made[run] = Segment(Piece.SCALED, run.length, scale=scaled[run][1])
        else:
            made[run] = draft = _draft(run, base, target, room)
            if isinstance(draft, _Draft) and draft.segment.factors:
                room -= draft.segment.factors.numbers
    segments: list[Segment] = []
    drafts: dict[int, _Draft] = {}
    literals: list[Run] = []
    tensors: dict[Pair | Run, int] = {}
    for place, run in enumerate(runs):
        part = made[run]
        if isinstance(part, _Draft):
            tensors[run] = len(drafts)
            drafts[place] = part
            segments.append(part.segment)
        elif isinstance(part, Segment):
            segments.append(part)
        else:
            literals.append(part)
            segments.append(Segment(Piece.LITERAL, part[1]))
    sources = {
        place: tensors[scaled[run][0]]
        for place, run in enumerate(runs)
        if isinstance(run, Pair) and segments[place].piece is Piece.SCALED
    }
    for place, source in sources.items():
        segments[place] = replace(segments[place], source=source)
    _choose_early(segments, drafts, set(sources.values()))
    return segments, drafts, literals


def _may_be_early(source: _Draft | Segment | Run) -> bool:
    return isinstance(source, _Draft) and not source.segment.numbers.still_rows


def _choose_early(segments: list[Segment], drafts: dict[int, _Draft], sources: set[int]) -> None:
    """Say of tensors that they are early: those that others are made of, and the shortest ones."""
    room = MAX_EARLY
    by_length = sorted(enumerate(drafts), key=lambda entry: (entry[0] not in sources, segments[entry[1]].length))
    for _, place in by_length:
        draft = drafts[place]
        room -= draft.segment.length
        if room < 0:
            return
        if draft.symbols.size <= model.BLOCK and not draft.segment.numbers.still_rows:
            segments[place] = draft.segment = replace(draft.segment, early=True)


def _draft(pair: Pair, base: memoryview, target: memoryview, room: int) -> _Draft | Segment | Run:
    old_bytes = base[pair.old_offset : pair.old_offset + pair.length]
    new_bytes = target[pair.offset : pair.offset + pair.length]
    if old_bytes == new_bytes:
        return Segment(Piece.COPY, pair.length, pair.old_offset)
    if sampled_cost(pair, base, target) > _UNALIKE:
        return pair.offset, pair.length
    old, new = elements.to_ints(old_bytes, pair.kind), elements.to_ints(new_bytes, pair.kind)
    lines = _lines(old, new, pair.row)
    if isinstance(lines, np.ndarray):
        old, new = (values.reshape(-1, pair.row)[lines].ravel() for values in (old, new))
    difference = elements.differences(old, new, pair.kind)
    best = _modelled(pair, old, difference, lines, None)
    candidates = fitting.fit_factors(old, new, pair.kind, pair.row, pair.channel)
    least = _entropy(best) if candidates else 0.0
    for found in candidates:
        if found.numbers <= room:
            draft = _modelled(pair, old, difference, lines, found)
            bits = _entropy(draft) + factors.bits(found)
            best, least = (draft, bits) if bits < least else (best, least)
    return best


def _lines(old: elements.Ints, new: elements.Ints, row: int) -> model.Lines:
    """Return the rows that are not still; all rows where few are."""
    rows = old.size // row
    if rows * row == old.size:
        moving = np.flatnonzero((old.reshape(rows, row) != new.reshape(rows, row)).any(axis=1))
        if rows - moving.size > _STILL * rows:
            return moving
    return slice(0, -(-old.size // row))


def _modelled(
    pair: Pair, old: elements.Ints, difference: elements.Differences, lines: model.Lines, found: Factors | None
) -> _Draft:
    part = Part(Numbers(factors=found), pair.row, old.size, lines)
    expected = model.predict(pair.kind, old, [part])
    left = fitting.residual(difference, expected, pair.kind)
    numbers = replace(fitting.fit_numbers(old, left, pair.kind, pair.row), factors=found)
    if isinstance(lines, np.ndarray):
        rows = np.full(elements.count(pair.kind, pair.length) // pair.row, model.STILL, np.int8)
        rows[lines] = numbers.rows if numbers.rows.size else 0
        numbers = replace(numbers, rows=rows)
    outlined = factors.outline(found) if found else None
    segment = Segment(Piece.TENSOR, pair.length, pair.old_offset, 0, pair.row, numbers, outlined)
    features = first_features(pair.kind)
    contexts = model.contexts(old, pair.kind, features, [replace(part, numbers=numbers)], expected.buckets)
    return _Draft(segment, pair.kind, contexts, *elements.to_symbols(left, pair.kind))


def _no_counts(kind: Kind) -> fitting.Counts:
    return np.zeros((model.CONTEXTS, elements.symbol_count(kind)), np.int64)


def _add_counts(counts: fitting.Counts, contexts: U16, symbols: U8) -> None:
    """Count symbols in their contexts."""
    first, last, width = int(contexts.min(initial=model.CONTEXTS - 1)), int(contexts.max(initial=0)), counts.shape[1]
    mine = _index(contexts, symbols, first, width)
    counts[first : last + 1] += np.bincount(mine, minlength=(last + 1 - first) * width).reshape(-1, width)


def _index(contexts: U16, symbols: U8, first: int, width: int) -> NDArray[np.int32]:
    index: NDArray[np.int32] = contexts.astype(np.int32)
    index -= first
    index *= width
    index += symbols
    return index


def _entropy(draft: _Draft) -> float:
    """Return the bits that a draft needs, about, with frequencies of its own."""
    width = elements.symbol_count(draft.kind)
    first = int(draft.contexts.min(initial=model.CONTEXTS - 1))
    counts = np.bincount(_index(draft.contexts, draft.symbols, first, width))
    used = np.flatnonzero(counts)
    here = counts[used].astype(np.float64)
    totals = np.bincount(used // width, weights=here)
    coded = (totals[totals > 0] * np.log2(totals[totals > 0])).sum() - (here * np.log2(here)).sum()
    return float(coded + (here * elements.bit_counts(draft.kind)[used % width]).sum())


def first_features(kind: Kind) -> factors.I16:
    """Return the features' numbers that a kind begins with."""
    if kind not in FLOATS:
        return np.zeros(256, np.int16)
    numbers: factors.I16 = np.round(-elements.exponents(kind) * fitting.FLOAT_STEPS).astype(np.int16)
    return numbers


def _fit(drafts: dict[int, _Draft], segments: list[Segment]) -> tuple[list[Model], list[Coded]]:
    """Fit models for the tensors of each kind, those with raw bits apart: to look for such bits takes time."""
    counts: dict[tuple[Kind, bool], fitting.Counts] = {}
    for draft in drafts.values():
        mine = counts.setdefault(draft.group, _no_counts(draft.kind))
        _add_counts(mine, draft.contexts, draft.symbols)
    groups = sorted(counts)
    models = [fitting.fit_model(group[0], counts[group], first_features(group[0])) for group in groups]
    arrays: list[Coded] = []
    made = [draft.segment.numbers.factors for draft in drafts.values() if draft.segment.numbers.factors]
    if made:
        models.append(_fit_factors(made, arrays))
    for place, draft in drafts.items():
        segments[place] = draft.segment = replace(draft.segment, model=groups.index(draft.group))
    coded = list(drafts.values())
    for block in early_blocks([draft.segment for draft in coded], [mine.kind for mine in models]):
        joined = [_coded(coded[number], models[coded[number].segment.model], slice(None)) for number in block]
        arrays.append(
            replace(
                joined[0],
                **{
                    name: np.concatenate([getattr(one, name) for one in joined])
                    for name in ("symbols", "contexts", "bits")
                },
            )
        )
    for draft in coded:
        if not draft.segment.early:
            arrays += _arrays(draft, models[draft.segment.model])
    return models, arrays


def _fit_factors(made: Sequence[Factors], arrays: list[Coded]) -> Model:
    """Fit the model of the factors' numbers, and append those to the arrays."""
    parts = list(factors.code(made))
    counts = _no_counts(factors.KIND)
    for contexts, symbols, _ in parts:
        _add_counts(counts, contexts, symbols)
    mine = fitting.fit_model(factors.KIND, counts, first_features(factors.KIND))
    for contexts, symbols, raw in parts:
        arrays.append(Coded(symbols, mine.groups.take(contexts), mine.frequencies, mine.bit_counts, raw))
    return mine


def _arrays(draft: _Draft, mine: Model) -> Iterator[Coded]:
    segment = draft.segment
    scale = elements.count(draft.kind, segment.length) / segment.length
    lines, begin = segment.numbers.rows, 0
    for first_row, at, size in blocks(draft.kind, segment):
        count = round((at + size) * scale) - round(at * scale)
        if segment.numbers.still_rows:
            mine_here = lines[first_row : first_row + count // segment.row]
            count = int(np.count_nonzero(mine_here != model.STILL)) * segment.row
        part = slice(begin, begin + count)
        begin += count
        yield _coded(draft, mine, part)


def _coded(draft: _Draft, mine: Model, part: slice) -> Coded:
    groups = mine.groups.take(draft.contexts[part])
    return Coded(draft.symbols[part], groups, mine.frequencies, mine.bit_counts, draft.raw[part])


def _code(arrays: Sequence[Coded], length: int) -> Stream:
    """Code arrays of a group of `length` bytes, with lanes that make decoding fast and cost little."""
    if not arrays:
        return Stream(np.zeros(0, np.uint32), np.zeros(0, np.uint16), [])
    bits = 0.0
    for coded in arrays:
        index = coded.contexts.astype(np.int32) * coded.frequencies.shape[1] + coded.symbols
        costs = 12 - np.log2(np.maximum(coded.frequencies, 1)).ravel()
        bits += float(costs[index].sum())
        if coded.bit_counts is not None:
            bits += float(coded.bit_counts[coded.symbols].sum())
    count = sum(coded.symbols.size for coded in arrays)
    fast = max(_LANES_PER_SYMBOL * count / length, _LITTLE_LANE_SHARE * bits / _LANE_BITS)
    wanted = min(_LANE_SHARE * bits / _LANE_BITS, fast)
    lanes = 1 << int(np.clip(round(np.log2(max(wanted, 1.0))), 0, _MOST_LANES))
    return encode(arrays, lanes)


def _merged(segments: Sequence[Segment]) -> list[Segment]:
    """Join copies and literals that follow one another."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last and last.piece is segment.piece is not Piece.TENSOR and _continues(last, segment):
            merged[-1] = replace(last, length=last.length + segment.length)
        else:
            merged.append(segment)
    return merged


def _continues(last: Segment, segment: Segment) -> bool:
    return segment.piece is Piece.LITERAL or last.old_offset + last.length == segment.old_offset
