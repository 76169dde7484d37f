"""An escalation rate that holds while difficulty drifts.

A fixed threshold lets the rate drift with the data. This policy follows the data with the threshold: the quantile of
the newest scores at the wanted rate, corrected by what has been spent. What makes the promise is an account that never
leaves its band: `debt` grows by 1 - rate with an escalation and falls by rate without one, and no decision may take it
beyond `band`. The count over any n requests is n * rate plus the difference of two debts, so over any 1,000 requests it
differs from the wanted one by at most 2 * band = 10, one point, whatever the scores do.

The threshold stays within bounds that somebody has reviewed, [low, high]: below `low` everything escalates and from
`high` on nothing does, even where this breaks the rate; the account is then cut off at its band.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections import deque
from typing import Final

from isthmus.bundle import VariantCalibration
from isthmus.policies import Case, within

BAND: Final = 5.0  # requests
_WINDOW: Final = 512  # newest scores
_CORRECTION: Final = 0.5  # of the rate, at the edge of the band


class Budget:
    """Escalates the wanted share of requests, the least certain ones.

    Args:
        point: The calibration record: its operating point is the default rate, its scores are the first window.
        chance: Not used.
        rate: Share of requests that escalate.
        low: No threshold is lower.
        high: No threshold is higher.
    """

    def __init__(
        self,
        *,
        point: VariantCalibration,
        chance: random.Random,
        rate: float | None = None,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        del chance
        self._rate = within("rate", point.escalation_rate if rate is None else rate, 0.0, 1.0)
        self._low = within("low", low, 0.0, 1.0)
        self._high = within("high", high, low, 1.0)
        self._debt = 0.0
        self._newest: deque[float] = deque(_spread(point.scores))
        self._sorted = sorted(self._newest)
        self.threshold = self._next_threshold()

    def escalates(self, case: Case) -> bool:
        """Return whether this one goes up, and move the threshold."""
        decision = self._decide(case.score)
        self._debt += (1.0 if decision else 0.0) - self._rate
        self._debt = min(max(self._debt, -BAND), BAND)
        self._remember(case.score)
        self.threshold = self._next_threshold()
        return decision

    def _decide(self, score: float) -> bool:
        if score < self._low:
            return True
        if score >= self._high and self._high < 1.0:
            return False
        if self._debt + 1.0 - self._rate > BAND:
            return False
        if self._debt - self._rate < -BAND:
            return True
        return score < self.threshold

    def _next_threshold(self) -> float:
        if not self._sorted:
            return min(max(self._rate, self._low), self._high)
        share = self._rate * (1.0 - _CORRECTION * self._debt / BAND)
        place = share * len(self._sorted)
        index = min(int(place), len(self._sorted) - 1)
        return min(max(self._sorted[index], self._low), self._high)

    def _remember(self, score: float) -> None:
        self._newest.append(score)
        insort(self._sorted, score)
        if len(self._newest) > _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._newest.popleft())]


def _spread(quantiles: tuple[float, ...]) -> list[float]:
    """Return the quantiles in an order in which the oldest ones are not the smallest."""
    step = 37  # has no factor in common with 101
    return [quantiles[(step * place) % len(quantiles)] for place in range(len(quantiles))]
