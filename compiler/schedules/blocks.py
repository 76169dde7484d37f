"""What the rules share: names of annotations, and steps over the blocks of a fused function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Final

from compiler.schedules.machine import Machine

KERNEL: Final = "isthmus.kernel"  # which rule computes this block
KEEP: Final = "isthmus.keep"  # a block that stands on its own and is never inlined

FUSES_WHAT_FOLLOWS: Final = 4  # relax's OpPatternKind kOutEWiseFusable: element-wise followers join the kernel
_MOST_UNROLLED: Final = 32  # positions, about what register tiles have


def annotation(schedule: Any, block: Any, key: str) -> Any:
    """Return the annotation of a block, or None."""
    return schedule.get(block).annotations.get(key)


def blocks_of(schedule: Any) -> list[Any]:
    """Return the blocks of the function in order, without the root."""
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def kernel_block(schedule: Any, kernel: str) -> Any | None:
    """Return the block that is annotated as this kernel, or None."""
    for block in blocks_of(schedule):
        if annotation(schedule, block, KERNEL) == kernel:
            return block
    return None


def is_reduction(schedule: Any, block: Any) -> bool:
    """Return whether any of the block's axes is reduced."""
    from tvm.tirx import IterVar

    return any(axis.iter_type != IterVar.DataPar for axis in schedule.get(block).iter_vars)


def output_block(schedule: Any) -> Any:
    """Return the block that writes the function's output: the last one."""
    return blocks_of(schedule)[-1]


def inline_injective(schedule: Any, *, into_reductions: bool = False) -> None:
    """Inline every block that computes each element by itself into what reads it, kept blocks and outputs excepted."""
    from tvm.s_tir.schedule import ScheduleError

    last = schedule.get(output_block(schedule)).name_hint
    for block in blocks_of(schedule):
        name = schedule.get(block).name_hint
        if name == last or is_reduction(schedule, block) or annotation(schedule, block, KEEP) is not None:
            continue
        readers = schedule.get_consumers(block)
        if not readers or (not into_reductions and any(is_reduction(schedule, reader) for reader in readers)):
            continue
        try:
            schedule.compute_inline(block)
        except ScheduleError:
            continue  # an output too, or not injective: it stays a loop of its own


def marks(**values: Any) -> Mapping[str, Any]:
    """Return block annotations for `te.compute(attrs=...)`."""
    return {f"isthmus.{key}": value for key, value in values.items()}


def share_between_cores(schedule: Any, loops: Sequence[Any], machine: Machine) -> None:
    """Spread adjacent loops over the machine's cores."""
    if machine.cores > 1 and loops:
        schedule.parallel(loops[0] if len(loops) == 1 else schedule.fuse(*loops))


def finish_in_registers(schedule: Any, block: Any, loop: Any, *, depth: int, lanes: int) -> None:
    """Compute `block`, which reads a tile's sums, inside the tile's `loop` (the `depth`-th), vectorized.

    It is unrolled, so that sums stay in registers, unless it repeats them over many more positions than the tile has
    (a channel's factor over a whole image).
    """
    schedule.reverse_compute_at(block, loop, preserve_unit_loops=True)
    *positions, channel = schedule.get_loops(block)[depth:]
    sizes = [extent(schedule, position) for position in positions]
    if None not in sizes and prod(size or 1 for size in sizes) <= _MOST_UNROLLED:
        for position in positions:
            schedule.unroll(position)
    if lanes == 1:
        return
    if (extent(schedule, channel) or 0) <= lanes:
        schedule.vectorize(channel)
        return
    vector, lane = schedule.split(channel, [None, lanes])
    schedule.unroll(vector)
    schedule.vectorize(lane)


def extent(schedule: Any, loop: Any) -> int | None:
    """Return how often a loop runs; None if that is known only at run time."""
    value = getattr(schedule.get(loop).extent, "value", None)
    return None if value is None else int(value)
