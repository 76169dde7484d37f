"""From a score to a route: one file for each policy, loaded only when it is chosen.

The device decides with a policy, and `isthmus evaluate` replays labelled data through the same code. A policy is named
by a text, `NAME` or `NAME:KEY=VALUE,KEY=VALUE`, for example `budget:rate=0.2`. Rules that every policy keeps, checked
by one contract suite over the whole table (tests/isthmus/policies):

1. It looks at the case alone, and at what it remembers of the cases before.
2. It never blocks, reads no clock and draws chance from the generator that it was given.
3. A parameter that it does not know, or that is out of range, is refused with the names of those it does.
A light answer without a score escalates whatever the policy says; that is not its decision.
"""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from isthmus.bundle import CurvePoint, GainStep, VariantCalibration
from isthmus.errors import ConfigError
from isthmus.scores import Floats

POLICIES: Final[Mapping[str, str]] = {
    "threshold": "isthmus.policies.threshold:Threshold",
    "budget": "isthmus.policies.budget:Budget",
    "cost": "isthmus.policies.cost:Cost",
    "random": "isthmus.policies.chance:Chance",
    "oracle": "isthmus.policies.oracle:Oracle",
    "sedna-threshold": "isthmus.policies.sedna:SednaThreshold",
    "sedna-cross-entropy": "isthmus.policies.sedna:SednaCrossEntropy",
    "sedna-ibt": "isthmus.policies.sedna:SednaIbt",
}
# A record with all that a policy may read, to try parameters on.
_ANY: Final = VariantCalibration(
    temperature=1.0,
    threshold=0.5,
    escalation_rate=0.2,
    accuracy=1.0,
    edge_accuracy=1.0,
    agreement=1.0,
    ece_before=0.0,
    ece_after=0.0,
    gains=(GainStep(score=0.0, gain=0.0),),
    curve=(CurvePoint(threshold=0.5, escalation_rate=0.2, accuracy=1.0),),
)
# What a device may run; the others need the truth, or are there to be compared with.
SERVING: Final = ("threshold", "budget", "cost")


@dataclass(frozen=True, slots=True)
class Link:
    """What the way to the cloud costs now; zeros where nothing has been measured."""

    rtt_s: float = 0.0  # from sending a small request to its answer, the heavy model's time included
    bytes_per_s: float = 0.0
    waiting: int = 0  # escalations in progress


@dataclass(frozen=True, slots=True)
class Case:
    """One request as a policy sees it."""

    score: float  # of the least certain row, in [0, 1]
    bytes_up: int = 0
    link: Link = field(default_factory=Link)
    probabilities: Floats | None = None  # of that row; for filters that have their own score
    gain: float | None = None  # the truth: what escalating adds to being right. For the oracle only


class Policy(Protocol):
    """Decides; used from one thread."""

    def escalates(self, case: Case) -> bool:
        """Return whether this request goes up, and learn from having seen it."""
        ...

    @property
    def threshold(self) -> float | None:
        """Return the threshold on the score that is in force, None where there is no such thing."""
        ...


def make_policy(text: str, point: VariantCalibration, *, chance: random.Random | None = None) -> Policy:
    """Return the policy that a text like `budget:rate=0.2` names.

    Args:
        text: Name and parameters.
        point: The calibration record of the variant whose scores it will see.
        chance: Where policies that draw lots take them from.

    Raises:
        ConfigError: There is no such policy, or a parameter is unknown, not a number or out of range.
    """
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"no policy {name[:40]!r}; there are {', '.join(POLICIES)}")
    module, _, attribute = POLICIES[name].partition(":")
    kind: Any = getattr(importlib.import_module(module), attribute)
    known = [key for key in inspect.signature(kind).parameters if key not in ("point", "chance")]
    given = _parameters(name, rest, known)
    try:
        policy: Policy = kind(point=point, chance=chance or random.Random(0), **given)  # noqa: S311 - no secret
    except ValueError as error:
        raise ConfigError(f"policy {name}: {error}") from error
    return policy


def check_serving(text: str) -> None:
    """Check that a device may run the policy that a text names, with these parameters.

    Raises:
        ConfigError: There is no such policy, it is one that needs to know the truth, or a parameter cannot be.
    """
    name = text.partition(":")[0]
    if name not in SERVING:
        raise ConfigError(f"policy: no policy {name[:40]!r} for a device; there are {', '.join(SERVING)}")
    make_policy(text, _ANY)


def _parameters(name: str, text: str, known: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise ConfigError(f"policy {name}: no parameter {key[:40]!r}", hint=f"known: {', '.join(known) or 'none'}")
        try:
            found[key] = float(value)
        except ValueError as error:
            raise ConfigError(f"policy {name}: {key}: expected a number, got {value[:40]!r}") from error
    return found


def within(what: str, value: float, low: float, high: float) -> float:
    """Return the value of a parameter.

    Raises:
        ValueError: It does not lie in [low, high].
    """
    if not low <= value <= high:
        raise ValueError(f"{what}: expected {low:g} to {high:g}, got {value:g}")
    return value
