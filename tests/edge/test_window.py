"""Maintenance windows, and the spread of a fleet over time."""

from __future__ import annotations

from datetime import datetime

import pytest

from edge.window import parse_window, spread_s

# 2026-03-02 is a Monday.


@pytest.mark.parametrize(
    ("window", "now", "opens_in_min"),
    [
        ("01:00-05:00", "2026-03-02 00:30", 30),
        ("01:00-05:00", "2026-03-02 01:00", 0),
        ("01:00-05:00", "2026-03-02 04:59", 0),
        ("01:00-05:00", "2026-03-02 05:00", 20 * 60),
        ("22:00-06:00", "2026-03-02 23:30", 0),
        ("22:00-06:00", "2026-03-02 05:59", 0),
        ("22:00-06:00", "2026-03-02 06:00", 16 * 60),
        ("sat 22:00-06:00", "2026-03-08 05:00", 0),
        ("sat 22:00-06:00", "2026-03-09 05:00", 5 * 24 * 60 + 17 * 60),
        ("sat-sun 01:00-05:00", "2026-03-02 02:00", 4 * 24 * 60 + 23 * 60),
        ("Fri-Mon 01:00-05:00", "2026-03-02 02:00", 0),
        ("tue-thu 01:00-05:00", "2026-03-02 02:00", 23 * 60),
    ],
)
def test_a_window_opens_when_it_says(window: str, now: str, opens_in_min: int) -> None:
    found = parse_window(window)
    at = datetime.fromisoformat(now)
    assert found.opens_in_s(at) == opens_in_min * 60
    assert found.is_open(at) == (opens_in_min == 0)


@pytest.mark.parametrize(
    "text", ["", "1:00-5:00", "01:00", "25:00-05:00", "01:00-01:00", "xyz 01:00-05:00", "mon-abc 01:00-05:00", "mon"]
)
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_window(text)


def test_devices_take_turns_that_stay_the_same() -> None:
    waits = [spread_s(f"device-{number}", "triage", 7, 600.0) for number in range(2000)]
    assert waits == [spread_s(f"device-{number}", "triage", 7, 600.0) for number in range(2000)]
    assert min(waits) >= 0
    assert max(waits) < 600
    for quarter in range(4):
        assert 420 < sum(150 * quarter <= wait < 150 * (quarter + 1) for wait in waits) < 580
    assert spread_s("device-1", "triage", 8, 600.0) != waits[1]
