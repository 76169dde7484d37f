"""Register tiles fit the registers and waste little."""

from __future__ import annotations

import pytest

from compiler.schedules.machine import Machine
from compiler.schedules.tiles import choose_tile, vector_lanes

MACHINES = {
    "avx512": Machine(lanes=16, registers=32, broadcasts_from_memory=True, cores=1),
    "avx2": Machine(lanes=8, registers=16, broadcasts_from_memory=False, cores=1),
    "neon": Machine(lanes=4, registers=32, broadcasts_from_memory=False, cores=1),
}


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize(
    ("rows", "columns", "channels"), [(1, 197, 768), (56, 56, 64), (7, 7, 512), (1, 1, 1000), (5, 3, 7)]
)
def test_a_tile_fits_the_registers(name: str, rows: int, columns: int, channels: int) -> None:
    machine = MACHINES[name]

    tile = choose_tile(rows, columns, channels, machine)

    assert tile.rows * tile.columns * tile.vectors + tile.vectors < machine.registers
    assert tile.rows <= rows
    assert tile.columns <= columns


def test_common_sizes_are_computed_without_waste() -> None:
    tile = choose_tile(14, 14, 256, MACHINES["avx512"])

    assert 14 % tile.columns == 0
    assert 256 % tile.channels == 0
    assert tile.rows * tile.columns * tile.vectors >= 24


def test_vectors_divide_the_channels() -> None:
    assert vector_lanes(40, MACHINES["avx512"]) == 8
    assert vector_lanes(12, MACHINES["avx512"]) == 4
    assert vector_lanes(7, MACHINES["avx512"]) == 1


def test_inputs_a_cache_way_apart_get_fewer_positions_at_once() -> None:
    crowded = choose_tile(14, 14, 256, MACHINES["avx512"], stride=1024)
    spread = choose_tile(14, 14, 256, MACHINES["avx512"], stride=1000)

    assert crowded.rows * crowded.columns < 8 <= spread.rows * spread.columns
