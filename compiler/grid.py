"""Grid keeping: a new version's weights on the INT8 scales of the version before.

A weight that did not change keeps its byte, and one that changed little moves by one step: the difference between two
versions is then mostly zeros. Scales derived anew would change nearly every byte.

What the runtimes share is here: one tensor of integers and its scales. compiler.openvino_grid and compiler.qdq_grid find
the tensors in their files.

The rules:
* A channel keeps its scale while that suits it. It gets one of its own when more than `MAX_CLIPPED` of its weights would
  be clipped, or when rounding and clipping would do more than `MAX_NOISE` times the harm (summed squares) that they do on
  a scale of its own: weights that grew or shrank by half, in short.
* The caller may ask for less: that only a share of the tensors keeps its scales. The most damaged ones (by that same
  factor) then get new ones throughout.
* A difference of half a step is not a change: the old step is kept at ties, so that equal weights give equal bytes
  whatever the order of rounding was. This is not hysteresis: no weight is left on a step that is not its nearest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import VerificationError
from isthmus.tensors import Array

MAX_CLIPPED: Final = 0.01  # of one channel's weights
MAX_NOISE: Final = 4.0  # times the summed squared error on a scale of its own
_TIE: Final = 1e-3  # steps; float32 products that a quantizer rounded differ by less


class GridError(VerificationError):
    """The new version does not fit on the old grid; make a new one."""

    reason = "grid-not-kept"


@dataclass(frozen=True, slots=True)
class TensorGrid:
    """How a quantized tensor came out."""

    name: str
    channels: int  # scales; 1 where the whole tensor shares one
    kept: int  # of them, those of the version before
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
class Quantized:
    """A tensor of the version before, and the weights that are to take its place.

    Scale and zero point have the rank of the weights, and size 1 along every axis that shares them.
    """

    name: str
    weights: Array
    integers: NDArray[Any]
    scale: NDArray[np.float64]
    zero_point: NDArray[np.float64] | None = None
    own_scale: NDArray[np.float64] | None = None  # of the new weights; None: from their extremes
    least_scale: NDArray[np.float64] | None = None  # what other tensors ask for; None: nothing

    def regrid(self, *, anew: bool = False) -> Regridded:
        """Return the new weights on the old grid, or where that does not suit them on scales of their own.

        Args:
            anew: Keep no scale at all.

        Raises:
            GridError: The old integers are not of 8 bits, or the weights are not numbers.
        """
        own = self._own_scale()
        kept, clipped = requantize(self.weights, self.integers, self.scale, self.zero_point)
        fresh, _ = requantize(self.weights, self.integers, own, self.zero_point)
        axes = tuple(axis for axis, size in enumerate(self.scale.shape) if size == 1)
        harm, least = self._harm(kept, self.scale, axes), self._harm(fresh, own, axes)
        outside = clipped.mean(axis=axes, keepdims=True) if clipped.size else np.zeros(self.scale.shape)
        renewed = np.full(self.scale.shape, anew) | (outside > MAX_CLIPPED) | (harm > MAX_NOISE * least + _tiny(own))
        if self.least_scale is not None:
            renewed |= self.scale < self.least_scale
        renewed &= own > 0
        integers = np.where(renewed, fresh, kept)
        scale = np.where(renewed, own, self.scale)
        total, base = float(np.where(renewed, least, harm).sum()), float(least.sum())
        tensor = TensorGrid(
            self.name,
            channels=renewed.size,
            kept=int(renewed.size - renewed.sum()),
            clipped=float((clipped & ~renewed).mean()) if clipped.size else 0.0,
            noise=total / base if base > 0 else 1.0,
        )
        return Regridded(integers, scale, tensor)

    def _own_scale(self) -> NDArray[np.float64]:
        """Return the smallest scale that may be and holds all weights of a channel; 0 for a channel of zeros."""
        if self.own_scale is not None:
            return self.own_scale if self.least_scale is None else np.maximum(self.own_scale, self.least_scale)
        low, high = _limits(self.integers, self.zero_point)
        axes = tuple(axis for axis, size in enumerate(self.scale.shape) if size == 1)
        most, least = (
            pick(self.weights, axis=axes, keepdims=True, initial=0.0).astype(np.float64) for pick in (np.max, np.min)
        )
        zero = 0.0 if self.zero_point is None else self.zero_point
        above, below = np.maximum(high - zero, 1), np.maximum(zero - low, 1)
        own = np.maximum(most / above, -least / below)
        if self.least_scale is not None:
            own = np.maximum(own, self.least_scale)
        return np.asarray(own.astype(np.float32), dtype=np.float64)

    def _harm(self, integers: NDArray[Any], scale: NDArray[np.float64], axes: tuple[int, ...]) -> NDArray[np.float64]:
        zero = 0.0 if self.zero_point is None else self.zero_point
        error = (integers.astype(np.float64) - zero) * scale - self.weights
        return np.asarray(np.square(error).sum(axis=axes, keepdims=True), dtype=np.float64)


def regrid_all(tensors: Mapping[str, Quantized], share: float) -> dict[str, Regridded]:
    """Return all tensors on the old grid; beyond `share` of them, the most damaged ones on scales of their own.

    Raises:
        GridError: One of them cannot be put on any grid.
    """
    found = {name: tensor.regrid() for name, tensor in tensors.items()}
    by_harm = sorted(found, key=lambda name: (-found[name].tensor.noise, name))
    for name in by_harm[: len(found) - round(len(found) * share)]:
        found[name] = tensors[name].regrid(anew=True)
    return found


def outcome(tensors: Sequence[TensorGrid]) -> Literal["kept", "part", "new"]:
    """Return whether all scales are those of the version before, some of them, or none."""
    kept, channels = (sum(getattr(tensor, name) for tensor in tensors) for name in ("kept", "channels"))
    return "kept" if kept == channels else "part" if kept else "new"


def requantize(
    weights: Array, old: NDArray[Any], scale: Array, zero_point: Array | None
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return the nearest integers on the old grid, and which of them had to be clipped.

    Raises:
        GridError: The old integers are not of 8 bits, or the weights are not numbers.
    """
    low, high = _limits(old, zero_point)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        steps = np.asarray(weights, dtype=np.float64) / scale
    steps = np.where(np.asarray(weights) == 0, 0.0, steps)  # a channel of zeros may have scale zero
    if zero_point is not None:
        steps = steps + zero_point
    if np.isnan(steps).any():
        raise GridError("weights hold values that are not numbers")
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


def _tiny(scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a squared error that is none: float32 rounds the weights themselves so far."""
    return np.asarray(np.square(scale * _TIE), dtype=np.float64)
