"""From what an operator asks for to a threshold, with a guarantee that holds for every sample size, or a refusal.

Three kinds of operating point, each with confidence 1 - delta over the drawing of the calibration data:

* `max_escalation`: the threshold is an order statistic chosen by the exact binomial bound: when k of n scores lie below
  it, P(Binomial(n, value) <= k) <= delta. No assumption is made on how scores are distributed.
* `max_risk`: selective risk (Geifman & El-Yaniv, NIPS 2017): of the answers that stay on the edge, at most `value` are
  wrong. For one threshold fixed beforehand, the errors among the kept rows are binomial, which gives an exact p-value
  for "the risk is larger".
* `target_accuracy`: the whole, edge and cloud together, is right for at least `value` of all requests; likewise.

Many thresholds are tried, so the last two are Learn then Test (Angelopoulos, Bates, Candes, Jordan & Lei, 2021) with
fixed-sequence testing: the thresholds and their order come from rows that have no say in the tests, testing goes from
the most promising one towards fewer escalations, and ends at the first that fails. No correction for their number is
needed, and the answer is the last that passed.

A score equal to the threshold stays on the edge, so that a plateau of equal scores cannot raise the escalation rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from compiler.bounds import binomial_cdf, largest_count, lower_bound, upper_bound
from compiler.evaluate import Flags, Floats, route
from isthmus.bundle import OperatingPoint
from isthmus.errors import VerificationError

ALWAYS: Final = math.nextafter(1.0, 2.0)  # above every score
NEVER: Final = 0.0  # no score is negative
_LEAST_USE: Final = 0.5  # of the allowed rate
_GRID: Final = 100  # thresholds that are tried
_NEWTON_STEPS: Final = 25
_RIDGE: Final = 0.5
_INSIDE: Final = 1e-6  # how near to 0 and 1 scores are told apart
_NINE_OF_TEN: Final = 1.2816  # quantile of the normal distribution
_MOST_SAMPLES: Final = 10_000_000  # that anybody is told to collect


class TooFewSamplesError(VerificationError):
    """The calibration data cannot support the operating point."""

    reason = "too-few-samples"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Rows of calibration data: score, and whether each model is right."""

    scores: Floats
    light_right: Flags
    cloud_right: Flags  # the answer that an escalated request gets

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Evidence:
        """Return these rows."""
        return Evidence(self.scores[rows], self.light_right[rows], self.cloud_right[rows])


@dataclass(frozen=True, slots=True)
class Threshold:
    """A threshold, the number of samples that had a say in it, and what is promised of it."""

    value: float
    samples: int
    bound: float | None = None  # of the rate, the risk or the accuracy, with the confidence that was asked for


def choose(point: OperatingPoint, fit: Evidence, rest: Evidence, *, samples: int) -> Threshold:
    """Return the threshold with the fewest escalations that keeps the promise; for `max_escalation` the most.

    Args:
        point: What is asked for.
        fit: Rows from which the order of the tests is taken; they have no say in the tests.
        rest: Rows that are tested on.
        samples: All rows that the operator gave; the number that is needed is told in proportion.

    Raises:
        TooFewSamplesError: The data cannot support it; the message says how many would, or that none would.
    """
    share = len(rest) / max(samples, 1)
    if point.kind == "max_escalation":
        return choose_by_rate(rest.scores, point, share=share)
    tests = _Risk(point) if point.kind == "max_risk" else _Accuracy(point)
    return _fixed_sequence(tests, point, fit, rest, share)


def choose_by_rate(scores: Floats, point: OperatingPoint, *, share: float = 1.0) -> Threshold:
    """Return the largest threshold whose escalation rate is at most `point.value` with confidence 1 - `point.delta`.

    Raises:
        TooFewSamplesError: Fewer than half of the allowed rate could be used.
    """
    count = len(scores)
    if point.value >= 1.0 or point.value <= 0.0:
        return Threshold(ALWAYS if point.value >= 1.0 else NEVER, count, point.value)
    allowed = largest_count(count, point.value, point.delta)
    if allowed < _LEAST_USE * point.value * count:
        needed = samples_needed(point.value, point.delta)
        raise TooFewSamplesError(
            f"{count} calibration samples cannot support 'escalate at most {point.value:g} with confidence "
            f"{1 - point.delta:g}': {needed} are needed for the threshold",
            hint=f"give at least {math.ceil(needed / share) + 1} labelled samples "
            "(some go to the temperature), or ask for less confidence",
        )
    threshold = float(np.sort(scores)[allowed])
    return Threshold(threshold, count, upper_bound(int((scores < threshold).sum()), count, point.delta))


