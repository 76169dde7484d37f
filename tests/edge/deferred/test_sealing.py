"""The device's key, and what it seals."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.deferred.sealing import OVERHEAD, Sealer, load_key
from edge.deferred.settled import FILE, Settled
from isthmus.errors import ConfigError, TrustError
from tests.edge.deferred.simulated_disk import SimulatedDisk

KEY = bytes(range(32))


@given(st.binary(max_size=100), st.binary(max_size=20), st.data())
def test_box_opens_as_it_was_and_nowhere_else(data: bytes, context: bytes, draw: st.DataObject) -> None:
    sealer = Sealer(KEY)
    box = sealer.seal(data, context)
    assert sealer.open(box, context) == data
    assert len(box) == len(data) + OVERHEAD
    assert box != sealer.seal(data, context)
    with pytest.raises(TrustError):
        sealer.open(box, context + b"x")
    with pytest.raises(TrustError):
        Sealer(bytes(32)).open(box, context)
    place = draw.draw(st.integers(0, len(box) - 1))
    altered = box[:place] + bytes([box[place] ^ draw.draw(st.integers(1, 255))]) + box[place + 1 :]
    for wrong in (altered, box[:place], box + b"\0"):
        with pytest.raises(TrustError):
            sealer.open(wrong, context)


def test_key_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "deferred.key"
    key = load_key(path)
    assert load_key(path) == key
    assert path.stat().st_mode & 0o077 == 0
    assert load_key(tmp_path / "other.key") != key


def test_damaged_key_is_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "deferred.key"
    path.write_bytes(b"short")
    assert len(load_key(path)) == 32
    assert (tmp_path / "deferred.key.damaged").read_bytes() == b"short"
    with pytest.raises(ConfigError, match="defer_key: cannot use"):
        load_key(tmp_path / "nothere" / "deferred.key")


def test_memory_of_acknowledged_requests_survives_torn_records() -> None:
    disk = SimulatedDisk()
    settled = Settled(disk, Sealer(KEY), limit=10, now_ms=0)
    settled.add({"a": 100, "b": 200}, now_ms=0)
    disk.alter(FILE, lambda data: data[:-5])
    settled = Settled(disk, Sealer(KEY), limit=10, now_ms=0)
    assert ("a" in settled, "b" in settled) == (True, False)
    settled.add({"c": 300}, now_ms=0)
    settled = Settled(disk, Sealer(KEY), limit=10, now_ms=150)
    assert ("a" in settled, "c" in settled) == (False, True)


def test_memory_of_acknowledged_requests_is_bounded_and_survives_a_full_disk() -> None:
    disk = SimulatedDisk()
    settled = Settled(disk, Sealer(KEY), limit=3, now_ms=0)
    for number in range(20):
        settled.add({str(number): 1000}, now_ms=0)
        assert len(disk.read(FILE)) <= 32 * 8
    assert [str(number) in settled for number in range(15, 20)] == [False, False, True, True, True]
    disk.refuses = {"append"}
    with pytest.raises(OSError, match="no space"):
        settled.add({"x": 1000}, now_ms=0)
    assert "x" not in settled
    disk.refuses = set()
    settled.add({"y": 1000}, now_ms=0)
    again = Settled(disk, Sealer(KEY), limit=3, now_ms=0)
    assert ("y" in again, "x" in again) == (True, False)
