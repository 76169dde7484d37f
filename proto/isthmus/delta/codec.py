"""Making and applying deltas of single files.

Making: the tensors are coded, general methods that a fast compressor finds promising are compressed hard, the smallest
result is taken. The file alone is always compressed hard, until it is larger than the best so far: so a delta is never
larger than the compressed file, and that costs little time where the delta is small.
Applying: streams; refuses a wrong base before reading the frame, stops at the announced length, and leaves nothing
behind but a file with the digest that the caller trusts.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import zstandard

from isthmus.delta.alignment import pair_tensors
from isthmus.delta.container import Header, Method, read_header
from isthmus.delta.layout import find_tensors
from isthmus.delta.rebuild import rebuild_groups
from isthmus.delta.writing import write_groups
from isthmus.digests import CHUNK, check_file, sha256_file
from isthmus.errors import DeltaError, DigestMismatchError

ESTIMATE_LEVEL: Final = 3
LEVEL: Final = 19
MAX_PATCH: Final = 1 << 24  # bytes of a base that is a dictionary as a whole: the decoder holds it twice
MAX_WINDOW: Final = 25  # bits: what decoding holds of the target
_HARDER: Final = 0.65  # the hardest level makes of general data hardly less than this share of the quickest
_HARDER_OF_WEIGHTS: Final = 0.85  # and of files that are mostly weights
_BLOCK: Final = 1 << 17  # bytes that zstd compresses at a time
_NO_BASE: Final = "0" * 64


@dataclass(frozen=True, slots=True)
class DeltaInfo:
    """What `make_delta` made."""

    method: Method
    length: int  # bytes of the delta file
    target_length: int  # bytes of the file that it rebuilds


def make_delta(
    old: Path | None,
    new: Path,
    out: Path,
    *,
    old_layout: Path | None = None,
    new_layout: Path | None = None,
) -> DeltaInfo:
    """Write to `out` the smallest delta that turns `old` into `new`; without `old`, the compressed file.

    Args:
        old: The base; None for a delta that needs none.
        new: The target.
        out: Where the delta goes.
        old_layout: The OpenVINO description of the old weights; by default the `.xml` file beside them.
        new_layout: The same of the new weights.
    """
    target, base = mapped(new), mapped(old)
    full = Header(Method.FULL, _NO_BASE, sha256_file(new), len(target), 0)
    if old is None or not len(base):
        return _write(out, full, [_compress(target, Method.FULL, base, LEVEL)])
    based = Header(Method.PATCH, sha256_file(old), full.target_sha256, len(target), len(base))
    tensors = find_tensors(base, old_layout or _beside(old)), find_tensors(target, new_layout or _beside(new))
    pairs = pair_tensors(*tensors, base, target)
    if pairs or len(base) > MAX_PATCH or len(target) > MAX_PATCH:
        best = _Candidate(replace(based, method=Method.SEGMENTS), b"".join(write_groups(pairs, base, target)))
    else:
        best = _Candidate(full, _compress(target, Method.FULL, base, LEVEL))
    others = {}
    if best.header is not full:
        others[Method.FULL] = (full, target)
    if len(base) <= MAX_PATCH and len(target) <= MAX_PATCH:
        others[Method.PATCH] = (based, target)
        if len(base) == len(target):
            moved = (_octets(target) - _octets(base)).data
            others[Method.DIFFERENCE] = (replace(based, method=Method.DIFFERENCE), moved)
    weights = 2 * sum(pair.length for pair in pairs) > len(target)
    least = len(best.body) / (_HARDER_OF_WEIGHTS if weights else _HARDER)
    for method in _promising({method: data for method, (_, data) in others.items()}, base, least):
        header, data = others[method]
        body = _compress_below(data, method, base, len(best.body))
        best = best if body is None else _Candidate(header, body)
    return _write(out, best.header, [best.body])


@dataclass(frozen=True, slots=True)
class _Candidate:
    header: Header
    body: bytes


def _promising(frames: Mapping[Method, memoryview], base: memoryview, least: float) -> list[Method]:
    """Return the methods to be tried hard: those quickly made smaller than `least`, and FULL at last."""
    quick = {
        method: len(_compress(data, method, base, ESTIMATE_LEVEL))
        for method, data in frames.items()
        if method is not Method.FULL
    }
    chosen = sorted((method for method in quick if quick[method] < least), key=lambda method: quick[method])
    return [*chosen, *({Method.FULL} & set(frames))]


def _beside(path: Path) -> Path | None:
    xml = path.with_suffix(".xml")
    return xml if path.suffix == ".bin" and xml.is_file() else None


def mapped(path: Path | None) -> memoryview:
    """Return a file's bytes, mapped into memory for as long as anything refers to them."""
    if path is None or not path.stat().st_size:
        return memoryview(b"")
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _write(out: Path, header: Header, body: Iterable[bytes]) -> DeltaInfo:
    with out.open("wb") as file:
        file.write(header.pack())
        for part in body:
            file.write(part)
        return DeltaInfo(header.method, file.tell(), header.target_length)


