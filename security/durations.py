"""Durations as people write them: 90s, 15m, 12h, 30d."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

from isthmus.errors import InputError

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_LENGTHS: Final = {"d": 86_400, "h": 3600, "m": 60}
_DURATION: Final = re.compile(r"([0-9]{1,6})([smhd])")


def parse_duration(text: str) -> timedelta:
    """Return the duration that `text` writes.

    Raises:
        InputError: It is not a whole number and a unit.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise InputError(
            f"expected a duration such as 90s, 15m, 12h or 30d, got {text[:40]!r}",
            hint="a whole number, then s, m, h or d",
        )
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def format_duration(duration: timedelta) -> str:
    """Return a duration of whole seconds as `parse_duration` reads it, in the largest unit that leaves no rest."""
    seconds = round(duration.total_seconds())
    unit, length = next(
        ((unit, length) for unit, length in _LENGTHS.items() if seconds and seconds % length == 0), ("s", 1)
    )
    return f"{seconds // length}{unit}"
