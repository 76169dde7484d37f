"""Light answer to route: whether the light model is sure enough.

Pure functions of plain data: no clock, no I/O. The rules, in order:

1. A caller may force a route with the request parameter `isthmus.route`.
2. A light answer that is not finite has no score and always escalates.
3. Otherwise the policy decides (isthmus.policies): by default, what scores below the calibration record's threshold
   escalates. Requests of the first two kinds are not shown to the policy: it did not decide about them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from isthmus.errors import InputError
from isthmus.policies import Case, Policy

Route = Literal["edge", "cloud", "fallback"]
ROUTES: Final[tuple[Route, ...]] = ("edge", "cloud", "fallback")
ROUTE_PARAMETER: Final = "isthmus.route"


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to escalate, and why; the reason is what the answer carries unless the escalation fails."""

    escalate: bool
    reason: Literal["confident", "uncertain", "not-finite", "requested"]


def decide(case: Case, policy: Policy, wanted: str | None = None) -> Decision:
    """Return whether a request escalates.

    Args:
        case: The request; its score comes from the version that the policy was made for.
        policy: Decides where nothing else does.
        wanted: The caller's `isthmus.route`, None when absent.

    Raises:
        InputError: `wanted` is not a route that can be asked for.
    """
    if wanted is not None:
        return Decision(escalate=check_wanted(wanted) == "cloud", reason="requested")
    if math.isnan(case.score):
        return Decision(escalate=True, reason="not-finite")
    if policy.escalates(case):
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
