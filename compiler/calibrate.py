"""From scores to routes: temperature, threshold and what they do, for one variant together with the heavy model.

The promise: with confidence 1 - delta over the drawing of the calibration data, at most `max_escalation` of requests
like these go up. Rules that keep it:
* The threshold is an order statistic chosen by the exact binomial bound: when k of n calibration scores lie below it,
  P(Binomial(n, max_escalation) <= k) <= delta. No assumption is made on how scores are distributed.
* A score equal to the threshold stays on the edge. So a plateau of equal scores can only lower the rate, never raise it
  above the bound.
* The temperature is fitted, and accepted or not, on rows that have no say in the threshold.
* Data that could use less than half of the allowed rate under this bound are refused, with the number that would do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from compiler.evaluate import (
    Floats,
    Labels,
    Logits,
    accuracy,
    agreement,
    expected_calibration_error,
    max_probability,
    negative_log_likelihood,
    route,
    routed_accuracy,
)
from isthmus.bundle import CurvePoint, OperatingPoint, VariantCalibration
from isthmus.errors import VerificationError

CURVE_POINTS: Final = 101
ALWAYS: Final = math.nextafter(1.0, 2.0)  # above every score
NEVER: Final = 0.0  # a score is positive
_LEAST_USE: Final = 0.5  # of the allowed rate
_TEMPERATURES: Final = (0.05, 20.0)
_FIT_SHARE: Final = 4  # one row in so many goes to the temperature ...
_FIT_ROWS: Final = 1000  # ... but no more than these


class TooFewSamplesError(VerificationError):
    """The calibration data cannot support the operating point."""

    reason = "too-few-samples"


@dataclass(frozen=True, slots=True)
class Threshold:
    """A threshold and the number of samples that it was chosen from."""

    value: float
    samples: int


def calibrate(light_logits: Logits, heavy_logits: Logits, labels: Labels, point: OperatingPoint) -> VariantCalibration:
    """Return the calibration record of one variant.

    Raises:
        TooFewSamplesError: The data cannot support the operating point.
    """
    fit, rest = divide(len(labels))
    temperature = choose_temperature(light_logits[fit], labels[fit])
    scores = max_probability(light_logits, temperature)
    threshold = choose_threshold(scores[rest], point).value
    escalated = route(scores, threshold)
    return VariantCalibration(
        temperature=temperature,
        threshold=threshold,
        escalation_rate=float(escalated.mean()),
        accuracy=routed_accuracy(light_logits, heavy_logits, labels, escalated),
        edge_accuracy=accuracy(light_logits, labels),
        agreement=agreement(light_logits, heavy_logits),
        ece_before=expected_calibration_error(light_logits, labels),
        ece_after=expected_calibration_error(light_logits, labels, temperature),
        curve=threshold_curve(light_logits, heavy_logits, labels, scores),
    )


def divide(count: int) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
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


def choose_threshold(scores: Floats, point: OperatingPoint) -> Threshold:
    """Return the largest threshold whose escalation rate is at most `point.value` with confidence 1 - `point.delta`.

    Raises:
        TooFewSamplesError: There are too few scores for it; the message says how many are needed.
    """
    count = len(scores)
    if point.value >= 1.0 or point.value <= 0.0:
        return Threshold(ALWAYS if point.value >= 1.0 else NEVER, count)
    allowed = largest_count(count, point.value, point.delta)
    if allowed < _LEAST_USE * point.value * count:
        needed = samples_needed(point.value, point.delta)
        raise TooFewSamplesError(
            f"{count} calibration samples cannot support 'escalate at most {point.value:g} with confidence "
            f"{1 - point.delta:g}': {needed} are needed for the threshold",
            hint=f"give at least {math.ceil(needed * _FIT_SHARE / (_FIT_SHARE - 1)) + 1} labelled samples "
            "(some go to the temperature), or ask for less confidence",
        )
    return Threshold(float(np.sort(scores)[allowed]), count)


def largest_count(count: int, rate: float, delta: float) -> int:
    """Return the largest k with P(Binomial(count, rate) <= k) <= delta, or -1 when there is none."""
    step, total, best = count * math.log1p(-rate), 0.0, -1
    odds = math.log(rate) - math.log1p(-rate)
    for successes in range(count + 1):
        total += math.exp(step)
        if total > delta:
            break
        best = successes
        if successes < count:
            step += math.log(count - successes) - math.log(successes + 1) + odds
    return best


def samples_needed(rate: float, delta: float) -> int:
    """Return the number of samples from which on the bound leaves at least half of the allowed rate in use."""
    high = 8
    while largest_count(high, rate, delta) < _LEAST_USE * rate * high:
        high *= 2
    enough = high
    while enough > 1 and largest_count(enough - 1, rate, delta) >= _LEAST_USE * rate * (enough - 1):
        enough -= 1
    return enough


def threshold_curve(
    light_logits: Logits, heavy_logits: Logits, labels: Labels, scores: Floats
) -> tuple[CurvePoint, ...]:
    """Return what thresholds from "never" to "always" do to these samples."""
    ordered = np.append(np.sort(scores), ALWAYS)
    places = np.rint(np.linspace(0, len(scores), CURVE_POINTS)).astype(np.int64)
    points = []
    for threshold in np.unique(ordered[places]).tolist():
        escalated = route(scores, threshold)
        points.append(
            CurvePoint(
                threshold=threshold,
                escalation_rate=float(escalated.mean()),
                accuracy=routed_accuracy(light_logits, heavy_logits, labels, escalated),
            )
        )
    return tuple(points)