def samples_needed(rate: float, delta: float) -> int:
    """Return the number of samples from which on the bound leaves at least half of the allowed rate in use."""
    high = 8
    while largest_count(high, rate, delta) < _LEAST_USE * rate * high:
        high *= 2
    enough = high
    while enough > 1 and largest_count(enough - 1, rate, delta) >= _LEAST_USE * rate * (enough - 1):
        enough -= 1
    return enough


@dataclass(frozen=True, slots=True)
class _Counts:
    """What one threshold does to some rows: trials, and hits among them."""

    trials: int
    hits: int


class _Risk:
    """The claim to refute: of the answers that stay, more than `value` are wrong."""

    def __init__(self, point: OperatingPoint) -> None:
        self._value, self._delta = point.value, point.delta
        self.promise = f"at most {point.value:g} of the edge's answers wrong with confidence {1 - point.delta:g}"

    def thresholds(self, scores: Floats) -> list[float]:
        """Return candidates from the fewest answers kept to all of them."""
        return [*_quantiles(scores)[::-1], NEVER]

    def count(self, rows: Evidence, threshold: float) -> _Counts:
        """Return kept answers and errors among them."""
        kept = ~route(rows.scores, threshold)
        return _Counts(int(kept.sum()), int((kept & ~rows.light_right).sum()))

    def expect(self, scores: Floats, light: Floats, cloud: Floats, threshold: float) -> tuple[float, float]:
        """Return kept answers and the errors among them that the chances of errors let expect."""
        del cloud
        kept = ~route(scores, threshold)
        return float(kept.sum()), float(light[kept].sum())

    def p_value(self, counts: _Counts) -> float:
        """Return the chance of so few errors, were the risk just `value`."""
        return binomial_cdf(counts.hits, counts.trials, self._value) if counts.trials else 1.0

    def bound(self, counts: _Counts) -> float:
        """Return the risk that is not exceeded."""
        return upper_bound(counts.hits, counts.trials, self._delta)

    def best(self, rate: float) -> str:
        """Describe the best that any threshold does."""
        return f"even of the surest answers {rate:.1%} are wrong"

    def hopeless(self, rate: float) -> bool:
        """Return whether no number of samples would do."""
        return rate >= self._value


class _Accuracy:
    """The claim to refute: fewer than `value` of all answers are right."""

    def __init__(self, point: OperatingPoint) -> None:
        self._value, self._delta = point.value, point.delta
        self.promise = f"at least {point.value:g} of all answers right with confidence {1 - point.delta:g}"

    def thresholds(self, scores: Floats) -> list[float]:
        """Return candidates from everything escalated to nothing."""
        return [ALWAYS, *_quantiles(scores)[::-1], NEVER]

    def count(self, rows: Evidence, threshold: float) -> _Counts:
        """Return answers and errors among them."""
        right = np.where(route(rows.scores, threshold), rows.cloud_right, rows.light_right)
        return _Counts(len(rows), int((~right).sum()))

    def expect(self, scores: Floats, light: Floats, cloud: Floats, threshold: float) -> tuple[float, float]:
        """Return answers and the errors among them that the chances of errors let expect."""
        return float(len(scores)), float(np.where(route(scores, threshold), cloud, light).sum())

    def p_value(self, counts: _Counts) -> float:
        """Return the chance of so few errors, were the accuracy just `value`."""
        return binomial_cdf(counts.hits, counts.trials, 1.0 - self._value) if counts.trials else 1.0

    def bound(self, counts: _Counts) -> float:
        """Return the accuracy that is reached at least."""
        return lower_bound(counts.trials - counts.hits, counts.trials, self._delta)

    def best(self, rate: float) -> str:
        """Describe the best that any threshold does."""
        return f"the best that any threshold reaches is {1 - rate:.1%}"

    def hopeless(self, rate: float) -> bool:
        """Return whether no number of samples would do."""
        return 1.0 - rate <= self._value


def _fixed_sequence(
    tests: _Risk | _Accuracy, point: OperatingPoint, fit: Evidence, rest: Evidence, share: float
) -> Threshold:
    thresholds = tests.thresholds(fit.scores)
    start = _most_promising(tests, thresholds, fit, len(rest))
    passed: tuple[float, _Counts] | None = None
    for threshold in thresholds[start:]:
        counts = tests.count(rest, threshold)
        if tests.p_value(counts) > point.delta:
            break
        passed = threshold, counts
    if passed is None:
        raise _refusal(tests, point, thresholds, fit, rest, share)
    return Threshold(passed[0], len(rest), tests.bound(passed[1]))


