"""Detections: how sure the surest box is. No boxes is hard, not easy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.scores import Floats, ScoreOptions


class Detection:
    """The largest box score of each row, of scores [rows, boxes] or [rows, boxes, classes] between 0 and 1.

    Boxes that are only padding have scores of 0 or below.
    """

    def __init__(self, options: ScoreOptions) -> None:
        self._output = options.output

    def __call__(self, outputs: Mapping[str, NDArray[Any]]) -> Floats:
        """Return the score of each row."""
        boxes = np.asarray(outputs[self._output], dtype=np.float64)
        rows = boxes.reshape(len(boxes), int(np.prod(boxes.shape[1:], dtype=np.int64)))
        finite = np.isfinite(rows).all(axis=1)
        best = np.where(np.isfinite(rows), rows, 0.0).max(axis=1, initial=0.0)
        return np.where(finite, np.clip(best, 0.0, 1.0), np.nan)
