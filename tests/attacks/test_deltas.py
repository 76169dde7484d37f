"""Hostile deltas: an error with a reason, never a crash, a hang, memory beyond the bound or a wrong file."""

from __future__ import annotations

import asyncio
import io
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.delta import apply_apart, apply_delta, make_delta
from isthmus.delta.container import HEADER_BYTES, Header, Method
from isthmus.delta.elements import Kind
from isthmus.delta.fields import pack_numbers, pack_signed
from isthmus.delta.model import BLOCK
from isthmus.delta.pieces import MAX_EARLY, Piece
from isthmus.delta.segments import GROUP_HEADER, MAX_MAP, read_group
from isthmus.digests import sha256_bytes, sha256_file
from isthmus.errors import DeltaError, DigestMismatchError

GOLDEN = Path(__file__).parents[1] / "isthmus" / "delta" / "golden"
DELTAS = sorted(GOLDEN.glob("*.delta"))
MUTATIONS = 400  # of each golden delta


def attempt(folder: Path, name: str, delta: bytes) -> None:
    """Apply a delta that may be anything; only the meant file or an error may come of it."""
    old, new, out = GOLDEN / f"{name}.old", GOLDEN / f"{name}.new", folder / "out"
    (folder / "delta").write_bytes(delta)
    try:
        apply_delta(old, folder / "delta", out, sha256=sha256_file(new), length=new.stat().st_size)
    except (DeltaError, DigestMismatchError):
        assert not out.exists()
    else:
        assert out.read_bytes() == new.read_bytes()
        out.unlink()
    assert [path.name for path in folder.iterdir()] == ["delta"]


def repacked(delta: bytes, change: object) -> bytes:
    """Return a format 2 delta whose first map has been changed, so that mutations get behind its compression."""
    assert callable(change)
    fields = list(GROUP_HEADER.unpack_from(delta, HEADER_BYTES))
    begin = HEADER_BYTES + GROUP_HEADER.size
    raw = zstandard.ZstdDecompressor().decompress(delta[begin : begin + fields[1]])
    changed = change(raw)
    packed = zstandard.compress(changed)
    rest = delta[begin + fields[1] :]
    fields[1], fields[2] = len(packed), len(changed)
    return delta[:HEADER_BYTES] + GROUP_HEADER.pack(*fields) + packed + rest


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(changed)))
        match int(rng.integers(5)):
            case 0:
                changed[at] ^= 1 << int(rng.integers(8))
            case 1:
                changed[at] = int(rng.choice([0, 1, 127, 128, 255]))
            case 2:
                changed[at : at + 8] = bytes([255] * int(rng.integers(1, 9)))
            case 3:
                del changed[at : at + int(rng.integers(1, 40))]
            case _:
                changed[at:at] = changed[: int(rng.integers(1, 40))]
        if not changed:
            break
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("delta", DELTAS, ids=lambda path: path.name)
def test_mutated_deltas_are_refused_or_harmless(tmp_path: Path, delta: Path) -> None:
    rng = np.random.default_rng(0)
    good = delta.read_bytes()
    name = delta.name.split(".")[0]
    for number in range(MUTATIONS):
        if "format2" in delta.name and number % 2:
            attempt(tmp_path, name, repacked(good, lambda raw: mutated(rng, raw)))
        else:
            attempt(tmp_path, name, good[:6] + mutated(rng, good[6:]))


@given(data=st.binary(max_size=300), method=st.sampled_from(list(Method)))
@settings(deadline=None, max_examples=60)
def test_any_bytes_behind_a_right_header_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, method: Method
) -> None:
    old, new = (GOLDEN / f"bytes.{side}" for side in ("old", "new"))
    header = Header(method, sha256_file(old), sha256_file(new), new.stat().st_size, old.stat().st_size)
    attempt(tmp_path_factory.mktemp("any"), "bytes", header.pack() + data)


def crafted(old: bytes, new_length: int, group: bytes) -> bytes:
    return Header(Method.SEGMENTS, sha256_bytes(old), "0" * 64, new_length, len(old)).pack() + group


def grouped(
    raw: bytes, *, length: int, lanes: int = 0, words: int = 0, said: int | None = None, payload: bytes = b""
) -> bytes:
    packed = zstandard.compress(raw)
    size = len(raw) if said is None else said
    return GROUP_HEADER.pack(length, len(packed), size, 0, words, lanes) + packed + payload


def mapped(*fields: bytes, segments: int = 1, halvings: int = 0) -> bytes:
    """Return a map without sections and models."""
    return struct.pack("<HHIB", 0, 0, segments, halvings) + b"".join(fields)


NO_FACTORS = pack_numbers([0])  # the model of the factors


def copied(length: int, offset: int) -> bytes:
    return mapped(NO_FACTORS, bytes([Piece.COPY]), pack_numbers([length]), pack_signed([offset]))


