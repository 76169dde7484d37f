"""The link's cost, learnt from escalations alone."""

from __future__ import annotations

import numpy as np
import pytest

from edge.link import LinkMeter
from isthmus.policies import Link


def test_nothing_is_known_before_the_first_answer() -> None:
    assert LinkMeter().link(waiting=2) == Link(waiting=2)


def test_round_trip_and_bandwidth_are_told_apart() -> None:
    meter, rng = LinkMeter(), np.random.default_rng(0)
    for size in rng.integers(1_000, 1_000_000, 200):
        meter.note(int(size), 0.04 + size / 1e6 + float(rng.normal(0, 0.002)))

    found = meter.link()

    assert found.rtt_s == pytest.approx(0.04, abs=0.01)
    assert found.bytes_per_s == pytest.approx(1e6, rel=0.1)


def test_requests_of_one_size_are_all_round_trip() -> None:
    meter = LinkMeter()
    for _ in range(50):
        meter.note(5_000, 0.03)

    found = meter.link()
    assert found.rtt_s == pytest.approx(0.03)
    assert found.bytes_per_s == 0.0


def test_it_follows_a_link_that_changes() -> None:
    meter = LinkMeter()
    for seconds in [0.02] * 100 + [0.5] * 100:
        meter.note(1_000, seconds)

    assert meter.link().rtt_s == pytest.approx(0.5, rel=0.05)


def test_noise_never_makes_a_speed_or_a_round_trip_negative() -> None:
    meter, rng = LinkMeter(), np.random.default_rng(1)
    for _ in range(300):
        meter.note(int(rng.integers(1, 10_000)), float(rng.exponential(0.05)))
        found = meter.link()
        assert found.rtt_s >= 0
        assert found.bytes_per_s >= 0
