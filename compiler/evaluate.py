"""What models are worth: metrics with intervals, agreement, calibration error, and the areas under two curves.

Pure functions of arrays: logits are [samples, classes], labels and scores [samples]; of sequences [samples, positions,
tokens] and [samples, tokens] (isthmus.decoding). Nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.decoding import Decoding, decode, same_answers
from isthmus.scores import ScoreOptions, open_score

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Labels = NDArray[np.int64]
Logits = NDArray[Any]

ECE_BINS: Final = 15
DRAWS: Final = 1000  # of the bootstrap
CONFIDENCE: Final = 0.95


def max_probability(logits: Logits, temperature: float = 1.0) -> Floats:
    """Return the largest probability of each row after dividing the logits by `temperature`."""
    return open_score("max_probability", ScoreOptions("logits", temperature))({"logits": logits})


def route(scores: Floats, threshold: float) -> Flags:
    """Return which rows go up: those whose score lies below the threshold."""
    return np.asarray(scores < threshold)


def correct(logits: Logits, labels: Labels, decoding: Decoding = "") -> Flags:
    """Return which rows say what the label says; a sequence is right as a whole, or wrong."""
    return same_answers(decode(logits, decoding), labels)


def accuracy(logits: Logits, labels: Labels, decoding: Decoding = "") -> float:
    """Return the share of rows that are right."""
    return float(correct(logits, labels, decoding).mean())


def _share_right(right: Floats, labels: Floats, answers: Floats) -> Floats:
    del answers
    return np.asarray(right.sum(axis=-1) / labels.sum(axis=-1))


def _mean_recall(right: Floats, labels: Floats, answers: Floats) -> Floats:
    del answers
    recall = np.divide(right, labels, out=np.zeros_like(right), where=labels > 0)
    return np.asarray(recall.sum(axis=-1) / np.maximum((labels > 0).sum(axis=-1), 1))


def _mean_f1(right: Floats, labels: Floats, answers: Floats) -> Floats:
    both = labels + answers
    score = np.divide(2 * right, both, out=np.zeros_like(right), where=both > 0)
    return np.asarray(score.sum(axis=-1) / np.maximum((both > 0).sum(axis=-1), 1))


# What a recipe may measure a model by: a function of three counts per class, [..., classes]: how often the answer was
# this class and right, how often the label was this class, how often the answer was. All are shares, 1 is best.
METRICS: Final[Mapping[str, Callable[[Floats, Floats, Floats], Floats]]] = {
    "accuracy": _share_right,
    "balanced-accuracy": _mean_recall,
    "macro-f1": _mean_f1,
}


def measure(metric: str, logits: Logits, labels: Labels, decoding: Decoding = "") -> float:
    """Return one of `METRICS` over all rows."""
    answers, truth = _as_classes(logits, labels, decoding)
    return float(METRICS[metric](*_counts(answers, truth, np.ones((1, len(truth)))))[0])


@dataclass(frozen=True, slots=True)
class Comparison:
    """A variant against the source on the same rows, each with the ends of its 95 % interval."""

    value: float
    interval: tuple[float, float]
    drop: float  # source - variant
    drop_interval: tuple[float, float]


def compare(metric: str, logits: Logits, source: Logits, labels: Labels, decoding: Decoding = "") -> Comparison:
    """Return how two models do on the same rows, with percentile bootstrap intervals (Efron & Tibshirani, 1993).

    Rows are drawn for both models together, since their errors go together: the interval of the difference is far
    narrower than the two intervals suggest. The draws are seeded, so that the same data give the same interval.
    """
    (ours, truth), (theirs, _) = (_as_classes(answers, labels, decoding) for answers in (logits, source))
    cells, row_of = np.unique(np.stack([truth, ours, theirs]), axis=1, return_inverse=True)
    rows = np.bincount(row_of.reshape(-1), minlength=cells.shape[1])
    rng = np.random.default_rng(0)
    draws = np.concatenate([rows[None], rng.multinomial(len(labels), rows / len(labels), size=DRAWS)]).astype(float)
    ours_by_draw, theirs_by_draw = (
        METRICS[metric](*_counts(cells[answers], cells[0], draws, classes=logits.shape[-1])) for answers in (1, 2)
    )
    drops = theirs_by_draw - ours_by_draw
    return Comparison(float(ours_by_draw[0]), _interval(ours_by_draw[1:]), float(drops[0]), _interval(drops[1:]))


def _as_classes(logits: Logits, labels: Labels, decoding: Decoding) -> tuple[Labels, Labels]:
    """Return answers and truth as classes; of sequences there are two, those that are right (1) and the others."""
    if not decoding:
        return np.argmax(logits, axis=1), labels
    return correct(logits, labels, decoding).astype(np.int64), np.ones(len(labels), np.int64)


def _counts(answers: Labels, labels: Labels, weights: Floats, classes: int = 0) -> tuple[Floats, Floats, Floats]:
    """Return the three counts per class of `METRICS`, [draws, classes]; `weights` is [draws, rows]."""
    classes = classes or int(max(answers.max(), labels.max())) + 1
    one = np.eye(classes)
    right = one[answers] * (answers == labels)[:, None]
    return weights @ right, weights @ one[labels], weights @ one[answers]


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def area_under_risk(scores: Floats, right: Flags) -> float:
    """Return the mean selective risk over all coverages, the surest rows first (AURC; Geifman et al., ICLR 2019)."""
    wrong = ~right[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(wrong) / np.arange(1, len(wrong) + 1)).mean())


def mean_accuracy(scores: Floats, light_right: Flags, cloud_right: Flags) -> float:
    """Return the accuracy when the least sure rows go up, averaged over all shares from none to a half."""
    gain = (cloud_right.astype(np.int64) - light_right)[np.argsort(scores, kind="stable")]
    right = light_right.sum() + np.concatenate([[0], np.cumsum(gain)])
    return float(right[: len(gain) // 2 + 1].mean() / len(gain))


def expected_calibration_error(logits: Logits, labels: Labels, temperature: float = 1.0) -> float:
    """Return the mean gap between the largest probability and accuracy."""
    return calibration_gap(max_probability(logits, temperature), correct(logits, labels))


def calibration_gap(scores: Floats, right: Flags) -> float:
    """Return the mean gap between score and accuracy, over `ECE_BINS` bins of equal width."""
    bins = np.minimum((scores * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    gaps = np.bincount(bins, weights=scores - right, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(scores))


def negative_log_likelihood(logits: Logits, labels: Labels, temperature: float = 1.0) -> float:
    """Return the mean negative log-likelihood of the labels."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    return float((np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(len(labels)), labels]).mean())
