"""Depthwise convolution, pooling and other reductions that leave the last axis alone: vectors along that axis.

Several positions of the axis before it are computed at once, so that what neighbouring windows share is loaded once
and the sums stay in registers.
"""

from __future__ import annotations

from typing import Any, Final

from compiler.schedules.blocks import (
    annotation,
    blocks_of,
    extent,
    finish_in_registers,
    inline_injective,
    is_reduction,
    kernel_block,
    marks,
    output_block,
    share_between_cores,
)
from compiler.schedules.convolution import Window, pad_image
from compiler.schedules.elementwise import vectorize_last_axis
from compiler.schedules.machine import Machine
from compiler.schedules.tiles import vector_lanes

KERNEL_NAME: Final = "depthwise"
_UNROLLED_TAPS: Final = 49


def depthwise(data: Any, weights: Any, *, window: Window) -> Any:
    """Return the TE computation of data [n, h, w, c] with weights [kh, kw, c]: [n, h, w, c]."""
    from tvm import te

    batch, height, width, channels = data.shape
    out_h, out_w = window.output(int(height), int(width))
    image = pad_image(data, window.padding)
    axis_h = te.reduce_axis((0, window.kernel[0]), "kh")
    axis_w = te.reduce_axis((0, window.kernel[1]), "kw")
    (stride_h, stride_w), (dilation_h, dilation_w) = window.strides, window.dilation
    return te.compute(
        (batch, out_h, out_w, channels),
        lambda n, h, w, c: te.sum(
            image[n, h * stride_h + axis_h * dilation_h, w * stride_w + axis_w * dilation_w, c]
            * weights[axis_h, axis_w, c],
            [axis_h, axis_w],
        ),
        name="depthwise",
        attrs=marks(kernel=KERNEL_NAME),
    )


def positions_at_once(width: int, most: int) -> int:
    """Return the largest divisor of `width` up to `most`, or `most` where that would leave the registers idle."""
    best = max(size for size in range(1, min(width, most) + 1) if width % size == 0)
    return best if 2 * best >= min(width, most) else min(width, most)


def schedule_depthwise(schedule: Any, machine: Machine) -> bool:
    """Schedule a function that holds a depthwise convolution of ours; False if it holds none."""
    block = kernel_block(schedule, KERNEL_NAME)
    if block is None:
        return False
    inline_injective(schedule)
    n, h, w, c, kh, kw = schedule.get_loops(block)
    channels, width = extent(schedule, c), extent(schedule, w)
    lanes = vector_lanes(channels or 1, machine)
    last = output_block(schedule)
    taps = (extent(schedule, kh) or 1) * (extent(schedule, kw) or 1)
    wide = positions_at_once(width or 1, 8 if machine.registers >= 32 else 6)
    c_outer, c_lane = schedule.split(c, [None, lanes])
    w_outer, w_inner = schedule.split(w, [None, wide])
    outer = [n, c_outer, h, w_outer]
    schedule.reorder(*outer, kh, kw, w_inner, c_lane)
    if lanes > 1:
        schedule.vectorize(c_lane)
    schedule.unroll(w_inner)
    if taps <= _UNROLLED_TAPS:
        schedule.unroll(kw)
        if taps <= 25:
            schedule.unroll(kh)
    fused = schedule.get(last).name_hint != schedule.get(block).name_hint
    if not fused:
        schedule.cache_write(block, 0, "local")
        last = output_block(schedule)
    else:
        schedule.set_scope(block, 0, "local")
    finish_in_registers(schedule, last, w_outer, depth=len(outer), lanes=lanes)
    for other in blocks_of(schedule):
        if annotation(schedule, other, "isthmus.keep") == "border":
            schedule.compute_at(other, c_outer)
            _vectorize_border(schedule, other, lanes)
    schedule.decompose_reduction(block, kh)
    share_between_cores(schedule, outer[:2], machine)
    return True


def _vectorize_border(schedule: Any, block: Any, lanes: int) -> None:
    lane = schedule.get_loops(block)[-1]
    if lanes > 1 and extent(schedule, lane) == lanes:
        schedule.vectorize(lane)


def schedule_reduction(schedule: Any, machine: Machine) -> bool:
    """Schedule any function with reductions: sums in registers, vectors along the last axis that is not reduced."""
    if not any(is_reduction(schedule, block) for block in blocks_of(schedule)):
        return False
    inline_injective(schedule)
    for block in blocks_of(schedule):
        if is_reduction(schedule, block):
            _reduce(schedule, block, machine)
        else:
            vectorize_last_axis(schedule, block, machine)
    return True


def _reduce(schedule: Any, block: Any, machine: Machine) -> None:
    from tvm.tirx import IterVar

    axes = schedule.get(block).iter_vars
    loops = list(schedule.get_loops(block))
    if len(axes) != len(loops):
        return
    pairs = list(zip(axes, loops, strict=True))
    spatial = [loop for axis, loop in pairs if axis.iter_type == IterVar.DataPar]
    reduced = [loop for axis, loop in pairs if axis.iter_type != IterVar.DataPar]
    if not spatial or len(schedule.get(block).writes) != 1:
        return
    size = extent(schedule, spatial[-1])
    lanes = vector_lanes(size, machine) if size is not None else 1
    vectors = 1
    while lanes > 1 and vectors < 4 and size is not None and size % (lanes * vectors * 2) == 0:
        vectors *= 2
    outer, vector, lane = schedule.split(spatial[-1], [None, vectors, lanes])
    schedule.reorder(*spatial[:-1], outer, *reduced, vector, lane)
    if lanes > 1:
        schedule.vectorize(lane)
    schedule.unroll(vector)
    copy = schedule.cache_write(block, 0, "local")
    finish_in_registers(schedule, copy, outer, depth=len(spatial), lanes=lanes)
    schedule.decompose_reduction(block, reduced[0])
