"""Times at which a version may change: maintenance windows, and the spread of a fleet over time. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from isthmus.digests import sha256_bytes

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW: Final = re.compile(r"(?:([a-z]{3})(?:-([a-z]{3}))? +)?([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_DAY: Final = 24 * 60  # minutes


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of local time that comes again, by the day on which it begins; it may reach into the next day."""

    days: frozenset[int]  # 0 is Monday
    begin: int  # minutes after midnight
    length: int

    def is_open(self, now: datetime) -> bool:
        """Return whether it is open at a local time."""
        return any(begin <= now < begin + timedelta(minutes=self.length) for begin in self._begins(now))

    def opens_in_s(self, now: datetime) -> float:
        """Return the seconds until it opens, 0 while it is open."""
        if self.is_open(now):
            return 0.0
        return min((begin - now).total_seconds() for begin in self._begins(now) if begin > now)

    def _begins(self, now: datetime) -> list[datetime]:
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        days = [midnight + timedelta(days=offset) for offset in range(-1, 9)]
        return [day + timedelta(minutes=self.begin) for day in days if day.weekday() in self.days]


def parse_window(text: str) -> Window:
    """Return the window that `text` names: "01:00-05:00", "sat 22:00-06:00", "mon-fri 01:00-05:00".

    Raises:
        ValueError: It names none.
    """
    found = _WINDOW.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"expected [DAY[-DAY]] HH:MM-HH:MM, for example 'mon-fri 01:00-05:00', got {text[:40]!r}")
    first, last, *times = found.groups()
    unknown = [day for day in (first, last) if day is not None and day not in _DAYS]
    if unknown:
        raise ValueError(f"expected a day of {', '.join(_DAYS)}, got {unknown[0]!r}")
    begin, end = int(times[0]) * 60 + int(times[1]), int(times[2]) * 60 + int(times[3])
    if begin == end:
        raise ValueError(f"expected a window with two different times, got {text[:40]!r}")
    days = frozenset(range(7))
    if first is not None:
        start = _DAYS.index(first)
        span = (_DAYS.index(last) - start) % 7 if last is not None else 0
        days = frozenset((start + offset) % 7 for offset in range(span + 1))
    return Window(days, begin, (end - begin) % _DAY)


def spread_s(device: str, model: str, version: int, most_s: float) -> float:
    """Return how long this device waits before it fetches a version: always the same, and even over a fleet.

    Args:
        device: Its name.
        model: The model.
        version: Its version.
        most_s: Longest wait, seconds.
    """
    digest = sha256_bytes(f"{device}:{model}@{version}".encode())
    return int(digest[:13], 16) / 16**13 * most_s
