from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from compiler.package import check_folder, check_output, move_into_place, read_archive, write_archive
from isthmus.errors import ConflictError, InputError


def folder_with(path: Path, content: str) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "manifest.json").write_text(content)
    (path / "sub" / "data").write_text(content)
    return path


def test_the_archive_depends_on_names_and_bytes_only(tmp_path: Path) -> None:
    first, second = folder_with(tmp_path / "a", "x"), folder_with(tmp_path / "b", "x")
    (second / "manifest.json").chmod(0o600)
    os.utime(second / "sub" / "data", (1, 1))

    for folder in (first, second):
        write_archive(folder, tmp_path / f"{folder.name}.tar")

    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == ["manifest.json", "sub/data"]


def test_an_archive_gives_the_folder_again(tmp_path: Path) -> None:
    write_archive(folder_with(tmp_path / "a", "x"), tmp_path / "a.tar")

    read_archive(tmp_path / "a.tar", tmp_path / "b")

    assert (tmp_path / "b" / "sub" / "data").read_text() == "x"
    assert sorted(path.name for path in (tmp_path / "b").rglob("*")) == ["data", "manifest.json", "sub"]


@pytest.mark.parametrize("hostile", ["link", "above", "text"])
def test_what_is_no_archive_of_plain_files_is_refused(tmp_path: Path, hostile: str) -> None:
    (tmp_path / "file").write_text("x")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        if hostile == "link":
            entry = tarfile.TarInfo("link")
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(entry)
        tar.add(tmp_path / "file", "../file" if hostile == "above" else "file")
    if hostile == "text":
        (tmp_path / "a.tar").write_text("no archive")

    with pytest.raises(InputError, match=r"nothing but files|neither the folder nor the archive"):
        read_archive(tmp_path / "a.tar", tmp_path / "out" / "bundle")

    assert not (tmp_path / "out" / "file").exists()


def test_a_move_that_fails_leaves_the_old_bundle(tmp_path: Path) -> None:
    old = folder_with(tmp_path / "bundle", "old")
    with pytest.raises(FileNotFoundError):
        move_into_place(tmp_path / "work" / "never-made", old)
    (tmp_path / "work").mkdir()
    with pytest.raises(FileNotFoundError):
        move_into_place(tmp_path / "work" / "never-made", old)
    assert (old / "sub" / "data").read_text() == "old"


@pytest.mark.parametrize("folder", ["file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_an_error_with_a_hint(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write to") as raised:
        check_folder(tmp_path / folder, "cache")
    assert raised.value.hint == "give another --cache"


def test_only_a_bundle_or_nothing_is_replaced(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "bundle")
    check_output(folder_with(tmp_path / "old", "x"))
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")

    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(ConflictError, match="is not a bundle"):
        check_output(tmp_path / "precious")
    with pytest.raises(ConflictError, match="is not a bundle"):
        check_output(tmp_path / "precious" / "thesis.tex")


def test_a_bundle_is_replaced_as_a_whole(tmp_path: Path) -> None:
    output = folder_with(tmp_path / "bundle", "old")
    (output / "leftover").write_text("old")

    move_into_place(folder_with(tmp_path / "work" / "bundle", "new"), output)

    assert sorted(path.name for path in output.iterdir()) == ["manifest.json", "sub"]
    assert (output / "sub" / "data").read_text() == "new"
    assert list((tmp_path / "work").iterdir()) == []
