"""Durations as people write them: 90s, 15m, 12h, 30d."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

from isthmus.errors import InputError

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
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
