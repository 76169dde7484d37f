"""The delta file: a fixed header, then what rebuilds the target.

    offset  bytes  field
         0      4  magic "ISTD"
         4      1  format version: 1, or 2 for `SEGMENTS`
         5      1  method (`Method`)
         6     32  SHA-256 of the base file (zeros for `FULL`)
        38     32  SHA-256 of the target file
        70      8  length of the target file, little endian
        78      8  length of the base file, little endian (0 for `FULL`)
        86      -  by method:

    FULL        zstd frame (RFC 8878): the target
    PATCH       zstd frame: the target, with the base as raw-content dictionary (`zstd --patch-from`)
    DIFFERENCE  zstd frame: (target - base) modulo 256, byte by byte; base and target have the same length
    SEGMENTS    groups of segments (`isthmus.delta.segments`)

`docs/delta-format.md` says everything that another decoder needs. A delta is not signed: who applies it knows the
signed digest and length of the target and accepts nothing else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import BinaryIO, Final

from isthmus.errors import DeltaError

MAGIC: Final = b"ISTD"
FORMATS: Final = (1, 2)
_LAYOUT: Final = struct.Struct("<4sBB32s32sQQ")
HEADER_BYTES: Final = _LAYOUT.size
MAX_FILE_BYTES: Final = 1 << 40


class Method(IntEnum):
    """How the frame becomes the target."""

    FULL = 0
    PATCH = 1
    DIFFERENCE = 2
    SEGMENTS = 3


@dataclass(frozen=True, slots=True)
class Header:
    """What a delta says about itself."""

    method: Method
    base_sha256: str
    target_sha256: str
    target_length: int  # bytes
    base_length: int  # bytes

    @property
    def format(self) -> int:
        """The format version that has this method."""
        return 2 if self.method is Method.SEGMENTS else 1

    def pack(self) -> bytes:
        """Return the header's bytes."""
        base, target = bytes.fromhex(self.base_sha256), bytes.fromhex(self.target_sha256)
        return _LAYOUT.pack(MAGIC, self.format, self.method, base, target, self.target_length, self.base_length)


def read_header(file: BinaryIO) -> Header:
    """Read the header at the file's position.

    Raises:
        DeltaError: This is not a delta, a newer format, an unknown method, or its lengths are out of bounds.
    """
    data = file.read(HEADER_BYTES)
    if len(data) != HEADER_BYTES or data[:4] != MAGIC:
        raise DeltaError("expected a delta (magic ISTD), got something else", hint="isthmus delta make makes one")
    _, version, method, base, target, target_length, base_length = _LAYOUT.unpack(data)
    if version not in FORMATS:
        raise DeltaError(f"expected delta format 1 or 2, got {version}", hint="update isthmus on this machine")
    if method not in set(Method) or (method == Method.SEGMENTS) != (version == 2):
        raise DeltaError(f"expected a method of delta format {version}, got {method}")
    if max(target_length, base_length) > MAX_FILE_BYTES:
        raise DeltaError(f"expected lengths up to {MAX_FILE_BYTES}, got {target_length} and {base_length}")
    if method == Method.DIFFERENCE and base_length != target_length:
        raise DeltaError(f"a difference needs equal lengths, got {base_length} and {target_length}")
    return Header(Method(method), base.hex(), target.hex(), target_length, base_length)
