"""Functions that compute each element by itself: everything is inlined into one loop nest, the last axis vectorized."""

from __future__ import annotations

from typing import Any, Final

from compiler.schedules.blocks import annotation, blocks_of, extent, inline_injective, is_reduction
from compiler.schedules.machine import Machine
from compiler.schedules.tiles import vector_lanes

_SHORT: Final = 1 << 14  # elements: not worth waking other threads for


def schedule_elementwise(schedule: Any, machine: Machine) -> bool:
    """Schedule a function without reductions; False if it has one."""
    if any(is_reduction(schedule, block) for block in blocks_of(schedule)):
        return False
    inline_injective(schedule)
    for block in blocks_of(schedule):
        vectorize_last_axis(schedule, block, machine)
    return True


def schedule_borders(schedule: Any, machine: Machine) -> None:
    """Vectorize the blocks that add a border to an image."""
    for block in blocks_of(schedule):
        if annotation(schedule, block, "isthmus.keep") == "border":
            vectorize_last_axis(schedule, block, machine)


def vectorize_last_axis(schedule: Any, block: Any, machine: Machine) -> None:
    """Vectorize the innermost axis where vectors divide it, and spread the outer ones over threads."""
    loops = list(schedule.get_loops(block))
    if not loops:
        return
    sizes = [extent(schedule, loop) for loop in loops]
    last = sizes[-1]
    lanes = vector_lanes(last, machine) if last is not None else 1
    if lanes > 1:
        _, lane = schedule.split(loops[-1], [None, lanes])
        schedule.vectorize(lane)
    if machine.cores > 1 and len(loops) > 1 and (None in sizes or _product(sizes) >= _SHORT):
        schedule.parallel(schedule.fuse(*loops[:-1]))


def _product(sizes: list[int | None]) -> int:
    total = 1
    for size in sizes:
        total *= size or 1
    return total
