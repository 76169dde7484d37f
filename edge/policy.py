"""Light answer to route: how sure the light model is, and whether that is sure enough.

Pure functions of plain data: no clock, no I/O. The rules:

1. A row's score is its largest softmax probability at the calibration record's temperature; a request's score
   is that of its least certain row.
2. A request whose score is below the calibration record's threshold escalates.
3. A light answer that is not finite has no score and always escalates.
4. A caller may force a route with the request parameter `isthmus.route`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import InputError

Route = Literal["edge", "cloud", "fallback"]
ROUTES: Final[tuple[Route, ...]] = ("edge", "cloud", "fallback")
ROUTE_PARAMETER: Final = "isthmus.route"
_FEW: Final = 64  # numbers


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to escalate, and why; the reason is what the answer carries unless the escalation fails."""

    escalate: bool
    reason: Literal["confident", "uncertain", "not-finite", "requested"]


def score_rows(logits: NDArray[np.floating[Any]], temperature: float) -> NDArray[np.float64]:
    """Return each row's largest softmax probability at this temperature; NaN where the row is not finite."""
    rows = np.asarray(logits, dtype=np.float64)
    finite = np.isfinite(rows).all(axis=-1)
    if not finite.all():
        rows = np.where(finite[..., np.newaxis], rows, 0.0)
    # max(softmax(z)) = 1 / sum(exp(z - max(z))): no overflow, one pass.
    scores = 1.0 / np.exp((rows - rows.max(axis=-1, keepdims=True)) / temperature).sum(axis=-1)
    return np.where(finite, scores, np.nan)


def score_request(logits: NDArray[np.floating[Any]], temperature: float) -> float:
    """Return the score of the least certain row; NaN when any row is not finite."""
    if logits.size > _FEW or logits.ndim != 2:
        return float(score_rows(logits, temperature).min())
    # For a few numbers, one call of numpy takes longer than all of this.
    scores = [_score_row(row, temperature) for row in logits.tolist()]
    return math.nan if any(map(math.isnan, scores)) else min(scores)


def _score_row(row: list[float], temperature: float) -> float:
    top = max(row)
    if min(row) == -math.inf:
        return math.nan
    # A NaN anywhere, or an infinite top, makes the sum NaN.
    return 1.0 / sum([math.exp((value - top) / temperature) for value in row])


def decide(score: float, threshold: float, wanted: str | None = None) -> Decision:
    """Return whether a request with this score escalates.

    Args:
        score: From `score_request`.
        threshold: From the calibration record of the version that made the score.
        wanted: The caller's `isthmus.route`, None when absent.

    Raises:
        InputError: `wanted` is not a route that can be asked for.
    """
    if wanted is not None:
        return Decision(escalate=check_wanted(wanted) == "cloud", reason="requested")
    if math.isnan(score):
        return Decision(escalate=True, reason="not-finite")
    if score < threshold:
        return Decision(escalate=True, reason="uncertain")
    return Decision(escalate=False, reason="confident")


def check_wanted(wanted: object) -> str:
    """Return the route that the caller asked for.

    Raises:
        InputError: It is neither "edge" nor "cloud".
    """
    if wanted not in ("edge", "cloud"):
        raise InputError(f"parameter {ROUTE_PARAMETER}: expected 'edge' or 'cloud', got {str(wanted)[:40]!r}")
    return str(wanted)
