"""Captures are bounded in memory and on disk, and survive a crash."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge.spool import FILE_ROWS, Spool, export_captures, find_spool
from isthmus.errors import InputError, NotFoundError
from isthmus.tensors import Array


def rows(first: int, count: int) -> tuple[dict[str, Array], dict[str, Array]]:
    x = np.arange(first, first + count, dtype=np.float32)[:, None] * np.ones((1, 4), np.float32)
    return {"x": x}, {"logits": x * 2}


def flush(spool: Spool) -> None:
    asyncio.run(spool.flush())


def test_files_hold_at_most_256_rows_in_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    for first in range(0, 600, 6):
        full = spool.offer(*rows(first, 6))
        assert full is (first + 6 >= FILE_ROWS)
    flush(spool)
    files = sorted((tmp_path / "s").iterdir())
    assert [len(load_file(path)["input.x"]) for path in files] == [256, 256, 88]
    assert export_captures(tmp_path / "s", tmp_path / "out.safetensors") == 600
    out = load_file(tmp_path / "out.safetensors")
    assert out["input.x"][:, 0].tolist() == list(range(600))
    np.testing.assert_array_equal(out["output.logits"], out["input.x"] * 2)


def test_only_the_owner_can_read_captures(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    spool.offer(*rows(0, 1))
    flush(spool)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "s").iterdir()] == [0o600]


def test_disk_is_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    limit = 20_000
    spool = Spool(tmp_path / "s", limit_bytes=limit)
    for first in range(0, 2560, 256):
        spool.offer(*rows(first, 256))
        flush(spool)
        assert sum(path.stat().st_size for path in (tmp_path / "s").iterdir()) <= limit
    export_captures(tmp_path / "s", tmp_path / "out.safetensors")
    kept = load_file(tmp_path / "out.safetensors")["input.x"][:, 0]
    assert kept[-1] == 2559
    assert kept[0] > 1000


def test_file_larger_than_the_limit_is_dropped_and_costs_nothing_else(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s", limit_bytes=2_000)
    spool.offer(*rows(0, 10))
    flush(spool)
    spool.offer(*rows(10, 200))
    flush(spool)
    assert spool.dropped == 200
    assert export_captures(tmp_path / "s", tmp_path / "out.safetensors") == 10


def test_memory_is_bounded(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    for first in range(0, 5000, 50):
        spool.offer(*rows(first, 50))
    assert spool.dropped >= 5000 - 4 * FILE_ROWS
    assert len(spool._rows) <= 4 * FILE_ROWS


def test_memory_is_bounded_when_rows_are_large(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    image = {"x": np.zeros((1, 1 << 18), np.float32)}  # 1 MiB
    full = [spool.offer(image, {"logits": np.zeros((1, 2), np.float32)}) for _ in range(40)]
    assert full.index(True) < 8
    assert len(spool._rows) <= 16
    assert spool.dropped == 40 - len(spool._rows)
    flush(spool)
    assert not spool.offer(image, {"logits": np.zeros((1, 2), np.float32)})


def test_captures_do_not_keep_requests_alive(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    whole = np.zeros((1, 1_000_000), np.float32)
    spool.offer({"x": whole[:, :4]}, {"logits": whole[:, :2]})
    assert all(array.base is None for array in spool._rows[0].values())


def test_tensors_without_a_common_batch_axis_are_one_row(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    for _ in range(3):
        spool.offer({"ids": np.zeros((1, 16), np.int64)}, {"scores": np.zeros((5,), np.float32)})
    flush(spool)
    assert export_captures(tmp_path / "s", tmp_path / "out.safetensors") == 3
    assert load_file(tmp_path / "out.safetensors")["input.ids"].shape == (3, 1, 16)


def test_leftovers_and_broken_files_are_passed_over(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    spool.offer(*rows(0, 3))
    flush(spool)
    (tmp_path / "s" / "000000000009.safetensors").write_bytes(b"\x00" * 50)
    (tmp_path / "s" / "000000000010.safetensors.tmp").write_bytes(b"half")
    again = Spool(tmp_path / "s")
    again.offer(*rows(3, 2))
    flush(again)
    assert export_captures(tmp_path / "s", tmp_path / "out.safetensors") == 5
    assert not list((tmp_path / "s").glob("*.tmp"))


def test_rows_of_an_older_model_are_left_out(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    spool.offer({"x": np.zeros((2, 9), np.float32)}, {"logits": np.zeros((2, 4), np.float32)})
    flush(spool)
    spool.offer(*rows(0, 3))
    flush(spool)
    assert export_captures(tmp_path / "s", tmp_path / "out.safetensors") == 3


def test_change_of_form_within_a_file_loses_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    spool.offer({"x": np.zeros((2, 9), np.float32)}, {"logits": np.zeros((2, 4), np.float32)})
    spool.offer(*rows(0, 3))
    flush(spool)
    assert spool.dropped == 0
    assert export_captures(tmp_path / "s", tmp_path / "out.safetensors") == 3


def test_disk_that_cannot_be_written_costs_the_captures_only(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    (tmp_path / "s").rmdir()
    (tmp_path / "s").write_bytes(b"a file where the folder was")
    spool.offer(*rows(0, 3))
    flush(spool)
    assert spool.dropped == 3


def test_finding_a_models_captures(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no captures"):
        find_spool(tmp_path / "nothere", None)
    (tmp_path / "a").mkdir()
    assert find_spool(tmp_path, None) == tmp_path / "a"
    (tmp_path / "b").mkdir()
    assert find_spool(tmp_path, "b") == tmp_path / "b"
    with pytest.raises(InputError, match="one of a, b"):
        find_spool(tmp_path, None)
    with pytest.raises(NotFoundError):
        find_spool(tmp_path, "../a")
    with pytest.raises(NotFoundError):
        export_captures(tmp_path / "a", tmp_path / "out")
