from __future__ import annotations

import os
from pathlib import Path

import pytest

from compiler.cache import Cache, code_digest, key, tool_versions


def write(text: str) -> object:
    return lambda folder: (folder / "file").write_text(text)


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), []

    for _ in range(2):
        folder = cache.get("stage", key(a=1), lambda place: made.append((place / "file").write_text("x")))

    assert len(made) == 1
    assert (folder / "file").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    "spoil", [lambda f: f.write_text("y"), lambda f: f.unlink(), lambda f: (f.parent / "more").touch()]
)
def test_a_damaged_entry_is_a_miss(tmp_path: Path, spoil: object) -> None:
    cache = Cache(tmp_path)
    folder = cache.get("stage", key(a=1), write("x"))  # type: ignore[arg-type]

    spoil(folder / "file")  # type: ignore[operator]

    assert cache.find("stage", key(a=1)) is None
    assert (cache.get("stage", key(a=1), write("x")) / "file").read_text() == "x"  # type: ignore[arg-type]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011  # ours
        Cache(tmp_path).get("stage", key(a=1), fail)

    assert list(tmp_path.iterdir()) == []


def test_the_key_depends_on_every_part_and_not_on_their_order() -> None:
    assert key(a=1, b={"x": 2, "y": 3}) == key(b={"y": 3, "x": 2}, a=1)
    assert len({key(a=1), key(a=2), key(b=1), key(a=[1])}) == 4


def test_the_entries_used_longest_ago_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=250)
    for number in range(4):
        folder = cache.get("stage", key(n=number), write("x" * 50))  # type: ignore[arg-type]
        os.utime(folder / "seal.json", (1000 + number, 1000 + number))
    cache.get("stage", key(n=0), write("never"))  # type: ignore[arg-type]  # used again: now it is the youngest

    cache.prune(now=(folder / "seal.json").stat().st_mtime + 2**40)

    assert cache.find("stage", key(n=1)) is None
    assert cache.find("stage", key(n=0)) is not None


def test_what_was_just_used_stays_whatever_the_limit(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=0)
    folder = cache.get("stage", key(n=1), write("x"))  # type: ignore[arg-type]

    cache.prune(now=(folder / "seal.json").stat().st_mtime + 60)

    assert cache.find("stage", key(n=1)) is not None


def test_what_a_killed_compilation_left_goes_in_time(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    (tmp_path / ".new-abandoned" / "entry").mkdir(parents=True)
    made = (tmp_path / ".new-abandoned").stat().st_mtime

    cache.prune(now=made + 3600)
    assert (tmp_path / ".new-abandoned").exists()
    cache.prune(now=made + 2 * 86_400)
    assert not (tmp_path / ".new-abandoned").exists()


def test_a_faster_compilations_entry_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def slow(folder: Path) -> None:
        cache.get("stage", key(a=1), write("by the faster one"))  # type: ignore[arg-type]
        (folder / "file").write_text("by the slower one")

    assert (cache.get("stage", key(a=1), slow) / "file").read_text() == "by the faster one"


def test_versions_and_code_are_part_of_keys() -> None:
    assert tool_versions(["numpy", "no-such-tool", "numpy"]) == {"no-such-tool": "absent", "numpy": "1.26.4"}
    assert len(code_digest()) == 64