def with_model(*fields: bytes, segments: int = 1, factor_model: int = 1) -> bytes:
    """Return a map with models of INT8, INT16, FLOAT32, with one table each; the second one is the factors'."""
    models = [
        struct.pack("<BBBB", kind, 1, 1, 0) + bytes(512) + bytes(1024) + struct.pack("<H", 4096)
        for kind in (Kind.INT8, Kind.INT16, Kind.FLOAT32)
    ]
    return struct.pack("<HHIB", 0, 3, segments, 0) + pack_numbers([factor_model]) + b"".join((*models, *fields))


def tensor(
    *,
    model: int = 0,
    row: int = 10,
    base: int = 0,
    flags: int = 0,
    rank: int = 0,
    shift: int = 0,
    width: int = 0,
    gain_shift: int = 0,
    length: int = 100,
) -> bytes:
    """Return the fields of a segment that is a tensor at the begin of the base."""
    fields = bytes([Piece.TENSOR]), pack_numbers([length]), pack_signed([0]), pack_numbers([model]), pack_numbers([row])
    shifts = pack_signed([shift]) if rank else b"", pack_numbers([width]), pack_signed([gain_shift]) if width else b""
    return b"".join(fields) + pack_signed([base]) + bytes([flags, rank]) + b"".join(shifts)


def scaled(*, source: int = 0, model: int = 2, flags: int = 4, length: int = 48) -> bytes:
    """Return the fields of a tensor of 48 bytes and of one that is made of it."""
    pieces = bytes([Piece.TENSOR, Piece.SCALED]), pack_numbers([48, length]), pack_signed([0])
    fields = pack_numbers([model, 25]), pack_signed([0]), bytes([flags, 0]), pack_numbers([0])
    return with_model(*pieces, *fields, pack_numbers([source]), struct.pack("<f", 2.0), segments=2)


STILL_ROWS = bytes([128] * 15)
HOSTILE = {
    "a copy from outside of the base": grouped(copied(100, 950), length=100),
    "a copy from before the base": grouped(copied(100, -5), length=100),
    "an offset that has no end": grouped(
        mapped(NO_FACTORS, bytes([Piece.COPY]), pack_numbers([100]), bytes([255] * 12)), length=100
    ),
    "a segment longer than its group": grouped(copied(2**62, 0), length=100),
    "a segment of no bytes": grouped(
        mapped(NO_FACTORS, bytes([0, 0]), pack_numbers([100, 0]), pack_signed([0, 0]), segments=2), length=100
    ),
    "a group longer than the target": grouped(copied(200, 0), length=200),
    "a group that makes nothing": grouped(mapped(NO_FACTORS, segments=0), length=0),
    "many segments that are not there": grouped(mapped(segments=2**32 - 1), length=100),
    "an unknown kind of segment": grouped(
        mapped(NO_FACTORS, bytes([9]), pack_numbers([100]), pack_signed([0])), length=100
    ),
    "a literal without a section": grouped(mapped(NO_FACTORS, bytes([Piece.LITERAL]), pack_numbers([100])), length=100),
    "a tensor without a model": grouped(mapped(NO_FACTORS, tensor(model=7)), length=100, lanes=1),
    "a tensor without lanes": grouped(with_model(tensor()), length=100),
    "rows of no elements": grouped(with_model(tensor(row=0)), length=100, lanes=1),
    "a number out of all bounds": grouped(with_model(tensor(base=2**40)), length=100, lanes=1),
    "a shift out of scale": grouped(with_model(tensor(rank=1, shift=2**30), bytes(2)), length=100, lanes=1),
    "numbers out of scale": grouped(with_model(tensor(rank=1), bytes([128, 0])), length=100, lanes=1),
    "too many factors": grouped(with_model(tensor(rank=65), bytes(130)), length=100, lanes=1),
    "factors without a model": grouped(with_model(tensor(rank=1), bytes(2), factor_model=2), length=100, lanes=1),
    "factors with a model of weights": grouped(
        with_model(tensor(rank=1), bytes(2), factor_model=0), length=100, lanes=1
    ),
    "unknown flags": grouped(with_model(tensor(flags=8)), length=100, lanes=1),
    "gains of integers": grouped(with_model(tensor(width=5), bytes(1)), length=100, lanes=1),
    "gains of channels that are no rows": grouped(
        with_model(tensor(model=2, row=5, width=4), bytes(1)), length=100, lanes=1
    ),
    "gains that are not exact": grouped(
        with_model(tensor(model=2, row=5, width=5, gain_shift=-37), bytes(1)), length=100, lanes=1
    ),
    "an early tensor with still rows": grouped(with_model(tensor(flags=5), bytes([128] * 10)), length=100, lanes=1),
    "a scaled tensor without a source": grouped(scaled(source=1), length=96, lanes=1),
    "a scaled tensor of another length": grouped(scaled(length=40), length=88, lanes=1),
    "a scaled tensor of one that is not held": grouped(scaled(flags=0), length=96, lanes=1),
    "a scaled tensor of integers": grouped(scaled(model=0), length=96, lanes=1),
    "still rows that are not whole": grouped(with_model(tensor(row=7, flags=1), STILL_ROWS), length=100, lanes=1),
    "too many lanes": grouped(copied(100, 0), length=100, lanes=2**31),
    "more halvings than lanes": grouped(
        mapped(pack_numbers([0, 0, 0, 0]), bytes([0]), pack_numbers([100]), pack_signed([0]), halvings=3),
        length=100,
        lanes=2,
    ),
    "halvings out of order": grouped(
        mapped(pack_numbers([9, 1, 0]), bytes([0]), pack_numbers([100]), pack_signed([0]), halvings=2),
        length=100,
        lanes=8,
    ),
    "a halving that gives no words": grouped(
        mapped(pack_numbers([0, 0]), bytes([0]), pack_numbers([100]), pack_signed([0]), halvings=1),
        length=100,
        lanes=2,
        payload=bytes(8),
    ),
    "a map that says too little": grouped(copied(100, 0), length=100, said=10),
    "a map that says too much": grouped(copied(100, 0), length=100, said=MAX_MAP + 1),
    "a map that is a bomb": grouped(bytes(1 << 24) + b"x", length=100, said=1 << 24),
}


