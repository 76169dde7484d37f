"""Deltas of weight files: whatever tensors, names and layouts they have, the file comes back and few bytes move."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from isthmus.delta import Method, apply_delta, describe, elements, make_delta, rans, read_header
from isthmus.delta.elements import Kind
from isthmus.delta.layout import find_tensors
from isthmus.digests import sha256_file
from isthmus.errors import DeltaError
from tests.isthmus.delta.files import onnx_model, safetensors, tuned

DTYPES = ("int8", "uint8", "int16", "int32", "float16", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensors")


def share(folder: Path, old: bytes, new: bytes, suffix: str = "") -> tuple[Method, float]:
    """Make a delta, apply it, and return its method and its share of the new file."""
    before, after, delta, out = (folder / (name + suffix) for name in ("old", "new", "delta", "out"))
    before.write_bytes(old)
    after.write_bytes(new)
    info = make_delta(before, after, delta)
    apply_delta(before, delta, out, sha256=sha256_file(after), length=len(new))
    assert out.read_bytes() == new
    return info.method, info.length / len(new)


@st.composite
def weight_files(draw: st.DrawFn) -> tuple[bytes, bytes]:
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    write = draw(st.sampled_from([safetensors, onnx_model]))
    old: dict[str, NDArray[np.generic]] = {}
    new: dict[str, NDArray[np.generic]] = {}
    for number in range(draw(st.integers(1, 5))):
        dtype = np.dtype(draw(st.sampled_from(DTYPES)))
        shape = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
        raw = rng.bytes(int(np.prod(shape)) * dtype.itemsize)
        tensor = np.frombuffer(raw, dtype).reshape(shape)
        moved = np.frombuffer(raw, np.uint8) + (rng.random(len(raw)) < draw(st.sampled_from([0, 0.01, 0.5])))
        fate = draw(st.sampled_from(["keep", "keep", "rename", "insert", "remove", "grow"]))
        if fate != "insert":
            old[f"t{number}"] = tensor
        if fate != "remove":
            grown = np.frombuffer(moved.astype(np.uint8).tobytes(), dtype).reshape(shape)
            new[f"r{number}" if fate == "rename" else f"t{number}"] = (
                np.concatenate((grown, tensor)) if fate == "grow" else grown
            )
    anything = {"t": np.arange(9, dtype=np.int8)}
    return write(old or anything), write(new or anything)


@given(pair=weight_files())
@settings(deadline=None, max_examples=80)
def test_weight_files_come_back_whatever_happened_to_their_tensors(folder: Path, pair: tuple[bytes, bytes]) -> None:
    share(folder, *pair)


@given(
    data=st.binary(max_size=400),
    head=st.sampled_from([b"", b"\x7fELF\x02\x01", b"\x3a\x90\x01", b"\x20" + bytes(7) + b"{"]),
)
@settings(deadline=None)
def test_a_layout_never_leads_outside_of_the_file(data: bytes, head: bytes) -> None:
    end = 0
    for tensor in find_tensors(memoryview(head + data)):
        assert end <= tensor.offset <= tensor.offset + tensor.length <= len(head) + len(data)
        end = tensor.offset + tensor.length


@pytest.mark.parametrize("offsets", [(0, 1 << 40), (-5, 400), (100, 500), (800, 0), ("a", None)])
def test_a_lying_header_costs_bytes_and_nothing_else(folder: Path, offsets: tuple[object, object]) -> None:
    tensors = {"a": np.arange(200, dtype=np.float32), "b": np.ones(100, np.float32)}
    good = safetensors(tensors)
    size = int.from_bytes(good[:8], "little")
    begin, end = (f'"{at}"' if isinstance(at, str) else "null" if at is None else str(at) for at in offsets)
    header = good[8 : 8 + size].replace(b"[0, 800]", f"[{begin}, {end}]".encode())
    lying = struct.pack("<Q", len(header)) + header + good[8 + size :]
    share(folder, good, lying)
    share(folder, lying, good)


@given(
    kind=st.sampled_from(list(Kind)),
    words=st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), min_size=1),
)
def test_symbols_and_raw_bits_say_every_difference(kind: Kind, words: list[tuple[int, int]]) -> None:
    data = np.array(words, "<u4")
    old, new = (elements.to_ints(data[:, side].tobytes(), kind) for side in (0, 1))
    difference = elements.differences(old, new, kind)
    symbols, raw = elements.to_symbols(difference, kind)
    assert symbols.max() < elements.symbol_count(kind) <= rans.MAX_SYMBOLS
    moved = elements.move(old, symbols, raw, kind)
    assert elements.to_bytes(moved, kind) == data[:, 1].tobytes()


@given(size=st.integers(0, 1500), lanes=st.sampled_from([1, 2, 16, 64, 256]), seed=st.integers(0, 999))
@settings(deadline=None)
def test_rans_gives_back_symbols_and_bits(size: int, lanes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    frequencies = np.array([[4096, 0, 0], [4000, 95, 1], [1, 2048, 2047]], np.uint16)
    contexts = rng.integers(0, 3, size).astype(np.uint8)
    symbols = np.where(contexts == 0, 0, rng.integers(0, 3, size)).astype(np.uint8)
    counts = np.array([0, 7, 30], np.uint8)
    bits = (rng.integers(0, 1 << 32, size) & ((1 << counts[symbols].astype(np.int64)) - 1)).astype(np.uint32)
    half = size // 3
    parts = [slice(0, half), slice(half, size)]
    stream = rans.encode(
        [rans.Coded(symbols[part], contexts[part], frequencies, counts, bits[part]) for part in parts], lanes
    )
    left = [stream.words]

    def take(count: int) -> rans.U16:
        taken, left[0] = left[0][:count], left[0][count:]
        return taken

    decoder = rans.Decoder(stream.states, take, stream.halvings)
    for part in parts:
        slots = contexts[part].astype(np.uint32) * np.uint32(rans.TOTAL)
        decoded, raw = decoder.decode(slots, rans.Table(frequencies), counts)
        assert (decoded == symbols[part]).all()
        assert (bits[part] == (0 if raw is None else raw)).all()
    decoder.finish()


def test_a_lane_costs_about_a_byte() -> None:
    rng = np.random.default_rng(3)
    frequencies = np.array([[4000, 48, 48]], np.uint16)
    symbols = rng.choice(3, 400_000, p=frequencies[0] / rans.TOTAL).astype(np.uint8)
    coded = [rans.Coded(symbols, np.zeros(symbols.size, np.uint8), frequencies, None, None)]
    few, many = rans.encode(coded, 32), rans.encode(coded, 1024)
    assert many.states.size == 1024
    cost = 4 * many.states.size + 2 * many.words.size - 4 * few.states.size - 2 * few.words.size
    assert cost < 1.3 * (many.states.size - few.states.size)


def test_contexts_make_a_delta_smaller_than_one_distribution(folder: Path) -> None:
    rng = np.random.default_rng(4)
    old = rng.integers(-100, 100, (2000, 300)).astype(np.int8)
    rates = np.where(np.arange(2000) % 10, 0.002, 0.5)[:, None]
    new = (old + (rng.random(old.shape) < rates) * rng.choice([-1, 1], old.shape)).astype(np.int8)
    method, part = share(folder, safetensors({"w": old}), safetensors({"w": new}))
    p = float((old != new).mean())
    entropy = (-p * np.log2(p / 2) - (1 - p) * np.log2(1 - p)) / 8
    assert method is Method.SEGMENTS
    assert part < 0.75 * entropy


def test_rows_that_are_still_cost_next_to_nothing(folder: Path) -> None:
    rng = np.random.default_rng(11)
    old = rng.integers(-100, 100, (3000, 128)).astype(np.int8)
    new = old.copy()
    new[::50] += (rng.random(new[::50].shape) < 0.3).astype(np.int8)
    _, part = share(folder, safetensors({"w": old}), safetensors({"w": new}))
    _, dense = share(folder, safetensors({"w": old[::50]}), safetensors({"w": new[::50]}))
    assert part * new.size < dense * new[::50].size + 400


def test_a_change_of_low_rank_costs_little_more_than_its_factors(folder: Path) -> None:
    old, new = tuned(np.random.default_rng(5), (256, 512), rank=4, noise=0)
    method, part = share(folder, safetensors({"w": old.astype(np.float16)}), safetensors({"w": new.astype(np.float16)}))
    assert method is Method.SEGMENTS
    assert part < 0.13


def test_products_of_tensors_that_cannot_be_read_early_come_back_too(folder: Path) -> None:
    rng = np.random.default_rng(1)
    one = rng.random((1024, 1), dtype=np.float32)
    changed = one.copy()
    changed[:700] *= (1 + 0.01 * rng.normal(size=(700, 1))).astype(np.float32)
    old, new = {"s": one, "p": one * np.float32(0.3)}, {"s": changed, "p": changed * np.float32(0.4)}
    share(folder, safetensors(old), safetensors(new), ".still")

    for place in range(10):  # sources of more than may be read early, together
        source = rng.random(1 << 17, dtype=np.float32)
        changed = (source * (1 + 0.01 * rng.normal(size=source.size))).astype(np.float32)
        old |= {f"s{place}": source, f"p{place}": source * np.float32(0.3)}
        new |= {f"s{place}": changed, f"p{place}": changed * np.float32(0.4)}
    share(folder, safetensors(old), safetensors(new), ".many")


def test_products_of_numbers_that_are_not_finite_come_back_too(folder: Path) -> None:
    rng = np.random.default_rng(2)
    source = rng.random(1 << 12, dtype=np.float32)
    changed = (source * (1 + 0.01 * rng.normal(size=source.size))).astype(np.float32)
    changed[50] = np.inf
    old, new = {"s": source, "p": source * np.float32(0.5)}, {"s": changed, "p": changed * np.float32(0.25)}
    share(folder, safetensors(old), safetensors(new), ".infinite")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_channels_that_were_rescaled_cost_little_more_than_a_number_each(
    folder: Path, dtype: type[np.floating[Any]]
) -> None:
    rng = np.random.default_rng(12)
    old = (rng.normal(size=(300, 4, 10)) * 0.05).astype(dtype)  # short channels: rows are joined, gains are not
    noise = rng.normal(size=old.shape) * 2e-4
    gains = (rng.integers(-400, 400, 300) * 2.0**-10)[:, None, None]
    _, part = share(folder, safetensors({"w": old}), safetensors({"w": (old * (1 + gains) + noise).astype(dtype)}))
    _, noisy = share(folder, safetensors({"w": old}), safetensors({"w": (old + noise).astype(dtype)}))
    assert part * old.nbytes < noisy * old.nbytes + 4 * 300


def test_scales_that_are_others_times_a_number_cost_next_to_nothing(folder: Path) -> None:
    rng = np.random.default_rng(13)
    versions = []
    before = rng.uniform(0.001, 0.01, 2000)
    for seen, moves in ((0.017, 0.0), (0.0193, 0.02)):
        scales = (before * (1 + moves * rng.normal(size=2000))).astype(np.float32)
        versions.append({"of biases": scales * np.float32(seen), "of weights": scales})
    old, new = versions
    _, both = share(folder, safetensors(old), safetensors(new))
    for version in versions:
        del version["of biases"]
    _, one = share(folder, safetensors(old), safetensors(new))
    assert both * 16000 < one * 8000 + 200


@pytest.mark.parametrize("write", [safetensors, onnx_model])
def test_tensors_are_found_by_name_wherever_they_moved(folder: Path, write: object) -> None:
    assert callable(write)
    rng = np.random.default_rng(6)
    pairs = {f"layer.{number}": tuned(rng, (64, 96), rank=1, noise=1e-5) for number in range(6)}
    old = {name: pair[0] for name, pair in pairs.items()}
    new = {"inserted": np.zeros(50, np.float32), **{name: pairs[name][1] for name in reversed(pairs)}}
    _, moved = share(folder, write(old), write(new))
    _, kept = share(folder, write(old), write({name: pair[1] for name, pair in pairs.items()}))
    assert moved < kept + 0.03


def test_openvino_weights_are_understood_by_the_description_beside_them(tmp_path: Path) -> None:
    old, new = tuned(np.random.default_rng(7), (128, 256), rank=2, noise=1e-5)
    xml = (
        '<net><layers><layer id="0" name="w" type="Const">'
        '<data element_type="f16" shape="128, 256" offset="0" size="65536"/></layer></layers></net>'
    )
    plain, _ = (tmp_path / "old.bin").write_bytes(b""), None
    assert plain == 0
    (tmp_path / "old.xml").write_text(xml)
    (tmp_path / "new.xml").write_text(xml)
    share(tmp_path, old.astype(np.float16).tobytes(), new.astype(np.float16).tobytes(), ".bin")
    with (tmp_path / "delta.bin").open("rb") as file:
        assert {"float16"} <= {str(part["part"]) for part in describe(file, read_header(file))}


def test_weights_in_a_file_of_no_known_format_are_found_by_their_statistics(folder: Path) -> None:
    rng = np.random.default_rng(8)
    old, new = tuned(rng, (512, 512), rank=1, noise=1e-6)
    code = rng.bytes(3000)
    _, part = share(folder, code + old.tobytes() + code, code[:-4] + b"abcd" + new.tobytes() + code)
    assert part < 0.65


_MEASURE = """
import resource, sys
from pathlib import Path
from isthmus.delta import apply_delta
old, delta, out, digest, length = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
apply_delta(Path(old), Path(delta), Path(out), sha256=digest, length=int(length))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_apply_needs_little_memory_whatever_the_file_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    old = np.tile(rng.normal(size=(1000, 8000)).astype(np.float16), (6, 1))
    new = old.copy()
    new[-500::20] *= np.float16(1.01)
    for name, tensor in (("old", old), ("new", new)):
        (tmp_path / name).write_bytes(safetensors({"w": tensor}))
    make_delta(tmp_path / "old", tmp_path / "new", tmp_path / "delta")
    digest, length = sha256_file(tmp_path / "new"), (tmp_path / "new").stat().st_size
    paths = [str(tmp_path / name) for name in ("old", "delta", "out")]
    command = [sys.executable, "-c", _MEASURE, *paths, digest, str(length)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(said) < 64 * 1024


def test_a_table_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(DeltaError, match="add up"):
        rans.Table(np.array([[4000, 95]], np.uint16))
