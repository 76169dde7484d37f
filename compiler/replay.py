"""A labelled set, replayed: what policies would have done with it, and what scores are worth.

A score orders requests; its figures are about every threshold at once:

* AURC, the area under the risk-coverage curve of the light model alone (Geifman et al., ICLR 2019); less is better;
* PGR at a share of escalations, the part of the gap between all edge and all cloud that is recovered; APGR, its mean
  over all shares; CPT(x), the least share of escalations that recovers x of the gap (Ong et al., RouteLLM, 2024).
  Drawing lots has an APGR of 0.5; more than 1 is possible, for the heavy model can be wrong where the light one is
  right.

A policy decides; its figures are about what it did. Intervals are percentile bootstrap (Efron & Tibshirani, 1993) over
rows, with the same draws for all, so that what is compared is compared on the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compiler.evaluate import CONFIDENCE, Flags, Floats, area_under_risk
from isthmus.bundle import VariantCalibration
from isthmus.policies import Case, Link, make_policy
from isthmus.policies.cost import expected_seconds

TARGETS: Final = (0.5, 0.8, 0.95)  # of CPT
_LEAST_GAP: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Rows:
    """A labelled set, answered by both models."""

    scores: Floats
    light_right: Flags
    cloud_right: Flags
    probabilities: Floats | None  # [rows, classes]; sequences have none
    bytes_up: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, slots=True)
class Figure:
    """A value and the ends of its interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class ScoreFigures:
    """What an order of requests is worth."""

    aurc: Figure
    apgr: Figure
    cpt: dict[float, Figure]
    accuracy: dict[float, Figure]  # by share of escalations


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """What a policy did."""

    escalated: Figure
    accuracy: Figure
    edge_risk: Figure  # errors among the answers that stayed
    pgr: Figure
    bytes_per_request: float
    latency_ms: float | None


def draws(count: int, number: int, seed: int = 0) -> NDArray[np.int64]:
    """Return the rows of each bootstrap sample, [number, count]."""
    return np.random.default_rng(seed).integers(0, count, (number, count), dtype=np.int64)


def judge_score(
    scores: Floats, light_right: Flags, cloud_right: Flags, samples: NDArray[np.int64], shares: Sequence[float]
) -> ScoreFigures:
    """Return what sending up the rows with the lowest scores first is worth."""
    whole = _score_figures(scores, light_right, cloud_right, shares)
    drawn = [_score_figures(scores[rows], light_right[rows], cloud_right[rows], shares) for rows in samples]
    figures = [_figure(value, [each[place] for each in drawn]) for place, value in enumerate(whole)]
    first, last = 2, 2 + len(TARGETS)
    return ScoreFigures(
        aurc=figures[0],
        apgr=figures[1],
        cpt=dict(zip(TARGETS, figures[first:last], strict=True)),
        accuracy=dict(zip(shares, figures[last:], strict=True)),
    )


def _score_figures(scores: Floats, light: Flags, cloud: Flags, shares: Sequence[float]) -> list[float]:
    """Return AURC, APGR, CPT at each target (NaN: never reached), accuracy at each share."""
    count = len(scores)
    gain = (cloud.astype(np.int64) - light)[np.argsort(scores, kind="stable")]
    right = (light.sum() + np.concatenate([[0], np.cumsum(gain)])) / count
    gap = right[-1] - right[0]
    recovered = (right - right[0]) / gap if abs(gap) > _LEAST_GAP else np.full(count + 1, np.nan)
    cpt = [float(np.argmax(recovered >= t)) / count if (recovered >= t).any() else float("nan") for t in TARGETS]
    places = [round(share * count) for share in shares]
    return [
        area_under_risk(scores, light),
        float(recovered.mean()),
        *cpt,
        *(float(right[place]) for place in places),
    ]


def oracle_scores(light_right: Flags, cloud_right: Flags) -> Floats:
    """Return the scores of one who knows: what the cloud mends goes up first, what it spoils last."""
    return np.asarray(0.5 - 0.5 * (cloud_right.astype(np.float64) - light_right))


def replay(text: str, point: VariantCalibration, rows: Rows, link: Link, *, seed: int = 0) -> Flags:
    """Return which rows a policy escalates, shown to it in their order.

    Raises:
        ConfigError: There is no such policy, or a parameter is out of range.
    """
    policy = make_policy(text, point, chance=random.Random(seed))  # noqa: S311 - no secret
    gain = rows.cloud_right.astype(np.float64) - rows.light_right
    return np.array(
        [
            policy.escalates(
                Case(
                    float(rows.scores[row]),
                    bytes_up=int(rows.bytes_up[row]),
                    link=link,
                    probabilities=None if rows.probabilities is None else rows.probabilities[row],
                    gain=float(gain[row]),
                )
            )
            for row in range(len(rows))
        ],
        dtype=np.bool_,
    )


def judge_policy(
    escalated: Flags, rows: Rows, samples: NDArray[np.int64], *, link: Link, light_ms: float | None
) -> PolicyFigures:
    """Return what these decisions come to.

    Args:
        escalated: The decisions.
        rows: What they were about.
        samples: From `draws`.
        link: What an escalation takes, besides the light model.
        light_ms: The light model's time.
    """
    right = np.where(escalated, rows.cloud_right, rows.light_right)

    def figures(at: NDArray[np.int64] | slice) -> list[float]:
        up, light, cloud = escalated[at], rows.light_right[at], rows.cloud_right[at]
        kept, gap = ~up, cloud.mean() - light.mean()
        accuracy = right[at].mean()
        risk = (~light[kept]).mean() if kept.any() else np.nan
        return [up.mean(), accuracy, risk, (accuracy - light.mean()) / gap if abs(gap) > _LEAST_GAP else np.nan]

    drawn = [figures(sample) for sample in samples]
    whole = figures(slice(None))
    escalation, accuracy, risk, pgr = (_figure(v, [each[i] for each in drawn]) for i, v in enumerate(whole))
    seconds = np.array([expected_seconds(link, int(size)) for size in rows.bytes_up])
    return PolicyFigures(
        escalated=escalation,
        accuracy=accuracy,
        edge_risk=risk,
        pgr=pgr,
        bytes_per_request=float((rows.bytes_up * escalated).mean()),
        latency_ms=None if light_ms is None else float(light_ms + 1e3 * (seconds * escalated).mean()),
    )


def _figure(value: Any, drawn: Sequence[float]) -> Figure:
    if not np.isfinite(value):
        return Figure(None, None, None)
    finite = [each for each in drawn if np.isfinite(each)]
    if not finite:
        return Figure(float(value), None, None)
    low, high = np.quantile(finite, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Figure(float(value), float(low), float(high))