@pytest.mark.parametrize("group", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_crafted_group_is_refused(tmp_path: Path, group: bytes) -> None:
    old = bytes(1000)
    (tmp_path / "old").write_bytes(old)
    (tmp_path / "delta").write_bytes(crafted(old, 100, group))
    with pytest.raises(DeltaError) as caught:
        apply_delta(tmp_path / "old", tmp_path / "delta", tmp_path / "out", sha256="0" * 64, length=100)
    assert caught.value.reason == "bad-delta"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "old"]


def test_factors_that_would_not_fit_into_memory_are_refused() -> None:
    size = 1 << 27
    ranked = tensor(row=1, rank=1, length=size) + bytes(2)
    gained = tensor(model=2, row=1, width=1, length=size) + bytes(1)
    for fields in (ranked, gained):
        group = grouped(with_model(fields), length=size, lanes=1)
        with pytest.raises(DeltaError, match="numbers in the factors"):
            read_group(io.BytesIO(group), left=size, old_length=size)


@pytest.mark.parametrize("length", [MAX_EARLY + 1, BLOCK + 1])
def test_early_tensors_that_would_not_fit_into_memory_are_refused(length: int) -> None:
    group = grouped(with_model(tensor(flags=4, row=1, length=length)), length=length, lanes=1)
    with pytest.raises(DeltaError, match="early tensors"):
        read_group(io.BytesIO(group), left=length, old_length=length)


def test_a_frame_that_goes_on_for_ever_stops_at_the_announced_length(tmp_path: Path) -> None:
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 28))
    (tmp_path / "delta").write_bytes(Header(Method.FULL, "0" * 64, "0" * 64, 1000, 0).pack() + bomb)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DeltaError):
        apply_delta(None, tmp_path / "delta", tmp_path / "out", sha256="0" * 64, length=1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_a_delta_is_applied_in_a_process_that_says_why_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    old = rng.bytes(100_000)
    (tmp_path / "old").write_bytes(old)
    (tmp_path / "new").write_bytes(old[:50_000] + b"more" + old[50_000:])
    make_delta(tmp_path / "old", tmp_path / "new", tmp_path / "delta")
    paths = tmp_path / "old", tmp_path / "delta", tmp_path / "out"
    digest, length = sha256_file(tmp_path / "new"), (tmp_path / "new").stat().st_size
    asyncio.run(apply_apart(*paths, sha256=digest, length=length))
    assert paths[2].read_bytes() == (tmp_path / "new").read_bytes()
    with pytest.raises(DigestMismatchError):
        asyncio.run(apply_apart(*paths, sha256="0" * 64, length=length))
    paths[0].write_bytes(b"another")
    with pytest.raises(DeltaError) as caught:
        asyncio.run(apply_apart(*paths, sha256=digest, length=length))
    assert caught.value.reason == "wrong-base"


def test_a_cancelled_apply_leaves_nothing(tmp_path: Path) -> None:
    old = np.random.default_rng(2).bytes(40_000_000)
    (tmp_path / "old").write_bytes(old)
    (tmp_path / "delta").write_bytes(Header(Method.PATCH, sha256_bytes(old), "0" * 64, 10, len(old)).pack() + b"x")

    async def cancel() -> None:
        paths = tmp_path / "old", tmp_path / "delta", tmp_path / "out"
        task = asyncio.create_task(apply_apart(*paths, sha256="0" * 64, length=10))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "old"]
