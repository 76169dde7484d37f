"""How much whom may ask of the gateway: rates, limits, and which of them one request meets. No I/O and no clock.

A request meets up to four quotas, and must pass all: its tenant's, its device's, its model's (all that the tenant asks
of that model), and its device's on that model. For each of the four, the most specific row that an operator has set
counts, whole; "*" in a row stands for each tenant, device or model, which then have a quota of their own each. Without
a row the default of the configuration counts, and without that there is no limit.

Everything is whole numbers: microseconds and units of a bucket. A rate of `count` in `per_us` microseconds is reduced
to p / q; one request (or byte) costs q units, and each microsecond adds p. Sums of these are exact, in Python and in
the doubles of Redis' Lua, as long as a full bucket is below 2**53 units, which is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from itertools import product
from typing import Final, Literal
from urllib.parse import quote

from isthmus.errors import InputError

Kind = Literal["requests", "bytes", "concurrency"]
EACH: Final = "*"
ALL: Final = ""  # of a row: it is for all of the tenant's devices (or models) together
_SECOND: Final = 1_000_000  # microseconds
_PERIODS: Final[Mapping[str, int]] = {
    "s": _SECOND, "sec": _SECOND, "second": _SECOND, "min": 60 * _SECOND, "minute": 60 * _SECOND,
    "h": 3600 * _SECOND, "hour": 3600 * _SECOND, "d": 86400 * _SECOND, "day": 86400 * _SECOND,
}  # fmt: skip
_SIZES: Final[Mapping[str, int]] = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip
_RATE: Final = re.compile(r"(\d{1,12}(?:\.\d{1,6})?) ?([A-Za-z]{0,3})(?:/([a-z]+))?")
_MOST: Final = 2**53
_REMEMBERED: Final = 100_000  # callers whose quotas are kept at hand


@dataclass(frozen=True, slots=True)
class Rate:
    """A number of requests or bytes in a time; `text` is how a person wrote it."""

    count: Fraction
    per_us: int
    text: str

    @property
    def units(self) -> tuple[int, int]:
        """Return what a microsecond adds to a bucket, and what one request or byte takes from it."""
        ratio = self.count / self.per_us
        return ratio.numerator, ratio.denominator


def parse_rate(text: str, *, sizes: bool = False) -> Rate:
    """Return the rate that a text such as `100/s`, `5/min` or, with `sizes`, `10MB/s` means.

    Raises:
        InputError: It is not a rate.
    """
    match = _RATE.fullmatch(text.strip())
    size = _SIZES.get(match[2].lower()) if match else None
    period = _PERIODS.get(match[3] or "s") if match else None
    if match is None or size is None or period is None or (match[2] and not sizes):
        example = "10MB/s" if sizes else "100/s, 5/min or 1000/h"
        raise InputError(
            f"expected a rate such as {example}, got {text[:40]!r}", hint="a number, then /s, /min, /h or /d"
        )
    return Rate(Fraction(match[1]) * size, period, text.strip())


def parse_size(text: str) -> int:
    """Return the bytes that a text such as `5000000` or `5MB` means.

    Raises:
        InputError: It is not a size.
    """
    if "/" in text:
        raise InputError(f"expected a size such as 5MB, got {text[:40]!r}", hint="a number, then KB, MB, GB, KiB, …")
    return int(parse_rate(text, sizes=True).count)


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket: full at first; see the module for the units."""

    gain: int  # units that a microsecond adds
    cost: int  # units of one request or byte
    burst: int

    @property
    def capacity(self) -> int:
        """Return the units of a full one."""
        return self.burst * self.cost


