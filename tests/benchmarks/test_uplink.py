"""The benchmark's cloud fails as it says, the agent survives it, and ratios compare what was measured in turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.uplink import FAULTS, HEALTHY, Segment, _ratios, _site


def test_a_fault_is_compared_with_the_healthy_times_around_it() -> None:
    healthy = [Segment(sure_ms=[float(place)]) for place in range(1, 2 * len(FAULTS) + 2)]
    during = [Segment(sure_ms=[12.0]), Segment(sure_ms=[36.0])]
    second, second_next = 2, 2 + len(FAULTS)  # p99 of the healthy time before the second fault of each round
    expected = [12.0 / (second + 0.5), 36.0 / (second_next + 0.5)]
    assert _ratios(healthy, during, 1) == pytest.approx(expected)


@pytest.mark.slow
def test_every_state_of_the_cloud_is_survived_with_its_reasons(tmp_path: Path) -> None:
    with _site(tmp_path) as site:
        site.recover()
        for state in (HEALTHY, *FAULTS):
            site.tell(state)
            seen = site.observe(state, 0.6)
            assert seen.sure_ms
            assert seen.hard_ms
            assert seen.wrong == 0, state
            assert site.recover() < 10
