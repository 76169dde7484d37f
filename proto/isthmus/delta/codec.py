"""Making and applying deltas of single files.

Making: every method that fits is estimated with a fast compressor, the most promising one is compressed hard. So a
delta is never much larger than the compressed file, and large files whose bytes hardly moved cost little time.
Applying: streams; refuses a wrong base before reading the frame, stops at the announced length, and leaves nothing
behind but a file with the digest that the caller trusts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import zstandard

from isthmus.delta.container import HEADER_BYTES, Header, Method, read_header
from isthmus.digests import CHUNK, check_file, sha256_bytes, sha256_file
from isthmus.errors import DeltaError, DigestMismatchError

ESTIMATE_LEVEL: Final = 3
LEVEL: Final = 19
_NO_BASE: Final = "0" * 64


@dataclass(frozen=True, slots=True)
class DeltaInfo:
    """What `make_delta` made."""

    method: Method
    length: int  # bytes of the delta file
    target_length: int  # bytes of the file that it rebuilds


def make_delta(old: Path | None, new: Path, out: Path) -> DeltaInfo:
    """Write to `out` the smallest delta that turns `old` into `new`; without `old`, the compressed file."""
    target = new.read_bytes()
    base = old.read_bytes() if old is not None else b""
    frames = _candidates(base, target)
    method = min(frames, key=lambda m: len(_compress(frames[m], m, base, ESTIMATE_LEVEL)))
    frame = _compress(frames[method], method, base, LEVEL)
    full = method is Method.FULL
    header = Header(
        method=method,
        base_sha256=_NO_BASE if full else sha256_bytes(base),
        target_sha256=sha256_bytes(target),
        target_length=len(target),
        base_length=0 if full else len(base),
    )
    out.write_bytes(header.pack() + frame)
    return DeltaInfo(method, HEADER_BYTES + len(frame), len(target))


def _candidates(base: bytes, target: bytes) -> dict[Method, bytes]:
    frames = {Method.FULL: target}
    if base:
        frames[Method.PATCH] = target
    if base and len(base) == len(target):
        frames[Method.DIFFERENCE] = (_octets(target) - _octets(base)).tobytes()
    return frames


def _octets(data: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(data, dtype=np.uint8)


def _compress(data: bytes, method: Method, base: bytes, level: int) -> bytes:
    patch = method is Method.PATCH
    window = max(10, min(zstandard.WINDOWLOG_MAX, (len(data) + len(base)).bit_length()))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, source_size=len(data), window_log=window, enable_ldm=patch, write_content_size=True
    )
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT) if patch else None
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(data)


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
    part = out.with_name(out.name + ".rebuilding")
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
