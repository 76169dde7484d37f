"""Reports that were not taken, over restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.outbox import Outbox
from isthmus.v1 import fleet_pb2

ACTIVE, UPDATING = fleet_pb2.UPDATE_STATE_ACTIVE, fleet_pb2.UPDATE_STATE_UPDATING


def report(version: int, state: fleet_pb2.UpdateState.ValueType = ACTIVE, reason: str = "") -> fleet_pb2.ReportRequest:
    return fleet_pb2.ReportRequest(model="triage", version=version, state=state, reason=reason)


def keep(outbox: Outbox) -> bool:
    data = outbox.prepare_write()
    if data is None:
        return False
    outbox.write(data)
    return True


def test_what_was_not_sent_is_there_after_a_restart_and_numbers_grow(tmp_path: Path) -> None:
    path, numbers = tmp_path / "reports.json", []
    for start in range(3):
        outbox = Outbox(path)
        assert [found.reason for found in outbox.waiting()] == [f"start {number}" for number in range(start)]
        outbox.put(report(start + 1, reason=f"start {start}"))
        assert keep(outbox)
        numbers.append(outbox.waiting()[-1].number)
    assert numbers == sorted(set(numbers))
    outbox = Outbox(path)
    for found in outbox.waiting():
        outbox.sent(found)
    assert keep(outbox)
    assert Outbox(path).waiting() == []


def test_the_newest_report_of_a_version_takes_the_place_of_older_ones(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "reports.json")
    outbox.put(report(1, reason="old"))
    outbox.put(report(2))
    being_sent = outbox.waiting()[0]
    outbox.put(report(1, reason="new"))
    outbox.sent(being_sent)  # it was replaced while it was under way
    assert [(found.version, found.reason) for found in outbox.waiting()] == [(2, ""), (1, "new")]


def test_how_far_an_update_is_costs_no_write(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "reports.json")
    outbox.put(report(1))
    assert keep(outbox)
    outbox.put(report(2, UPDATING))
    assert not keep(outbox)
    assert [found.version for found in Outbox(tmp_path / "reports.json").waiting()] == [1]


@pytest.mark.parametrize("content", [b"", b"{", b'{"reserved": "x"}', b'{"unsent": ["!", "/w=="]}'])
def test_a_broken_file_is_an_empty_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "reports.json").write_bytes(content)
    outbox = Outbox(tmp_path / "reports.json")
    assert outbox.waiting() == []
    outbox.put(report(1))
    assert keep(outbox)


def test_a_disk_that_takes_no_writes_costs_only_the_memory_of_reports(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "missing" / "reports.json")
    outbox.put(report(1))
    assert keep(outbox)
    assert len(outbox.waiting()) == 1


def test_the_number_of_reports_is_bounded() -> None:
    outbox = Outbox()
    for version in range(1, 200):
        outbox.put(report(version))
    assert len(outbox.waiting()) == 64
    assert outbox.waiting()[-1].version == 199
