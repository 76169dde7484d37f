"""Register tiles: how much of an output is computed at a time, with all of it in vector registers.

A tile is `rows` x `columns` positions (pixels, or rows of a matrix) times `vectors` vectors of `lanes` channels. Each
step of the reduction loads `vectors` weights, repeats `rows * columns` inputs over the lanes, and multiplies and adds
all pairs. The choice weighs the cycles of a step against what is computed beyond the edges of the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, gcd

from compiler.schedules.machine import Machine

_MOST_POSITIONS = 28
_MOST_VECTORS = 8
_L1_WAYS = 8
_L1_WAY_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Tile:
    """One register tile."""

    rows: int
    columns: int
    vectors: int
    lanes: int

    @property
    def channels(self) -> int:
        """Output channels of one tile."""
        return self.vectors * self.lanes


def choose_tile(rows: int, columns: int, channels: int, machine: Machine, *, stride: int = 1) -> Tile:
    """Return the cheapest tile for an output of `rows` x `columns` positions and `channels` channels.

    `stride` is how many float32 values lie between what two neighbouring positions read.
    """

    def rank(tile: Tile) -> tuple[float, int, int]:
        cost = _cost(tile, rows, columns, channels, machine) * _crowding(tile, stride)
        return cost, -tile.channels, -tile.columns

    return min(_candidates(rows, columns, channels, machine), key=rank)


def vector_lanes(channels: int, machine: Machine) -> int:
    """Return the widest vector that divides `channels`; 1 if not even four lanes do."""
    lanes = machine.lanes
    while lanes >= 4:
        if channels % lanes == 0:
            return lanes
        lanes //= 2
    return 1


def _candidates(rows: int, columns: int, channels: int, machine: Machine) -> Iterator[Tile]:
    spare = 1 if machine.broadcasts_from_memory else 2
    lanes = machine.lanes
    while lanes >= 4:
        for vectors in range(1, min(_MOST_VECTORS, ceil(channels / lanes)) + 1):
            for high, wide in _shapes(rows, columns):
                if high * wide * vectors + vectors + spare <= machine.registers:
                    yield Tile(high, wide, vectors, lanes)
        lanes //= 2


def _shapes(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    for wide in range(1, min(columns, _MOST_POSITIONS) + 1):
        yield 1, wide
    for high in range(2, min(rows, _MOST_POSITIONS // columns) + 1):  # whole rows only: narrow images
        yield high, columns


def _crowding(tile: Tile, stride: int) -> float:
    """Return how much slower the tile gets when its inputs fall into the same few sets of the first-level cache."""
    addresses = _L1_WAY_BYTES // gcd(4 * stride, _L1_WAY_BYTES)
    return 1.0 if tile.rows * tile.columns <= addresses * (_L1_WAYS - 1) else 1.3


def _cost(tile: Tile, rows: int, columns: int, channels: int, machine: Machine) -> float:
    positions = tile.rows * tile.columns
    products = positions * tile.vectors
    width = 1.0 if tile.lanes == 16 else 0.5  # cycles of one vector instruction
    repeats = 0 if machine.broadcasts_from_memory else positions
    step = max(
        products * width,
        tile.vectors * width + positions * 0.5,  # loads
        (products + tile.vectors + repeats) / 5,  # instructions
        4.0,  # a sum waits for the one before
    )
    tiles = ceil(rows / tile.rows) * ceil(columns / tile.columns) * ceil(channels / tile.channels)
    ragged = 1.1 if channels % tile.lanes else 1.0  # the last vector is stored lane by lane
    return tiles * (step + 0.3) * ragged
