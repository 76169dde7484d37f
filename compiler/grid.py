"""Grid keeping: a new version's weights on the INT8 grid of the version before.

A weight that did not change keeps its byte, and one that changed little moves by one step: the difference between two
versions is then mostly zeros. Scales derived anew would change nearly every byte.

What the runtimes share is here: one tensor of integers and its scales. compiler.openvino_grid and compiler.qdq_grid
find the tensors in their files. Each channel gets one of three scales, the one with which its integers change least:
    kept   that of the version before;
    moved  the one with which the old integers fit the new weights best: where a normalisation is folded into
           weights, a little training rescales whole channels, and one number then says so instead of all of them;
    own    derived from the new weights, with as much room as the version before left: what is always accurate.
The first two are passed over when more than `MAX_CLIPPED` of a channel's weights would be clipped, or when rounding and
clipping would do more than `MAX_NOISE` times the harm (summed squares) that they do on a scale of its own.

The caller may ask for less: that only a share of the tensors keeps anything. The most damaged ones, by that same
factor, then get scales of their own throughout.

A difference of half a step is not a change: the old step is kept at ties, so that equal weights give equal bytes
whatever the order of rounding was. This is not hysteresis: no weight is left on a step that is not its nearest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import VerificationError
from isthmus.tensors import Array

MAX_CLIPPED: Final = 0.01  # of one channel's weights
MAX_NOISE: Final = 4.0  # times the summed squared error on a scale of its own
NEGLIGIBLE: Final = 0.01  # of the error that the median channel has anyway: dead channels may stay as they are
LEAST_USED: Final = 0.25  # of the grid: the most room that an own scale leaves, as that of the version before did
_SCALE_BITS: Final = 48  # what a scale that changes costs in a delta, with the bias that is stored on it
_TIE: Final = 1e-3  # steps; float32 products that a quantizer rounded differ by less
_BLOCK: Final = 1 << 20  # weights that are worked on at a time
_KEPT, _MOVED, _OWN = range(3)


class GridError(VerificationError):
    """The new version does not fit on the old grid; make a new one."""

    reason = "grid-not-kept"


@dataclass(frozen=True, slots=True)
class TensorGrid:
    """How a quantized tensor came out."""

    name: str
    channels: int  # scales; 1 where the whole tensor shares one
    kept: int  # of them, those of the version before
    moved: int = 0  # those that follow a channel which was rescaled as a whole; the rest are its own
    clipped: float = 0.0  # share of the tensor's weights that had to be clipped
    noise: float = 1.0  # summed squared error, as a multiple of that on scales of its own
    reason: str = ""  # why nothing was kept


@dataclass(frozen=True, slots=True)
class PreviousGrid:
    """The version before, and how much of it is to be kept."""

    entry: Path
    share: float = 1.0  # of its tensors; the most damaged ones beyond it get scales of their own


@dataclass(frozen=True, slots=True)
class Regridded:
    """Integers with their scales, and what they cost."""

    integers: NDArray[Any]
    scale: NDArray[np.float64]
    tensor: TensorGrid


@dataclass(frozen=True, slots=True)
class _Choice:
    """One scale for every channel: [channels, 1] each, the integers [channels, weights]."""

    scale: NDArray[np.float64]
    integers: NDArray[Any]
    harm: NDArray[np.float64]  # summed squared error
    clipped: NDArray[np.float64]  # share of the channel
    bits: NDArray[np.float64]  # about what the change costs


@dataclass(frozen=True, slots=True)
class Quantized:
    """A tensor of the version before, and the weights that are to take its place.

    Scale and zero point have the rank of the weights, and size 1 along every axis that shares them.
    """

    name: str
    weights: Array
    integers: NDArray[Any]
    scale: NDArray[np.float64]
    zero_point: NDArray[np.float64] | None = None
    own_scale: NDArray[np.float64] | None = None  # of the new weights; None: from their extremes, as the old one was
    least_scale: NDArray[np.float64] | None = None  # what other tensors ask for; None: nothing

    def regrid(self, *, anew: bool = False) -> Regridded:
        """Return the new weights, each channel on the scale that suits it.

        Args:
            anew: Give every channel a scale of its own.

        Raises:
            GridError: The old integers are not of 8 bits, or the weights are not numbers.
        """
        if not np.isfinite(self.weights).all():
            raise GridError(f"{self.name}: weights hold values that are not numbers")
        if not (np.isfinite(self.scale).all() and (self.scale >= 0).all()):
            raise GridError(f"{self.name}: scales of the version before are not numbers")
        choices = self._choices()
        own = choices[_OWN]
        least = 0.0 if self.least_scale is None else self._rows(self.least_scale)
        exact = np.square(own.scale * NEGLIGIBLE) * own.integers.shape[1]  # as good as no rounding at all
        limit = np.maximum(MAX_NOISE * own.harm, NEGLIGIBLE * np.median(own.harm)) + exact
        bits = [
            np.where(
                (choice.harm <= limit) & (choice.clipped <= MAX_CLIPPED) & (choice.scale >= least) & (not anew),
                choice.bits,
                np.inf,
            )
            for choice in choices[:_OWN]
        ]
        bits.append(np.where(own.scale > 0, own.bits, np.inf))
        picked = np.concatenate(bits, axis=1).argmin(axis=1)  # the first of equals, and kept where all is zero

        def pick(name: str) -> NDArray[Any]:
            found = np.stack([getattr(choice, name) for choice in choices])[picked, np.arange(len(picked))]
            return np.asarray(found)

        total, base = float(pick("harm").sum()), float(own.harm.sum())
        tensor = TensorGrid(
            self.name,
            channels=len(picked),
            kept=int((picked == _KEPT).sum()),
            moved=int((picked == _MOVED).sum()),
            clipped=float(pick("clipped").mean()) if len(picked) else 0.0,
            noise=total / base if base > 0 else 1.0,
        )
        integers = np.empty_like(own.integers)
        for place, choice in enumerate(choices):
            integers[picked == place] = choice.integers[picked == place]
        return Regridded(
            self._whole(integers, self.integers.shape), self._whole(pick("scale"), self.scale.shape), tensor
        )

    def _choices(self) -> list[_Choice]:
        """Return the tensor on each of the three scales."""
        weights, old, kept = (self._rows(array) for array in (self.weights, self.integers, self.scale))
        zero = None if self.zero_point is None else self._rows(self.zero_point)
        own = None if self.own_scale is None else self._rows(self.own_scale)
        least = None if self.least_scale is None else self._rows(self.least_scale)
        rows = max(1, _BLOCK // max(1, weights.shape[1]))
        blocks = []
        for start in range(0, len(weights), rows):
            part = slice(start, start + rows)
            blocks.append(
                _choose(
                    weights[part], old[part], kept[part],
                    *(None if array is None else array[part] for array in (zero, own, least)),
                    limits=_limits(self.integers, self.zero_point),
                )
            )  # fmt: skip
        fields = _Choice.__dataclass_fields__
        return [
            _Choice(**{name: np.concatenate([getattr(block[place], name) for block in blocks]) for name in fields})
            for place in (_KEPT, _MOVED, _OWN)
        ]

    def _order(self) -> list[int]:
        """Return the axes, those with scales of their own first."""
        return sorted(range(self.scale.ndim), key=lambda axis: self.scale.shape[axis] == 1)

    def _rows(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array with a row for each channel."""
        return np.asarray(array).transpose(self._order()).reshape(self.scale.size, -1)

    def _whole(self, rows: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Return rows as the array that they came from."""
        order = self._order()
        return np.asarray(rows.reshape([shape[axis] for axis in order]).transpose(np.argsort(order)))


def _choose(
    weights: Array,
    old: NDArray[Any],
    kept: NDArray[np.float64],
    zero: NDArray[np.float64] | None,
    own: NDArray[np.float64] | None,
    least: NDArray[np.float64] | None,
    *,
    limits: tuple[int, int],
) -> list[_Choice]:
    """Return some rows of weights on the three scales."""
    steps = old.astype(np.float64) - (0.0 if zero is None else zero)
    if own is None:
        own = _own_scale(weights, steps, zero, limits)
    if least is not None:
        own = np.maximum(own, least)

    def on(scale: NDArray[np.float64]) -> _Choice:
        integers, outside = requantize(weights, old, np.where(scale > 0, scale, kept), zero, limits)
        error = (integers.astype(np.float64) - (0.0 if zero is None else zero)) * scale - weights
        distance = np.abs(integers.astype(np.float64) - old)
        return _Choice(
            scale=scale,
            integers=integers,
            harm=np.square(error).sum(axis=1, keepdims=True),
            clipped=outside.mean(axis=1, keepdims=True) if outside.size else np.zeros(scale.shape),
            bits=np.where(distance > 0, 1 + 2 * np.log2(1 + distance), 0).sum(axis=1, keepdims=True),
        )

    stays = on(kept)
    moved = kept.copy()
    rows = np.flatnonzero(stays.bits[:, 0] > _SCALE_BITS)  # elsewhere it cannot pay
    moved[rows] = _moved_scale(np.asarray(weights[rows], dtype=np.float64), steps[rows], kept[rows])
    changed = [replace(choice, bits=choice.bits + _SCALE_BITS) for choice in (on(_single(moved)), on(_single(own)))]
    return [stays, *changed]


def _moved_scale(
    weights: NDArray[np.float64], steps: NDArray[np.float64], kept: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the scales with which most integers can stay as they are.

    Each weight that has the sign of its integer leaves that unchanged for an interval of scales; the scale that lies in
    most intervals is found by a sweep over their ends.
    """
    size, at = np.abs(weights), np.abs(steps)
    fits = (weights * steps > 0) | (steps == 0)
    ends = [
        np.where(fits, size / (at + 0.5), np.inf),
        np.where(fits & (at > 0), size / np.maximum(at - 0.5, 0.5), np.inf),
    ]
    points = np.concatenate(ends, axis=1)
    order = points.argsort(axis=1, kind="stable")
    inside = np.where(order < weights.shape[1], 1, -1).cumsum(axis=1)
    points = np.take_along_axis(points, order, axis=1)
    best = inside[:, :-1].argmax(axis=1)[:, None]
    low, high = (np.take_along_axis(points, best + step, axis=1) for step in (0, 1))
    return np.where(np.isfinite(low) & (low > 0), np.where(np.isfinite(high), (low + high) / 2, low), kept)


def _own_scale(
    weights: Array, steps: NDArray[np.float64], zero: NDArray[np.float64] | None, limits: tuple[int, int]
) -> NDArray[np.float64]:
    """Return scales that hold all weights, with the room that the old ones left; 0 for a row of zeros."""
    low, high = limits
    at = 0.0 if zero is None else zero
    above, below = np.maximum(high - at, 1), np.maximum(at - low, 1)
    used = np.maximum(steps / above, -steps / below).max(axis=1, keepdims=True, initial=0.0)
    wide = np.asarray(weights, dtype=np.float64)
    most = np.maximum(wide / above, -wide / below).max(axis=1, keepdims=True, initial=0.0)
    return np.asarray(most / np.where(used > 0, np.maximum(used, LEAST_USED), 1.0), dtype=np.float64)


def _single(scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return scales as files hold them."""
    return np.asarray(scale.astype(np.float32), dtype=np.float64)


def regrid_all(tensors: Mapping[str, Quantized], share: float) -> dict[str, Regridded]:
    """Return all tensors on the old grid; beyond `share` of them, the most damaged ones on scales of their own.

    Raises:
        GridError: One of them cannot be put on any grid.
    """
    found = {name: tensor.regrid() for name, tensor in tensors.items()}

    def harmed(name: str) -> tuple[bool, float, str]:
        tensor = found[name].tensor
        return tensor.kept + tensor.moved > 0, -tensor.noise, name  # first those that have new scales anyway

    by_harm = sorted(found, key=harmed)
    for name in by_harm[: len(found) - round(len(found) * share)]:
        found[name] = tensors[name].regrid(anew=True)
    return found


def outcome(tensors: Sequence[TensorGrid]) -> Literal["kept", "part", "new"]:
    """Return whether all channels are on the grid of the version before, moved or not, some of them, or none."""
    old, all_of_them = sum(tensor.kept + tensor.moved for tensor in tensors), sum(t.channels for t in tensors)
    return "kept" if old == all_of_them else "part" if old else "new"


def requantize(
    weights: Array, old: NDArray[Any], scale: Array, zero_point: Array | None, limits: tuple[int, int]
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return the nearest integers on a grid, the old ones at ties, and which of them had to be clipped."""
    low, high = limits
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        steps = np.asarray(weights, dtype=np.float64) / scale
    steps = np.where(np.asarray(weights) == 0, 0.0, steps)  # a channel of zeros may have scale zero
    if zero_point is not None:
        steps = steps + zero_point
    near = np.abs(steps - old) <= 0.5 + _TIE
    integers = np.where(near, old, np.clip(np.rint(steps), low, high)).astype(old.dtype)
    return integers, (steps < low - 0.5 - _TIE) | (steps > high + 0.5 + _TIE)


def _limits(old: NDArray[Any], zero_point: Array | None) -> tuple[int, int]:
    if old.dtype not in (np.int8, np.uint8):
        raise GridError(f"weights are {old.dtype}, expected 8-bit integers")
    low, high = np.iinfo(old.dtype).min, np.iinfo(old.dtype).max
    symmetric = zero_point is None or not np.any(zero_point)
    if symmetric and old.dtype == np.int8 and old.min(initial=0) > low:
        low = -high
    return int(low), int(high)
