"""Dense 2-D convolution in NHWC: a register tile of pixels and output channels, weights packed to the order of access.

The kernel reads each input value once per tile and repeats it over the lanes, so the input's layout costs nothing; the
weights lie as [group, block, kh, kw, input channel, channel of the block], one sequential stream per tile. Pixels
beyond the edge are computed from the last pixel and not stored. What follows the convolution (bias, activation,
residual) is applied while the tile is in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from compiler.schedules.blocks import (
    finish_in_registers,
    inline_injective,
    kernel_block,
    marks,
    output_block,
    share_between_cores,
)
from compiler.schedules.elementwise import schedule_borders, vectorize_last_axis
from compiler.schedules.machine import Machine
from compiler.schedules.tiles import Tile

KERNEL_NAME: Final = "convolution"
_UNROLLED_CHANNELS: Final = 4  # images: so few input channels are no loop


@dataclass(frozen=True, slots=True)
class Window:
    """How a kernel moves over an image."""

    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, left, bottom, right
    kernel: tuple[int, int]

    def output(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Return the height and width of the output."""
        sizes = []
        for axis, size in enumerate((height, width)):
            reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            sizes.append((size + self.padding[axis] + self.padding[axis + 2] - reach) // self.strides[axis] + 1)
        return sizes[0], sizes[1]


def pack_weights(weights: np.ndarray[Any, Any], groups: int, tile: Tile) -> np.ndarray[Any, Any]:
    """Return weights [output channel, kh, kw, input channel] as [group, block, kh, kw, input channel, lane]."""
    outputs, height, width, inputs = weights.shape
    per_group = outputs // groups
    blocks = -(-per_group // tile.channels)
    padded = np.zeros((groups, blocks * tile.channels, height, width, inputs), weights.dtype)
    padded[:, :per_group] = weights.reshape(groups, per_group, height, width, inputs)
    split = padded.reshape(groups, blocks, tile.channels, height, width, inputs)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 4, 5, 2))


