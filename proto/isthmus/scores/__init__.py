"""How sure a light answer is: one file for each score, loaded only when it is chosen.

The compiler chooses a threshold for the very numbers that the device compares with it, so both sides compute scores
here. Rules that every score keeps, checked by one contract suite over the whole table (tests/isthmus/scores):

1. There is one score for each row, in [0, 1], and 1 is surest.
2. A row that is not finite has no score (NaN) and escalates.
3. Nothing found is hard, not easy: no boxes and no tokens score 0.
4. The score of a row depends on that row alone; of a request, the least certain row counts.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import BundleError

Floats = NDArray[np.float64]

SCORES: Final[Mapping[str, str]] = {
    "max_probability": "isthmus.scores.max_probability:MaxProbability",
    "margin": "isthmus.scores.margin:Margin",
    "entropy": "isthmus.scores.entropy:Entropy",
    "energy": "isthmus.scores.energy:Energy",
    "learned": "isthmus.scores.learned:Learned",
    "sequence": "isthmus.scores.sequence:Sequence",
    "detection": "isthmus.scores.detection:Detection",
}
CLASSIFICATION: Final = ("max_probability", "margin", "entropy", "energy", "learned")  # read one logit per class
HEAD: Final = "deferral.safetensors"  # the learned score's weights, in the variant's folder


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """What a score is made from; each takes what it needs."""

    output: str  # the output that it reads
    temperature: float = 1.0  # divides logits before the softmax
    features: str = ""  # a further output that the learned score reads
    head: Path | None = None  # the learned score's weights
    costs: tuple[float, ...] = ()  # of a wrong answer, by class of the answer; empty: all alike


class Score(Protocol):
    """A score; `outputs` are the light model's, each with the rows in front."""

    def __call__(self, outputs: Mapping[str, NDArray[Any]]) -> Floats:
        """Return the score of each row."""
        ...


class _Score(Protocol):
    def __call__(self, options: ScoreOptions) -> Score: ...


def open_score(name: str, options: ScoreOptions) -> Score:
    """Return the score of this name, weighted by the costs of the classes where there are any.

    Raises:
        BundleError: There is no such score here, or its file is missing or malformed.
    """
    if name not in SCORES:
        raise BundleError(f"no score {name[:40]!r}; there are {', '.join(SCORES)}", reason="unknown-score")
    module, _, attribute = SCORES[name].partition(":")
    make: _Score = getattr(importlib.import_module(module), attribute)
    score = make(options)
    if not options.costs:
        return score
    from isthmus.scores.costs import ByCost

    return ByCost(score, options)
