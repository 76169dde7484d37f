"""Writes the golden deltas of format 2 anew: `python -m tests.isthmus.delta.golden_files`.

Only for as long as no version that writes the format has been released: afterwards they are what must decode for ever.
Those of format 1 are never written again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from isthmus.delta import make_delta
from tests.isthmus.delta.files import safetensors, tuned

GOLDEN: Final = Path(__file__).parent / "golden"
_OPENVINO: Final = """<net><layers>
<layer id="0" name="w4" type="Const"><data element_type="u4" shape="64, 33" offset="0" size="1056"/></layer>
<layer id="1" name="w8" type="Const"><data element_type="i8" shape="64, 48" offset="1056" size="3072"/></layer>
<layer id="2" name="w16" type="Const"><data element_type="bf16" shape="48, 64" offset="4128" size="6144"/></layer>
</layers></net>"""

Arrays = dict[str, NDArray[np.generic]]


def main() -> None:
    """Write the files."""
    rng = np.random.default_rng(6)
    before, after = _tensors(rng)
    _write("tensors", safetensors(before), safetensors(after))
    old, new = _openvino(rng)
    xml = GOLDEN / "openvino.xml"
    xml.write_text(_OPENVINO)
    _write("openvino", old, new, xml)
    xml.unlink()


def _write(name: str, old: bytes, new: bytes, layout: Path | None = None) -> None:
    before, after = GOLDEN / f"{name}.old", GOLDEN / f"{name}.new"
    before.write_bytes(old)
    after.write_bytes(new)
    make_delta(before, after, GOLDEN / f"{name}.format2.delta", old_layout=layout, new_layout=layout)


def _tensors(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    """Return tensors of every kind that safetensors has: with factors, gains, still rows, raw bits, outliers; new."""
    half, half_new = tuned(rng, (96, 80), rank=2, noise=1e-4)
    single, single_new = tuned(rng, (40, 64), rank=1, noise=1e-5)
    octets = rng.integers(-100, 100, (256, 40)).astype(np.int8)
    moved = octets + (rng.random(octets.shape) < np.where(np.arange(256) % 4 == 0, 0.4, 0)[:, None]).astype(np.int8)
    ranked = rng.integers(-80, 80, (96, 96)).astype(np.int8)
    steps = rng.normal(size=(96, 2)) @ rng.normal(size=(2, 96)) * 0.6
    words = rng.integers(-9000, 9000, 300).astype(np.int16)
    whole = rng.integers(-(1 << 30), 1 << 30, 50).astype(np.int32)
    half_new[3, 7] = np.inf
    folded = (rng.normal(size=(60, 3, 8)) * 0.1).astype(np.float16)
    grown = folded * (1 + rng.normal(size=(60, 1, 1)) * 0.05) + rng.normal(size=folded.shape) * 1e-4
    scales = (rng.random(70) * (1 + np.outer((0.0, 0.01), rng.normal(size=70)))).astype(np.float32)
    old: Arrays = {"half": half.astype(np.float16), "single": single, "octets": octets, "ranked": ranked,
           "words": words, "whole": whole, "same": np.arange(200, dtype=np.uint8),
           "folded": folded, "scales": scales[0], "products": scales[0] * np.float32(0.3)}  # fmt: skip
    new: Arrays = {"half": half_new.astype(np.float16), "single": single_new, "octets": moved,
           "ranked": (ranked + np.floor(steps + rng.random(steps.shape))).astype(np.int8),
           "words": words + rng.integers(-40, 40, 300).astype(np.int16), "whole": whole + 70000,
           "same": old["same"], "added": rng.normal(size=30).astype(np.float32),
           "folded": grown.astype(np.float16), "scales": scales[1],
           "products": scales[1] * np.float32(0.4)}  # fmt: skip
    return old, new


def _openvino(rng: np.random.Generator) -> tuple[bytes, bytes]:
    nibbles = rng.integers(0, 256, 1056).astype(np.uint8)
    octets = rng.integers(0, 256, (64, 48)).astype(np.uint8)
    single, single_new = tuned(rng, (48, 64), rank=1, noise=1e-4)
    old = nibbles, octets, (single.view(np.uint32) >> 16).astype(np.uint16)
    new = (
        nibbles ^ (rng.random(1056) < 0.1).astype(np.uint8),
        octets + (rng.random((64, 48)) < 0.1).astype(np.uint8),
        (single_new.view(np.uint32) >> 16).astype(np.uint16),
    )
    return b"".join(part.tobytes() for part in old), b"".join(part.tobytes() for part in new)


if __name__ == "__main__":
    main()