def _most_promising(tests: _Risk | _Accuracy, thresholds: Sequence[float], fit: Evidence, count: int) -> int:
    """Return where to start: the threshold that would pass most clearly if `count` other rows were like these.

    The few errors of a few rows are smoothed first. A poor start costs escalations, or a refusal; it breaks no promise.
    """
    smooth = (_smoothed_errors(fit.scores, fit.light_right), _smoothed_errors(fit.scores, fit.cloud_right))

    def expected(place: int) -> tuple[float, int]:
        seen = tests.expect(fit.scores, *smooth, thresholds[place])
        trials = int(seen[0] * count / max(len(fit), 1))
        return tests.p_value(_Counts(trials, math.ceil(seen[1] * count / max(len(fit), 1)))), -place

    return min(range(len(thresholds)), key=expected)


def _smoothed_errors(scores: Floats, right: Flags) -> Floats:
    """Return each row's chance of an error: logistic regression on the score's log-odds (Platt, 1999) and rank."""
    if len(scores) < 2:
        return (~right).astype(np.float64)
    rank = np.argsort(np.argsort(scores, kind="stable"), kind="stable") / (len(scores) - 1) - 0.5
    inside = np.clip(scores, _INSIDE, 1.0 - _INSIDE)
    odds = np.log(inside) - np.log1p(-inside)
    odds = (odds - odds.mean()) / max(float(odds.std()), 1e-9)
    design = np.stack([np.ones_like(rank), odds, rank, rank**2], axis=1)
    weights = np.zeros(design.shape[1])
    for _ in range(_NEWTON_STEPS):
        chance = 1.0 / (1.0 + np.exp(-np.clip(design @ weights, -30.0, 30.0)))
        slope = design.T @ (~right - chance) - _RIDGE * weights
        curvature = (design * (chance * (1.0 - chance))[:, np.newaxis]).T @ design + _RIDGE * np.eye(design.shape[1])
        weights = weights + np.linalg.solve(curvature, slope)
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(design @ weights, -30.0, 30.0))))


def _refusal(
    tests: _Risk | _Accuracy,
    point: OperatingPoint,
    thresholds: Sequence[float],
    fit: Evidence,
    rest: Evidence,
    share: float,
) -> TooFewSamplesError:
    every = Evidence(*(np.concatenate(pair) for pair in zip(_parts(fit), _parts(rest), strict=True)))
    smooth = (_smoothed_errors(every.scores, every.light_right), _smoothed_errors(every.scores, every.cloud_right))
    seen = [tests.expect(every.scores, *smooth, threshold) for threshold in thresholds]
    # A threshold that keeps hardly anything has too few trials to say what its rate is.
    seen = [(kept, errors) for kept, errors in seen if kept >= max(len(every) // 50, 10)]
    said = f"{len(rest)} calibration samples cannot support '{tests.promise}'"
    best = min((errors / kept for kept, errors in seen), default=1.0)
    possible = [(kept, errors) for kept, errors in seen if not tests.hopeless(errors / kept)]
    needed = min(
        (_needed(tests.p_value, kept / len(every), errors / kept, point.delta) for kept, errors in possible),
        default=_MOST_SAMPLES,
    )
    needed = max(needed, len(rest) + len(rest) // 4)  # this drawing may have been an unlucky one
    if needed >= _MOST_SAMPLES:
        return TooFewSamplesError(
            f"{said}, and more of them would not: {tests.best(best)}",
            hint="ask for less, train a better light model, or take another score",
        )
    return TooFewSamplesError(
        f"{said}: about {needed} are needed for the threshold",
        hint=f"give about {math.ceil(needed / share)} labelled samples (some go to the temperature), or ask for less",
    )


def _needed(p_value: Callable[[_Counts], float], share: float, rate: float, delta: float) -> int:
    """Return how many rows would pass in nine of ten drawings, with this share of trials and rate of errors."""

    def passes(count: int) -> bool:
        trials = int(share * count)
        hits = rate * trials
        return p_value(_Counts(trials, math.ceil(hits + _NINE_OF_TEN * math.sqrt(hits)))) <= delta

    high = 16
    while not passes(high):
        high *= 2
        if high >= _MOST_SAMPLES:
            return _MOST_SAMPLES
    low = high // 2
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def _parts(rows: Evidence) -> tuple[Floats, Flags, Flags]:
    return rows.scores, rows.light_right, rows.cloud_right


def _quantiles(scores: Floats) -> list[float]:
    """Return scores at even shares, in order; the lowest is left out, for below it nothing lies."""
    if not len(scores):
        return []
    found = np.unique(np.quantile(scores, np.linspace(0.0, 1.0, _GRID + 1), method="higher"))
    return [float(value) for value in found[1:]]
