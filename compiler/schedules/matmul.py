"""Matrix products: with constant weights packed at compile time, or of two activations packed as the kernel runs.

The kernel is the convolution's: a register tile of rows and output channels, the right operand as
[block, k, channel of the block]. Transpositions around an attention's products cost nothing of their own: operands are
read, and the result is written, through their permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from compiler.schedules.blocks import (
    annotation,
    blocks_of,
    extent,
    finish_in_registers,
    inline_injective,
    kernel_block,
    marks,
    output_block,
    share_between_cores,
)
from compiler.schedules.machine import Machine
from compiler.schedules.tiles import Tile

KERNEL_NAME: Final = "matmul"


def pack_matrix(weights: np.ndarray[Any, Any], tile: Tile) -> np.ndarray[Any, Any]:
    """Return weights [k, n] as [block, k, channel of the block], with zeros after the last channel."""
    depth, channels = weights.shape
    blocks = -(-channels // tile.channels)
    padded = np.zeros((depth, blocks * tile.channels), weights.dtype)
    padded[:, :channels] = weights
    return np.ascontiguousarray(padded.reshape(depth, blocks, tile.channels).transpose(1, 0, 2))


def packed_matmul(data: Any, packed: Any, *, channels: int, tile: Tile) -> Any:
    """Return the TE computation of data [..., k] with packed weights: [..., channels]."""
    *leading, rows, depth = data.shape
    whole = _whole(rows, tile.columns)
    full = _products(
        (*leading, whole),
        packed.shape[0] * tile.channels,
        depth,
        lambda outer, row, k: data[(*outer, _inside(row, rows, whole), k)],
        lambda _outer, n, k: packed[n // tile.channels, k, n % tile.channels],
        tile,
    )
    return _crop(full, (*leading, rows, channels), range(len(leading) + 2))


def batched_matmul(
    left: Any, right: Any, *, axes: tuple[Sequence[int], Sequence[int], Sequence[int]], tile: Tile
) -> Any:
    """Return the TE computation of two activations' product, batch axes broadcast.

    `axes` are the permutations that left and right operand are read through and the result is written through.
    """
    from tvm import te, tirx

    left_axes, right_axes, out_axes = axes
    left_shape = [left.shape[axis] for axis in left_axes]
    right_shape = [right.shape[axis] for axis in right_axes]
    rank = max(len(left_shape), len(right_shape))
    rows, depth, channels = left_shape[-2], left_shape[-1], right_shape[-1]
    batch = [_broadcast(left_shape, right_shape, axis, rank) for axis in range(rank - 2)]
    whole = _whole(rows, tile.columns)
    blocks = -(-channels // tile.channels)

    def read(tensor: Any, shape: Sequence[Any], permutation: Sequence[int], index: Sequence[Any]) -> Any:
        used = [0 if _is_one(size) else position for size, position in zip(shape[::-1], index[::-1], strict=False)][
            ::-1
        ]
        source: list[Any] = [None] * len(permutation)
        for position, axis in enumerate(permutation):
            source[axis] = used[position]
        return tensor[tuple(source)]

    def packed_element(*index: Any) -> Any:
        *outer, block, k, lane = index
        n = block * tile.channels + lane
        value = read(right, right_shape, right_axes, (*outer, k, n))
        if channels % tile.channels == 0:
            return value
        return tirx.if_then_else(n < channels, value, tirx.const(0, right.dtype))

    packed = te.compute((*batch, blocks, depth, tile.channels), packed_element, name="pack", attrs=marks(keep="pack"))
    full = _products(
        (*batch, whole),
        blocks * tile.channels,
        depth,
        lambda outer, row, k: read(left, left_shape, left_axes, (*outer, _inside(row, rows, whole), k)),
        lambda outer, n, k: packed[(*outer, n // tile.channels, k, n % tile.channels)],
        tile,
    )
    return _crop(full, (*batch, rows, channels), out_axes)


def _products(rows: Sequence[Any], channels: Any, depth: Any, left: Any, right: Any, tile: Tile) -> Any:
    from tvm import te

    k = te.reduce_axis((0, depth), "k")

    def element(*index: Any) -> Any:
        *outer, row, n = index
        return te.sum(left(outer, row, k) * right(outer, n, k), axis=k)

    notes = marks(kernel=KERNEL_NAME, rows=1, columns=tile.columns, lanes=tile.lanes, vectors=tile.vectors)
    return te.compute((*rows, channels), element, name="matmul", attrs=notes)


def _crop(full: Any, shape: Sequence[Any], axes: Sequence[int]) -> Any:
    """Return the part of `full` that is the result, its axes permuted."""
    from tvm import te

    def element(*index: Any) -> Any:
        source: list[Any] = [None] * len(index)
        for position, axis in enumerate(axes):
            source[axis] = index[position]
        return full[tuple(source)]

    return te.compute(tuple(shape[axis] for axis in axes), element, name="matmul_crop")


def _whole(rows: Any, step: int) -> Any:
    return (
        -(-rows // step) * step if isinstance(rows, int) or hasattr(rows, "value") else (rows + step - 1) // step * step
    )


def _inside(row: Any, rows: Any, whole: Any) -> Any:
    from tvm import tirx

    known = not hasattr(rows, "name") and int(rows) == int(whole)
    return row if known else tirx.min(row, rows - 1)


def _is_one(size: Any) -> bool:
    return getattr(size, "value", size) == 1 if not hasattr(size, "name") else False


def _broadcast(left: Sequence[Any], right: Sequence[Any], axis: int, rank: int) -> Any:
    sizes = [shape[axis - (rank - len(shape))] for shape in (left, right) if axis >= rank - len(shape)]
    return next((size for size in sizes if not _is_one(size)), sizes[0])


def schedule_matmul(schedule: Any, machine: Machine) -> bool:
    """Schedule a function that holds a matrix product of ours; False if it holds none."""
    block = kernel_block(schedule, KERNEL_NAME)
    if block is None:
        return False
    notes = schedule.get(block).annotations
    columns, lanes, vectors = (int(notes[f"isthmus.{key}"]) for key in ("columns", "lanes", "vectors"))
    inline_injective(schedule)
    *batch, m, n, k = schedule.get_loops(block)
    m_outer, m_inner = schedule.split(m, [None, columns])
    n_outer, n_vector, n_lane = schedule.split(n, [None, vectors, lanes])
    outer = [*batch, n_outer, m_outer]
    schedule.reorder(*outer, k, m_inner, n_vector, n_lane)
    schedule.vectorize(n_lane)
    schedule.unroll(m_inner)
    schedule.unroll(n_vector)
    schedule.set_scope(block, 0, "local")
    packs = _schedule_packing(schedule, batch, lanes)
    finish_in_registers(schedule, output_block(schedule), m_outer, depth=len(outer), lanes=lanes)
    schedule.decompose_reduction(block, k)
    share_between_cores(schedule, batch if packs and batch else [*batch, n_outer], machine)
    return True


def _schedule_packing(schedule: Any, batch: Sequence[Any], lanes: int) -> bool:
    """Pack the right operand anew for each matrix of the batch; return whether it is packed at all."""
    for block in blocks_of(schedule):
        if annotation(schedule, block, "isthmus.keep") == "pack":
            if batch:
                schedule.compute_at(block, batch[-1])
            lane = schedule.get_loops(block)[-1]
            if extent(schedule, lane) != lanes:
                _, lane = schedule.split(lane, [None, lanes])
            schedule.vectorize(lane)
            return True
    return False
