"""The calibration record of one variant together with the heavy model: from answers to a threshold and its promise.

Rows are dealt out once: the temperature, the order of the tests and the weight of fusion come from rows that have no
say in the threshold; the threshold comes from the others, and so does everything that is promised of it. What describes
the data (curves, rates, agreement) is measured on all rows.

What is promised, and how, is compiler.operating_point's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from compiler.evaluate import (
    Flags,
    Floats,
    Labels,
    Logits,
    area_under_risk,
    calibration_gap,
    correct,
    expected_calibration_error,
    negative_log_likelihood,
    route,
)
from compiler.fusion import choose_fusion
from compiler.operating_point import ALWAYS, Evidence, choose
from isthmus.bundle import CurvePoint, Fusion, GainStep, OperatingPoint, VariantCalibration
from isthmus.decoding import Decoding, decode, same_answers
from isthmus.fusion import fuse
from isthmus.scores import ScoreOptions, open_score
from isthmus.scores.costs import class_thresholds
from isthmus.tensors import Array

CURVE_POINTS: Final = 101
_TEMPERATURES: Final = (0.05, 20.0)
_FIT_SHARE: Final = 4  # one row in so many goes to the temperature ...
_FIT_ROWS: Final = 1000  # ... but no more than these
_GAIN_STEPS: Final = 64


@dataclass(frozen=True, slots=True)
class Answers:
    """What both models said to the calibration data; the first axis of every array counts samples."""

    light: Mapping[str, Array]  # the compiled variant's outputs, at least those that the score reads
    heavy: Logits
    labels: Labels
    output: str = "logits"  # the light output with one logit per class, or per token
    decoding: Decoding = ""

    @property
    def logits(self) -> Logits:
        """Return the light model's logits."""
        return self.light[self.output]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the operator asked for."""

    point: OperatingPoint
    score: str = "max_probability"
    costs: tuple[float, ...] = ()
    fusion: Literal["auto", "off"] = "auto"
    features: str = ""
    head: Path | None = None  # the learned score's weights


def calibrate(answers: Answers, wish: Wish) -> VariantCalibration:
    """Return the calibration record of one variant.

    Raises:
        TooFewSamplesError: The data cannot support the operating point.
    """
    fit, rest = divide(len(answers))
    logits, heavy, labels = answers.logits, answers.heavy, answers.labels
    decoding = answers.decoding
    # How sure a sequence is depends on its alignment, which labels do not tell: its temperature is left alone.
    temperature = 1.0 if decoding else choose_temperature(logits[fit], labels[fit])
    scores = score_rows(answers.light, answers.output, temperature, wish)
    fused = wish.fusion == "auto" and not decoding  # two alignments have no mean
    fusion = choose_fusion(logits, heavy, labels, temperature, fit, rest) if fused else None
    light_right = correct(logits, labels, decoding)
    cloud_right = correct(cloud_answers(answers, temperature, fusion), labels, decoding)
    evidence = Evidence(scores, light_right, cloud_right)
    # The target of accuracy is tested on rows that decided about fusion: one of two, so each may fail half as often.
    halved = wish.point.kind == "target_accuracy" and fused
    point = wish.point.model_copy(update={"delta": wish.point.delta / 2}) if halved else wish.point
    threshold = choose(point, evidence.take(fit), evidence.take(rest), samples=len(answers))
    escalated = route(scores, threshold.value)
    same = same_answers(decode(logits, decoding), decode(heavy, decoding))
    gaps = (
        (calibration_gap(scores, light_right),) * 2
        if decoding
        else tuple(expected_calibration_error(logits, labels, divisor) for divisor in (1.0, temperature))
    )
    return VariantCalibration(
        temperature=temperature,
        threshold=threshold.value,
        class_thresholds=class_thresholds(threshold.value, wish.costs) if wish.costs else (),
        bound=threshold.bound,
        samples=threshold.samples,
        escalation_rate=float(escalated.mean()),
        accuracy=float(np.where(escalated, evidence.cloud_right, evidence.light_right).mean()),
        edge_accuracy=float(light_right.mean()),
        agreement=float(same.mean()),
        edge_agreement=None if escalated.all() else float(same[~escalated].mean()),
        mends=float((evidence.cloud_right & ~evidence.light_right).mean()),
        spoils=float((evidence.light_right & ~evidence.cloud_right).mean()),
        ece_before=gaps[0],
        ece_after=gaps[1],
        aurc=area_under_risk(scores, evidence.light_right),
        scores=tuple(float(value) for value in np.quantile(scores, np.linspace(0.0, 1.0, 101))),
        gains=gain_steps(evidence),
        fusion=fusion,
        curve=threshold_curve(evidence),
    )


def cloud_answers(answers: Answers, temperature: float, fusion: Fusion | None) -> Logits:
    """Return what escalated requests are answered with."""
    if fusion is None:
        return answers.heavy
    return fuse(answers.logits, answers.heavy, temperature=temperature, light_weight=fusion.light_weight)


def score_rows(light: Mapping[str, Array], output: str, temperature: float, wish: Wish) -> Floats:
    """Return the score of each row, as the device will compute it."""
    options = ScoreOptions(output, temperature, features=wish.features, head=wish.head, costs=wish.costs)
    return open_score(wish.score, options)(light)


def divide(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows for the temperature, spread evenly, and the rows for the threshold."""
    every = max(_FIT_SHARE, -(-count // _FIT_ROWS))
    rows = np.arange(count, dtype=np.int64)
    return rows[rows % every == every - 1], rows[rows % every != every - 1]


def choose_temperature(logits: Logits, labels: Labels) -> float:
    """Return the temperature fitted on every other row, or 1 when it does not lower the error on the others."""
    if len(labels) < 4:
        return 1.0
    fitted = fit_temperature(logits[::2], labels[::2])
    held_out, truth = logits[1::2], labels[1::2]
    better = expected_calibration_error(held_out, truth, fitted) < expected_calibration_error(held_out, truth)
    return fitted if better else 1.0


def fit_temperature(logits: Logits, labels: Labels) -> float:
    """Return the temperature with the least negative log-likelihood, by golden-section search on its logarithm."""
    low, high = (math.log(bound) for bound in _TEMPERATURES)
    ratio = (math.sqrt(5.0) - 1.0) / 2.0

    def loss(value: float) -> float:
        return negative_log_likelihood(logits, labels, math.exp(value))

    first, second = high - ratio * (high - low), low + ratio * (high - low)
    at_first, at_second = loss(first), loss(second)
    for _ in range(40):
        if at_first <= at_second:
            high, second, at_second = second, first, at_first
            first = high - ratio * (high - low)
            at_first = loss(first)
        else:
            low, first, at_first = first, second, at_second
            second = low + ratio * (high - low)
            at_second = loss(second)
    return round(math.exp((low + high) / 2.0), 4)


def threshold_curve(rows: Evidence) -> tuple[CurvePoint, ...]:
    """Return what thresholds from "never" to "always" do to these samples."""
    ordered = np.append(np.sort(rows.scores), ALWAYS)
    places = np.rint(np.linspace(0, len(rows), CURVE_POINTS)).astype(np.int64)
    return tuple(_curve_point(rows, threshold) for threshold in np.unique(ordered[places]).tolist())


def _curve_point(rows: Evidence, threshold: float) -> CurvePoint:
    escalated = route(rows.scores, threshold)
    return CurvePoint(
        threshold=threshold,
        escalation_rate=float(escalated.mean()),
        accuracy=float(np.where(escalated, rows.cloud_right, rows.light_right).mean()),
        risk=None if escalated.all() else float((~rows.light_right)[~escalated].mean()),
    )


def gain_steps(rows: Evidence) -> tuple[GainStep, ...]:
    """Return the expected gain of escalating by score: isotonic regression that falls (pool adjacent violators)."""
    order = np.argsort(rows.scores, kind="stable")
    gain = _signed(rows.cloud_right, rows.light_right)[order]
    scores = rows.scores[order]
    blocks: list[list[float]] = []  # first score, sum, count
    for chunk in np.array_split(np.arange(len(order)), min(_GAIN_STEPS, len(order))):
        blocks.append([float(scores[chunk[0]]), float(gain[chunk].sum()), float(len(chunk))])
        while len(blocks) > 1 and blocks[-1][1] / blocks[-1][2] >= blocks[-2][1] / blocks[-2][2]:
            _, total, count = blocks.pop()
            blocks[-1][1] += total
            blocks[-1][2] += count
    return tuple(GainStep(score=score, gain=total / count) for score, total, count in blocks)


def _signed(better: Flags, worse: Flags) -> Floats:
    return better.astype(np.float64) - worse.astype(np.float64)
