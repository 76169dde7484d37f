"""A mutator without coverage, for machines without atheris: what breaks parsers, applied to what they accept."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final

_EDGES: Final = (
    b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff\x7f", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"..", b"/", b"\n",
    b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"-----END", b"=", b"-", b"_", b"\x0b", b"\x0c", b"\x1a\x00", b"\x22\x00",
)  # fmt: skip


def mutations(seeds: Sequence[bytes], rng: random.Random) -> Iterator[bytes]:
    """Yield changed seeds without end; the first ones are the seeds themselves."""
    yield from seeds
    while True:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            _change(data, seeds, rng)
        yield bytes(data)


def _change(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 1, 2, 4, 16, 64)))
    match rng.randrange(8):
        case 0 if data:
            data[at - 1] ^= 1 << rng.randrange(8)
        case 1 if data:
            data[at - 1] = rng.randrange(256)
        case 2:
            data[at:at] = rng.choice(_EDGES)
        case 3:
            data[at:end] = rng.choice(_EDGES)
        case 4:
            del data[at:end]
        case 5:
            data[at:at] = data[at:end] * rng.choice((1, 2, 8))
        case 6:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            data[at:end] = other[start : start + 64]
        case _:
            del data[at:]
