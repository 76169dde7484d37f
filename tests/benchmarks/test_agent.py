from __future__ import annotations

import pytest

from benchmarks.agent import AGENT, BARE, ECHO, FLOOR, MANY, TRITON, Measured, goals_of, rows_of


def _measured() -> Measured:
    measured = Measured()
    for slow in (1.0, 3.0, 1.0):  # the machine was busy in the second round, for all alike
        for server, ms, rate in ((ECHO, 0.5, 0.0), (FLOOR, 0.52, 2000.0), (AGENT, 0.56, 1900.0), (TRITON, 0.7, 1500.0)):
            measured.times[server, 1].append([ms * slow])
            measured.times[server, MANY].append([8 * ms * slow])
            measured.rates[server, 1].append(1 / (ms * slow))
            measured.rates[server, MANY].append(rate / slow)
        measured.times[BARE, 1].append([0.01 * slow])
        measured.rates[BARE, 1].append(100.0)
    return measured


def test_goals_are_ratios_of_the_rounds() -> None:
    values = {goal.goal.partition(" (")[0]: goal.value for goal in goals_of("small", _measured())}
    assert values == {
        "small: agent p50 / floor p50, 1 client": pytest.approx(0.56 / 0.51, abs=1e-3),
        "small: floor calls/s / agent calls/s, 8 clients": pytest.approx(2000 / 1900, abs=1e-3),
        f"small: agent p50 / {TRITON} p50, 1 client": pytest.approx(0.8, abs=1e-3),
        f"small: {TRITON} calls/s / agent calls/s, 8 clients": pytest.approx(1500 / 1900, abs=1e-3),
    }


def test_rows_leave_out_what_was_not_measured() -> None:
    rows = {row["server"]: row for row in rows_of("small", _measured())}
    assert set(rows) == {BARE, ECHO, FLOOR, AGENT, TRITON}
    assert rows[BARE]["p50 ms, 8"] is None
    assert rows[AGENT]["calls/s, 8"] == 1900