def _octets(data: memoryview | bytes) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(data, dtype=np.uint8)


def _compress(data: memoryview, method: Method, base: memoryview, level: int) -> bytes:
    return _compressor(data, method, base, level).compress(data)


def _compress_below(data: memoryview, method: Method, base: memoryview, limit: int) -> bytes | None:
    """Compress hard; stop and return None as soon as the result would not be below the limit."""
    compressing = _compressor(data, method, base, LEVEL).compressobj(size=len(data))
    parts, size = [], 0
    for at in range(0, len(data), _BLOCK):
        parts.append(compressing.compress(data[at : at + _BLOCK]))
        size += len(parts[-1])
        if size >= limit:
            return None
    parts.append(compressing.flush())
    return b"".join(parts) if size + len(parts[-1]) < limit else None


def _compressor(data: memoryview, method: Method, base: memoryview, level: int) -> zstandard.ZstdCompressor:
    patch = method is Method.PATCH
    window = max(10, min(MAX_WINDOW, (len(data) + (len(base) if patch else 0)).bit_length()))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, source_size=len(data), window_log=window, enable_ldm=patch, write_content_size=True
    )
    dictionary = zstandard.ZstdCompressionDict(bytes(base), dict_type=zstandard.DICT_TYPE_RAWCONTENT) if patch else None
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters)


def apply_delta(old: Path | None, delta: Path, out: Path, *, sha256: str, length: int) -> None:
    """Rebuild a file into `out`.

    Args:
        old: The base; None when the device has none (only a FULL delta will do).
        delta: The delta file.
        out: Where the rebuilt file goes; it exists only when everything holds.
        sha256: Trusted digest of the rebuilt file.
        length: Trusted length of the rebuilt file in bytes.

    Raises:
        DeltaError: The delta is malformed, or was made from another base or for another target.
        DigestMismatchError: The rebuilt bytes are not the trusted ones.
    """
    part = part_of(out)
    try:
        with delta.open("rb") as file:
            header = read_header(file)
            _check_meant(header, old, sha256, length)
            with part.open("wb") as target:
                for chunk in _rebuild(header, old, file):
                    target.write(chunk)
                target.flush()
                os.fsync(target.fileno())
        check_file(part, sha256=sha256, length=length, what=f"file rebuilt by {delta.name}")
        part.replace(out)
    except zstandard.ZstdError as error:
        raise DeltaError(f"{delta.name}: the compressed frame is damaged ({error})") from error
    finally:
        part.unlink(missing_ok=True)


def part_of(out: Path) -> Path:
    """Return where `out` is until everything holds."""
    return out.with_name(out.name + ".rebuilding")


def _check_meant(header: Header, old: Path | None, sha256: str, length: int) -> None:
    if header.target_sha256 != sha256 or header.target_length != length:
        raise DigestMismatchError(
            f"the delta is for a file of {header.target_length} bytes with SHA-256 {header.target_sha256[:16]}…, "
            f"expected {length} bytes with {sha256[:16]}…"
        )
    if header.method is Method.FULL:
        return
    if old is None:
        raise DeltaError("the delta needs a base file, and there is none", reason="wrong-base")
    if old.stat().st_size != header.base_length or sha256_file(old) != header.base_sha256:
        raise DeltaError(
            f"{old.name} is not the base that the delta was made from (SHA-256 {header.base_sha256[:16]}…)",
            reason="wrong-base",
        )


def _rebuild(header: Header, old: Path | None, file: BinaryIO) -> Iterator[bytes]:
    if header.method is Method.SEGMENTS:
        if old is not None:
            yield from rebuild_groups(file, old, length=header.target_length, old_length=header.base_length)
        return
    dictionary = None
    if header.method is Method.PATCH and old is not None:
        dictionary = zstandard.ZstdCompressionDict(old.read_bytes(), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    window = 1 << max(10, min(zstandard.WINDOWLOG_MAX, (header.target_length + header.base_length).bit_length()))
    decompressor = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=window)
    with decompressor.stream_reader(file, closefd=False) as reader:
        chunks = _read_exactly(reader, header.target_length)
        if header.method is not Method.DIFFERENCE or old is None:
            yield from chunks
            return
        with old.open("rb") as base:
            for chunk in chunks:
                yield (_octets(chunk) + _octets(base.read(len(chunk)))).tobytes()


def _read_exactly(reader: zstandard.ZstdDecompressionReader, length: int) -> Iterator[bytes]:
    left = length
    while left:
        chunk = reader.read(min(CHUNK, left))
        if not chunk:
            raise DeltaError(f"the compressed frame ends {left} bytes before the announced length of {length}")
        left -= len(chunk)
        yield chunk
    if reader.read(1):
        raise DeltaError(f"the compressed frame goes on after the announced length of {length}")
