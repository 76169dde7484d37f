"""Deltas: every pair of files round-trips, and nothing but the meant file ever comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.delta import Method, apply_delta, make_delta, read_header
from isthmus.delta.container import HEADER_BYTES
from isthmus.digests import sha256_file
from isthmus.errors import DeltaError, DigestMismatchError, IsthmusError
from tests.isthmus.delta.files import safetensors

blobs = st.binary(max_size=5000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("delta")


def write(folder: Path, old: bytes, new: bytes) -> tuple[Path, Path, Path]:
    (folder / "old").write_bytes(old)
    (folder / "new").write_bytes(new)
    make_delta(folder / "old", folder / "new", folder / "delta")
    return folder / "old", folder / "new", folder / "delta"


def rebuild(old: Path | None, new: Path, delta: Path) -> bytes:
    out = new.with_name("out")
    out.unlink(missing_ok=True)
    apply_delta(old, delta, out, sha256=sha256_file(new), length=new.stat().st_size)
    return out.read_bytes()


@given(old=blobs, new=blobs)
@settings(deadline=None)
def test_apply_of_make_is_the_new_file(folder: Path, old: bytes, new: bytes) -> None:
    base, target, delta = write(folder, old, new)
    assert rebuild(base, target, delta) == new


@given(
    old=st.binary(min_size=1, max_size=3000),
    flips=st.dictionaries(st.integers(0, 2999), st.integers(1, 255), max_size=9),
)
@settings(deadline=None)
def test_apply_of_make_for_files_that_are_alike(folder: Path, old: bytes, flips: dict[int, int]) -> None:
    new = bytearray(old)
    for index, value in flips.items():
        new[index % len(new)] ^= value
    base, target, delta = write(folder, old, bytes(new))
    assert rebuild(base, target, delta) == bytes(new)


def test_weights_that_hardly_moved_make_a_small_difference(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old = rng.integers(-127, 128, 400_000).astype(np.int8)
    new = old + (rng.random(old.size) < 0.02).astype(np.int8)
    _, _, delta = write(tmp_path, old.tobytes(), new.tobytes())
    with delta.open("rb") as file:
        assert read_header(file).method is Method.SEGMENTS
    assert delta.stat().st_size < 0.05 * old.size


def test_an_insertion_is_found_by_the_patch_method(tmp_path: Path) -> None:
    old = np.random.default_rng(1).bytes(200_000)
    _, _, delta = write(tmp_path, old, old[:70_000] + b"inserted" + old[70_000:])
    with delta.open("rb") as file:
        assert read_header(file).method is Method.PATCH
    assert delta.stat().st_size < 1000


def test_unrelated_files_cost_no_more_than_the_compressed_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    _, new, delta = write(tmp_path, rng.bytes(50_000), rng.bytes(50_000))
    make_delta(None, new, tmp_path / "full")
    assert delta.stat().st_size <= (tmp_path / "full").stat().st_size + 1024


def test_the_file_alone_is_compressed_hard_before_a_larger_delta_is_taken(tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    words = rng.integers(0, 256, (64, 4)).astype(np.uint8)  # repeats that a quick level does not see
    new = words[rng.integers(0, 64, 100_000)].ravel()
    old = new + rng.normal(0, 42, new.size).astype(np.int8).view(np.uint8)  # a tensor that is hardly like the new one
    files = [safetensors({"w": octets.reshape(1000, 400)}) for octets in (old, new)]
    base, target, delta = write(tmp_path, *files)
    alone = make_delta(None, target, tmp_path / "alone")
    assert delta.stat().st_size <= alone.length + 1024
    assert rebuild(base, target, delta) == files[1]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    rng = np.random.default_rng(3)
    old = rng.bytes(20_000)
    return write(tmp_path, old, old[:10_000] + bytes(50) + old[10_050:])


def test_every_flipped_byte_is_refused_or_harmless(pair: tuple[Path, Path, Path]) -> None:
    old, new, delta = pair
    good, expected = delta.read_bytes(), new.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 97)):
        delta.write_bytes(good[:position] + bytes([good[position] ^ 0x40]) + good[position + 1 :])
        try:
            assert rebuild(old, new, delta) == expected
        except IsthmusError:
            assert not new.with_name("out").exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_delta_is_refused(pair: tuple[Path, Path, Path], share: float) -> None:
    old, new, delta = pair
    data = delta.read_bytes()
    delta.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DeltaError):
        rebuild(old, new, delta)
    assert not new.with_name("out").exists()
    assert not list(new.parent.glob("*.rebuilding"))


def test_the_wrong_base_is_refused_with_its_reason(pair: tuple[Path, Path, Path]) -> None:
    old, new, delta = pair
    old.write_bytes(b"x" + old.read_bytes()[1:])
    with pytest.raises(DeltaError) as caught:
        rebuild(old, new, delta)
    assert caught.value.reason == "wrong-base"


def test_a_delta_for_another_target_is_refused(pair: tuple[Path, Path, Path]) -> None:
    old, new, delta = pair
    with pytest.raises(DigestMismatchError):
        apply_delta(old, delta, new.with_name("out"), sha256="0" * 64, length=new.stat().st_size)


def test_a_frame_longer_than_announced_is_refused(pair: tuple[Path, Path, Path]) -> None:
    old, new, delta = pair
    new.write_bytes(new.read_bytes()[:-1])
    data = bytearray(delta.read_bytes())
    data[38:70] = bytes.fromhex(sha256_file(new))
    data[70:78] = new.stat().st_size.to_bytes(8, "little")
    data[78:86] = data[78:86]
    delta.write_bytes(bytes(data))
    with pytest.raises(DeltaError):
        rebuild(old, new, delta)
    assert len(data) > HEADER_BYTES