def _bucket(rate: Rate | None, burst: int | None, what: str) -> Bucket | None:
    if rate is None:
        if burst is not None:
            raise InputError(f"{what}: a burst needs a rate", hint="--rate 0/s with a burst admits that many, once")
        return None
    gain, cost = rate.units
    # Without a burst, one second's worth, and one whole request (or byte) at least: less would never admit any.
    most = max(-(-gain * _SECOND // cost), 1 if gain else 0) if burst is None else burst
    if not 0 <= most * cost < _MOST or gain >= _MOST:
        raise InputError(
            f"{what}: a rate of {rate.text} with a burst of {most} cannot be counted exactly",
            hint="take a rounder rate, one for a shorter time, or a smaller burst",
        )
    return Bucket(gain, cost, most)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one quota allows; None is no limit.

    Raises:
        InputError: A number is negative, a burst has no rate, or the numbers are too large to be counted exactly.
    """

    rate: Rate | None = None
    burst: int | None = None  # requests; None: one second's worth
    bytes_rate: Rate | None = None
    bytes_burst: int | None = None
    concurrency: int | None = None
    requests: Bucket | None = field(init=False)
    bytes: Bucket | None = field(init=False)

    def __post_init__(self) -> None:
        for name in ("burst", "bytes_burst", "concurrency"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < _MOST:
                raise InputError(f"{name}: expected a number from 0 to 2**53 - 1, got {value}")
        object.__setattr__(self, "requests", _bucket(self.rate, self.burst, "requests"))
        object.__setattr__(self, "bytes", _bucket(self.bytes_rate, self.bytes_burst, "bytes"))

    @property
    def unlimited(self) -> bool:
        """Return whether nothing is limited."""
        return self.requests is None and self.bytes is None and self.concurrency is None


UNLIMITED: Final = Limits()


@dataclass(frozen=True, slots=True)
class Scope:
    """Whom a row is for: a tenant, perhaps one device of it, perhaps one model."""

    tenant: str
    device: str = ALL
    model: str = ALL

    def __str__(self) -> str:
        parts = ((item.name, getattr(self, item.name)) for item in fields(self))
        return ", ".join(f"{name} {value}" for name, value in parts if value)


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that a rule limits, ready to be counted under its key."""

    kind: Kind
    key: str
    gain: int = 0  # of a bucket, as its capacity and cost
    capacity: int = 0
    cost: int = 0
    most: int = 0  # requests in progress


@dataclass(frozen=True, slots=True)
class Rule:
    """A quota that a request meets: of whom, and what it allows."""

    scope: Scope  # never with "*": each tenant, device or model has its own
    limits: Limits
    parts: tuple[Part, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self._parts()))

    def _parts(self) -> Iterator[Part]:
        # One tenant's keys share their {}, and with it the slot of a Redis cluster.
        tenant, device, model = (
            quote(name, safe="") for name in (self.scope.tenant, self.scope.device, self.scope.model)
        )
        prefix, limits = f"isthmus:quota:{{{tenant}}}:{device}:{model}", self.limits
        if limits.concurrency is not None:
            yield Part("concurrency", f"{prefix}:running", most=limits.concurrency)
        kinds: tuple[tuple[Kind, Bucket | None], ...] = (("requests", limits.requests), ("bytes", limits.bytes))
        for kind, bucket in kinds:
            if bucket is not None:  # a quota that was changed has another key, and so starts with a full bucket
                key = f"{prefix}:{kind}:{bucket.gain}/{bucket.cost}/{bucket.burst}"
                yield Part(kind, key, bucket.gain, bucket.capacity, bucket.cost)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What counts where no row does: for each tenant, for each device, for each model of a tenant."""

    tenant: Limits = UNLIMITED
    device: Limits = UNLIMITED
    model: Limits = UNLIMITED


class QuotaBook:
    """All rows, and which of them a request meets.

    Args:
        defaults: From the configuration.
    """

    def __init__(self, defaults: Defaults | None = None) -> None:
        self._defaults = defaults or Defaults()
        self._rows: Mapping[Scope, Limits] = {}
        self._known: dict[tuple[str, str, str], tuple[Rule, ...]] = {}

    def replace(self, rows: Mapping[Scope, Limits]) -> None:
        """Take these rows for all that there are."""
        if rows != self._rows:
            self._rows = dict(rows)
            self._known.clear()

    def rules(self, tenant: str, device: str, model: str) -> tuple[Rule, ...]:
        """Return the quotas that a request meets and that limit something."""
        known = self._known.get((tenant, device, model))
        if known is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            known = self._known[tenant, device, model] = self._resolve(tenant, device, model)
        return known

    def _resolve(self, tenant: str, device: str, model: str) -> tuple[Rule, ...]:
        defaults = self._defaults
        found = (
            (Scope(tenant), self._find(Scope(tenant), defaults.tenant)),
            (Scope(tenant, device), self._find(Scope(tenant, device), defaults.device)),
            (Scope(tenant, ALL, model), self._find(Scope(tenant, ALL, model), defaults.model)),
            (Scope(tenant, device, model), self._find(Scope(tenant, device, model), UNLIMITED)),
        )
        return tuple(Rule(scope, limits) for scope, limits in found if not limits.unlimited)

    def _find(self, scope: Scope, default: Limits) -> Limits:
        names = ((name, EACH) if name else (ALL,) for name in (scope.tenant, scope.device, scope.model))
        return next(
            (self._rows[row] for row in (Scope(*names) for names in product(*names)) if row in self._rows), default
        )
