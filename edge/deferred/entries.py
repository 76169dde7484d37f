"""The two kinds of files: a request that waits for the cloud, and a result that waits to be acknowledged.

    "ISD1" | length of the sealed header, 4 bytes | sealed header | sealed body

Names are numbers (`000000000042.request`), so they tell nothing. The header says whose it is and how long it lives; it
is sealed for its file's name, and the body for its header, so that no part opens in another place. The store reads all
headers when it starts, and a body only when it is sent or delivered.
"""

from __future__ import annotations

import re
import struct
from typing import Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.deferred.disk import Disk
from edge.deferred.sealing import OVERHEAD, Sealer
from isthmus.errors import TrustError

MAGIC: Final = b"ISD1"
TEMPORARY: Final = ".tmp"
Kind = Literal["request", "result"]
_PREFIX: Final = struct.Struct(">4sI")
_LENGTH: Final = struct.Struct(">I")
_NAME: Final = re.compile(r"(\d{12})\.(request|result)")
_LONGEST_HEADER: Final = 16_384  # bytes


class _Header(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)  # a newer agent may have written more

    owner: str
    queue: str
    id: str
    stored_ms: int  # wall clock
    ttl_s: int = Field(ge=1)


class RequestHeader(_Header):
    """Of a request that waits."""

    priority: int
    answer_bytes: int = Field(ge=0)


class ResultHeader(_Header):
    """Of a result; one with a reason is the end of a request that has no answer."""

    request: int  # number of the request that it ends
    reason: str = ""
    message: str = ""


H = TypeVar("H", RequestHeader, ResultHeader)


def file_name(number: int, kind: Kind) -> str:
    """Return the name of an entry's file."""
    return f"{number:012d}.{kind}"


def parse_name(name: str) -> tuple[int, Kind] | None:
    """Return number and kind of an entry's file, None when the name is not one."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return int(match[1]), "request" if match[2] == "request" else "result"


def encode(sealer: Sealer, name: str, header: RequestHeader | ResultHeader, body: bytes) -> bytes:
    """Return the bytes of an entry's file."""
    sealed = sealer.seal(header.model_dump_json().encode(), MAGIC + name.encode())
    return _PREFIX.pack(MAGIC, len(sealed)) + sealed + sealer.seal(body, sealed)


def read_header(disk: Disk, sealer: Sealer, name: str, kind: type[H]) -> H:
    """Return the header in an entry's file.

    Raises:
        TrustError: It is not one that this device wrote under this name.
        OSError: The file cannot be read.
    """
    head = disk.read(name, _PREFIX.size + _LONGEST_HEADER)
    header, _ = _open_header(sealer, name, head, kind)
    return header


def read_entry(disk: Disk, sealer: Sealer, name: str, kind: type[H]) -> tuple[H, bytes]:
    """Return header and body of an entry's file; raises as `read_header` does."""
    data = disk.read(name)
    header, end = _open_header(sealer, name, data, kind)
    return header, sealer.open(data[end:], data[_PREFIX.size : end])


def join_body(template: bytes, request: bytes) -> bytes:
    """Return the body of a request's file."""
    return _LENGTH.pack(len(template)) + template + request


def split_body(body: bytes) -> tuple[bytes, bytes]:
    """Return template and request of a request's body, which `join_body` made."""
    end = _LENGTH.size + _LENGTH.unpack_from(body)[0]
    return body[_LENGTH.size : end], body[end:]


def _open_header(sealer: Sealer, name: str, data: bytes, kind: type[H]) -> tuple[H, int]:
    if len(data) < _PREFIX.size:
        raise TrustError(f"{name}: expected an entry, got {len(data)} bytes", reason="damaged")
    magic, length = _PREFIX.unpack_from(data)
    end = _PREFIX.size + length
    if magic != MAGIC or not OVERHEAD <= length <= _LONGEST_HEADER or len(data) < end:
        raise TrustError(f"{name}: expected an entry, got something else", reason="damaged")
    plain = sealer.open(data[_PREFIX.size : end], MAGIC + name.encode())
    try:
        return kind.model_validate_json(plain), end
    except ValidationError as error:
        raise TrustError(f"{name}: the header is not one that this version reads", reason="damaged") from error