def convolution(data: Any, packed: Any, *, window: Window, channels: int, tile: Tile) -> Any:
    """Return the TE computation of data [n, h, w, c] with packed weights: [n, h, w, channels]."""
    from tvm import te, tirx

    batch, height, width, _ = data.shape
    groups, blocks, kernel_h, kernel_w, inputs, lanes = (int(size) for size in packed.shape)
    out_h, out_w = window.output(int(height), int(width))
    rows, columns = (-(-size // step) * step for size, step in ((out_h, tile.rows), (out_w, tile.columns)))
    image = pad_image(data, window.padding)
    axis_h = te.reduce_axis((0, kernel_h), "kh")
    axis_w = te.reduce_axis((0, kernel_w), "kw")
    axis_c = te.reduce_axis((0, inputs), "ic")
    (stride_h, stride_w), (dilation_h, dilation_w) = window.strides, window.dilation

    def inside(index: Any, size: int, padded: int) -> Any:
        return index if size == padded else tirx.min(index, size - 1)

    def product(n: Any, h: Any, w: Any, group: Any, o: Any) -> Any:
        pixel = image[
            n,
            inside(h, out_h, rows) * stride_h + axis_h * dilation_h,
            inside(w, out_w, columns) * stride_w + axis_w * dilation_w,
            axis_c if groups == 1 else group * inputs + axis_c,
        ]
        return te.sum(pixel * packed[group, o // lanes, axis_h, axis_w, axis_c, o % lanes], [axis_h, axis_w, axis_c])

    attributes = marks(kernel=KERNEL_NAME, rows=tile.rows, columns=tile.columns, lanes=tile.lanes, vectors=tile.vectors)
    if groups == 1:
        full = te.compute(
            (batch, rows, columns, blocks * lanes),
            lambda n, h, w, o: product(n, h, w, 0, o),
            name="convolution",
            attrs=attributes,
        )
        return te.compute((batch, out_h, out_w, channels), lambda n, h, w, o: full[n, h, w, o], name="convolution_crop")
    per_group = channels // groups
    full = te.compute((batch, rows, columns, groups, blocks * lanes), product, name="convolution", attrs=attributes)
    return te.compute(
        (batch, out_h, out_w, channels),
        lambda n, h, w, o: full[n, h, w, o // per_group, o % per_group],
        name="convolution_crop",
    )


def pad_image(data: Any, padding: Sequence[int], value: float = 0.0) -> Any:
    """Return data [n, h, w, c] with a border (top, left, bottom, right) of `value`, as a block of its own."""
    from tvm import te, tirx

    top, left, bottom, right = padding
    if not any(padding):
        return data
    batch, height, width, channels = data.shape

    def element(n: Any, h: Any, w: Any, c: Any) -> Any:
        inside = tirx.all(h >= top, h < height + top, w >= left, w < width + left)
        return tirx.if_then_else(inside, data[n, h - top, w - left, c], tirx.const(value, data.dtype))

    shape = (batch, height + top + bottom, width + left + right, channels)
    return te.compute(shape, element, name="border", attrs=marks(keep="border"))


def spread_image(data: Any, strides: tuple[int, int], padding: Sequence[int]) -> Any:
    """Return data [n, h, w, c] with strides - 1 zeros between pixels and a border; a negative border cuts off."""
    from tvm import te, tirx

    top, left, bottom, right = padding
    batch, height, width, channels = data.shape
    (step_h, step_w), (rows, columns) = strides, (int(height), int(width))

    def element(n: Any, h: Any, w: Any, c: Any) -> Any:
        y, x = h - top, w - left
        inside = tirx.all(
            y >= 0, y <= (rows - 1) * step_h, x >= 0, x <= (columns - 1) * step_w, y % step_h == 0, x % step_w == 0
        )
        return tirx.if_then_else(inside, data[n, y // step_h, x // step_w, c], tirx.const(0, data.dtype))

    shape = (batch, (rows - 1) * step_h + 1 + top + bottom, (columns - 1) * step_w + 1 + left + right, channels)
    return te.compute(shape, element, name="border", attrs=marks(keep="border"))


def schedule_convolution(schedule: Any, machine: Machine) -> bool:
    """Schedule a function that holds a convolution of ours; False if it holds none."""
    block = kernel_block(schedule, KERNEL_NAME)
    if block is None:
        return False
    notes = {
        key: int(schedule.get(block).annotations[f"isthmus.{key}"]) for key in ("rows", "columns", "lanes", "vectors")
    }
    inline_injective(schedule)
    schedule_borders(schedule, machine)
    loops = list(schedule.get_loops(block))
    grouped = len(loops) == 9 - 1  # n h w g o kh kw ic
    n, h, w = loops[:3]
    o, kh, kw, ic = loops[-4:]
    h_outer, h_inner = schedule.split(h, [None, notes["rows"]])
    w_outer, w_inner = schedule.split(w, [None, notes["columns"]])
    o_outer, o_vector, o_lane = schedule.split(o, [None, notes["vectors"], notes["lanes"]])
    weights = schedule.get(block).reads[1].source
    weight_bytes = 4 * int(np.prod([int(size) for size in weights.shape]))
    outer = [n, h_outer, o_outer, w_outer] if weight_bytes <= machine.l2_bytes // 4 else [n, o_outer, h_outer, w_outer]
    if grouped:
        outer.insert(1, loops[3])
    schedule.reorder(*outer, kh, kw, ic, h_inner, w_inner, o_vector, o_lane)
    schedule.vectorize(o_lane)
    for loop in (h_inner, w_inner, o_vector):
        schedule.unroll(loop)
    last = output_block(schedule)
    if grouped:
        vectorize_last_axis(schedule, last, machine)
    else:
        schedule.set_scope(block, 0, "local")
        finish_in_registers(schedule, last, w_outer, depth=len(outer), lanes=notes["lanes"])
    if int(schedule.get(ic).extent) <= _UNROLLED_CHANNELS:
        schedule.unroll(ic)
    schedule.decompose_reduction(block, kh)
    share_between_cores(schedule, outer[:-1], machine)
    return True
