"""Softmax, layer normalization and sums along the last axis: one row at a time, kept in the first-level cache.

A reduction keeps as many partial results as vectors have lanes (twice over), and adds them up as a tree at the end, so
that it vectorizes without reordering sums behind the compiler's back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from compiler.schedules.blocks import (
    annotation,
    blocks_of,
    extent,
    inline_injective,
    marks,
    output_block,
    share_between_cores,
)
from compiler.schedules.machine import Machine
from compiler.schedules.tiles import vector_lanes
from compiler.schedules.transcendental import exponential

KERNEL_NAME: Final = "rows"
_STACK_ELEMENTS: Final = 4096  # a longer row is kept on the heap


def softmax(data: Any, *, machine: Machine) -> Any:
    """Return the TE computation of softmax along the last axis."""
    from tvm import te

    *rows, length = data.shape
    peak = _reduce(lambda row, i: data[(*row, i)], rows, int(length), machine, largest=True, name="peak")
    powers = te.compute(
        data.shape,
        lambda *index: exponential(data[index] - peak[index[:-1]]),
        name="powers",
        attrs=marks(kernel=KERNEL_NAME, keep="row"),
    )
    total = _reduce(lambda row, i: powers[(*row, i)], rows, int(length), machine, name="total")
    scale = te.compute(
        tuple(rows), lambda *row: 1.0 / total[row], name="scale", attrs=marks(kernel=KERNEL_NAME, keep="row")
    )
    return te.compute(data.shape, lambda *index: powers[index] * scale[index[:-1]], name="softmax")


def layer_norm(data: Any, gamma: Any, beta: Any, *, epsilon: float, machine: Machine) -> Any:
    """Return the TE computation of layer normalization over the last axis, in two passes."""
    from tvm import te, tirx

    *rows, length = data.shape
    size = int(length)
    total = _reduce(lambda row, i: data[(*row, i)], rows, size, machine, name="total")
    mean = _row(rows, lambda row: total[row] * (1.0 / size), "mean")

    def deviation(row: Sequence[Any], i: Any) -> Any:
        difference = data[(*row, i)] - mean[tuple(row)]
        return difference * difference

    squares = _reduce(deviation, rows, size, machine, name="squares")
    scale = _row(rows, lambda row: 1.0 / tirx.sqrt(squares[row] * (1.0 / size) + epsilon), "scale")
    return te.compute(
        data.shape,
        lambda *index: (data[index] - mean[index[:-1]]) * scale[index[:-1]] * gamma[index[-1]] + beta[index[-1]],
        name="layer_norm",
    )


def rms_norm(data: Any, gamma: Any, *, epsilon: float, machine: Machine) -> Any:
    """Return the TE computation of root-mean-square normalization over the last axis."""
    from tvm import te, tirx

    *rows, length = data.shape
    size = int(length)

    def square(row: Sequence[Any], i: Any) -> Any:
        return data[(*row, i)] * data[(*row, i)]

    squares = _reduce(square, rows, size, machine, name="squares")
    scale = _row(rows, lambda row: 1.0 / tirx.sqrt(squares[row] * (1.0 / size) + epsilon), "scale")
    return te.compute(data.shape, lambda *index: data[index] * scale[index[:-1]] * gamma[index[-1]], name="rms_norm")


def reduce_rows(data: Any, *, keepdims: bool, mean: bool, largest: bool, machine: Machine) -> Any:
    """Return the TE computation of the sum, mean or largest element along the last axis."""
    from tvm import te

    *rows, length = data.shape
    result = _reduce(lambda row, i: data[(*row, i)], rows, int(length), machine, largest=largest, name="reduced")
    factor = 1.0 / int(length) if mean else 1.0
    shape = (*rows, 1) if keepdims else tuple(rows)

    def element(*index: Any) -> Any:
        value = result[index[: len(rows)]]
        return value * factor if mean else value

    return te.compute(shape, element, name="row_result")


def _row(rows: Sequence[Any], element: Callable[[Sequence[Any]], Any], name: str) -> Any:
    from tvm import te

    notes = marks(kernel=KERNEL_NAME, keep="row")
    return te.compute(tuple(rows), lambda *row: element(row), name=name, attrs=notes)


def _reduce(
    element: Callable[[Sequence[Any], Any], Any],
    rows: Sequence[Any],
    length: int,
    machine: Machine,
    *,
    largest: bool = False,
    name: str,
) -> Any:
    """Return the sum (or the largest) of `element(row, i)` over i: partial results by lane, then a tree."""
    from tvm import te, tirx

    lanes = machine.lanes * 2 if length >= machine.lanes * 8 else machine.lanes
    steps = length // lanes
    rest = length - steps * lanes
    reducer = te.max if largest else te.sum
    notes = marks(kernel=KERNEL_NAME, keep="row")
    parts: list[Callable[[Sequence[Any]], Any]] = []
    if steps:
        k = te.reduce_axis((0, steps), "k")
        partial = te.compute(
            (*rows, lanes),
            lambda *index: reducer(element(index[:-1], k * lanes + index[-1]), axis=k),
            name=f"{name}_lanes",
            attrs=marks(kernel=KERNEL_NAME, keep="lanes"),
        )
        parts += [_reader(partial, lane) for lane in range(lanes)]
    if rest:
        r = te.reduce_axis((0, rest), "r")
        tail = te.compute(
            tuple(rows),
            lambda *row: reducer(element(row, steps * lanes + r), axis=r),
            name=f"{name}_rest",
            attrs=notes,
        )
        parts.append(lambda row: tail[tuple(row)])

    def tree(values: list[Any]) -> Any:
        while len(values) > 1:
            half = (len(values) + 1) // 2
            pairs = [_join(values[i], values[i + half], largest, tirx) for i in range(len(values) - half)]
            values = pairs + values[len(pairs) : half]
        return values[0]

    return te.compute(tuple(rows), lambda *row: tree([part(row) for part in parts]), name=name, attrs=notes)


def _reader(partial: Any, lane: int) -> Callable[[Sequence[Any]], Any]:
    return lambda row: partial[(*row, lane)]


def _join(left: Any, right: Any, largest: bool, tirx: Any) -> Any:
    return tirx.max(left, right) if largest else left + right


def schedule_rows(schedule: Any, machine: Machine) -> bool:
    """Schedule a function of ours that works row by row; False if it is none."""
    if not any(annotation(schedule, block, "isthmus.kernel") == KERNEL_NAME for block in blocks_of(schedule)):
        return False
    inline_injective(schedule)
    last = output_block(schedule)
    blocks = [block for block in blocks_of(schedule) if schedule.get(block) is not schedule.get(last)]
    ours = [block for block in blocks if annotation(schedule, block, "isthmus.kernel") == KERNEL_NAME]
    depth = _depth(schedule, ours)
    loops = list(schedule.get_loops(last))
    anchor = loops[depth - 1] if depth else None
    for block in reversed(ours):
        if anchor is not None:
            schedule.compute_at(block, anchor, preserve_unit_loops=True)
        _keep_near(schedule, block)
    for block in ours:
        if _is(schedule, block, "lanes"):
            *_, lane, k = schedule.get_loops(block)
            schedule.reorder(k, lane)
            schedule.vectorize(lane)
            schedule.decompose_reduction(block, k)
    _vectorize_inner(schedule, last, depth, machine)
    for block in ours:
        if schedule.get(block).name_hint.startswith("powers"):
            _vectorize_inner(schedule, block, depth, machine)
    share_between_cores(schedule, loops[:depth], machine)
    return True


def _is(schedule: Any, block: Any, *kinds: str) -> bool:
    return annotation(schedule, block, "isthmus.keep") in kinds


def _depth(schedule: Any, blocks: Sequence[Any]) -> int:
    """Return how many axes number the rows: what the partial results have besides their lanes."""
    sizes = []
    for block in blocks:
        written = len(schedule.get(block).writes[0].source.shape)
        sizes.append(written - 1 if _is(schedule, block, "lanes") else written)
    return min(sizes)


def _keep_near(schedule: Any, block: Any) -> None:
    elements = 1
    for size in schedule.get(block).writes[0].source.shape[-1:]:
        elements *= int(getattr(size, "value", 1))
    if elements <= _STACK_ELEMENTS:
        schedule.set_scope(block, 0, "local")


def _vectorize_inner(schedule: Any, block: Any, depth: int, machine: Machine) -> None:
    loops = schedule.get_loops(block)[depth:]
    size = extent(schedule, loops[-1]) if loops else None
    lanes = vector_lanes(size, machine) if size is not None else 1
    if lanes > 1:  # other lengths are left to LLVM, which splits off the rest itself
        _, lane = schedule.split(loops[-1], [None, lanes])
        schedule.vectorize(lane)
