"""Deltas of folders: every file comes back, and nothing outside of the new folder is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard
from typer.testing import CliRunner

from isthmus.delta import apply_folder_delta, make_folder_delta
from isthmus.delta.cli import app
from isthmus.delta.folder import MAGIC
from isthmus.errors import DeltaError, InputError


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    same = bytes(range(256)) * 40
    old = {"a/kept": same, "a/changed": same + b"1", "gone": b"x", "empty": b""}
    new = {"a/kept": same, "a/changed": same + b"2", "b/added": b"new" * 100, "empty": b""}
    return write(tmp_path / "old", old), write(tmp_path / "new", new)


def test_a_folder_comes_back(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    old, new = folders
    entries = make_folder_delta(old, new, tmp_path / "delta")
    methods = {entry.path: entry.method for entry in entries}
    assert methods == {
        "a/kept": "kept", "a/changed": "delta", "b/added": "full", "gone": "removed", "empty": "kept",
    }  # fmt: skip
    assert apply_folder_delta(old, tmp_path / "delta", tmp_path / "out") == entries
    assert read(tmp_path / "out") == read(new)


def test_a_changed_old_folder_is_refused_and_leaves_nothing(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    old, new = folders
    make_folder_delta(old, new, tmp_path / "delta")
    (old / "a/changed").write_bytes(b"other")
    with pytest.raises(DeltaError) as caught:
        apply_folder_delta(old, tmp_path / "delta", tmp_path / "out")
    assert caught.value.reason == "wrong-base"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "new", "old"]


def hostile(entries: object) -> bytes:
    listed = json.dumps(entries).encode()
    packed = zstandard.compress(listed)
    return MAGIC + b"\x01" + len(packed).to_bytes(4, "little") + len(listed).to_bytes(4, "little") + packed


@pytest.mark.parametrize(
    "path", ["../out", "/etc/x", "a/../../x", "", ".", "a//b", "a\0b", "a\\b", 7, None, "gone/x", ".delta-x/../../y"]
)
def test_a_path_out_of_the_folder_is_refused(tmp_path: Path, folders: tuple[Path, Path], path: object) -> None:
    entry = {"path": path, "method": "kept", "sha256": "0" * 64, "length": 1, "bytes": 0}
    (tmp_path / "delta").write_bytes(hostile([entry]))
    with pytest.raises(DeltaError):
        apply_folder_delta(folders[0], tmp_path / "delta", tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["delta", "new", "old"]


@pytest.mark.parametrize("entries", [{}, [1], [[]], [{"path": "a"}], None, [{"path": "a", "x": 1}]])
def test_a_list_that_is_none_is_refused(tmp_path: Path, folders: tuple[Path, Path], entries: object) -> None:
    (tmp_path / "delta").write_bytes(hostile(entries))
    with pytest.raises(DeltaError):
        apply_folder_delta(folders[0], tmp_path / "delta", tmp_path / "out")


def test_links_are_no_part_of_a_folder_delta(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    old, new = folders
    (new / "link").symlink_to(new / "empty")
    with pytest.raises(InputError):
        make_folder_delta(old, new, tmp_path / "delta")


def test_the_commands_take_folders(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    old, new = folders
    delta, out = tmp_path / "delta", tmp_path / "out"
    for arguments in (["make", old, new, delta], ["inspect", delta], ["apply", old, delta, out]):
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output
        assert {row["path"] for row in json.loads(result.stdout)} >= {"a/kept", "b/added"}
    assert read(out) == read(new)
