"""The cursor of a client of deferred answers; the rest is tested against a real agent in tests/edge/deferred."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.deferred import Cursor, DeferredAnswers, read_cursor, write_cursor


def test_cursor_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "cursor.json"
    assert read_cursor(path) == Cursor()
    for sequence in (1, 2):
        write_cursor(path, Cursor("store", sequence))
    assert read_cursor(path) == Cursor("store", 2)
    assert [file.name for file in tmp_path.iterdir()] == ["cursor.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"store": "s", "sequence": "x"}'])
def test_file_without_a_cursor_is_a_start(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cursor.json"
    path.write_bytes(content)
    assert read_cursor(path) == Cursor()


def test_subscription_is_a_context() -> None:
    import asyncio

    async def use() -> None:
        await anext(DeferredAnswers("127.0.0.1:1"))

    with pytest.raises(RuntimeError, match="async with"):
        asyncio.run(use())
