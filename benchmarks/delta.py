"""Size and speed of deltas, against the general tools that a fleet would use otherwise.

The pair is the INT8 variant of the quickstart's two versions when `make demo` has left it in build/, and otherwise a
stand-in of the same shape: 4 M random INT8 weights of which one in twelve moved by one step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import zstandard

from benchmarks.result import Goal, publish
from isthmus.delta import apply_delta, make_delta
from isthmus.digests import sha256_file

app = typer.Typer()


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="A shorter form for checks.")] = False,
    json: Annotated[Path | None, typer.Option(help="Where the figures go.")] = None,
) -> None:
    """Measure size, make and apply of one pair."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        old, new, pair = _pair(folder, quick=quick)
        rows = [_ours(old, new, folder, repeats=1 if quick else 5), *_peers(old.read_bytes(), new.read_bytes())]
    length = rows[0]["file_bytes"]
    best = min(row["bytes"] for row in rows[1:])
    goals = [
        Goal("delta / file", round(rows[0]["bytes"] / length, 4), 0.12),
        Goal("delta / best general tool", round(rows[0]["bytes"] / best, 4), 1.0),
    ]
    publish(f"delta: {pair}", rows, goals, json)


def _pair(folder: Path, *, quick: bool) -> tuple[Path, Path, str]:
    path = "variants/openvino-int8/model.bin"
    bundles = [Path("build/demo") / f"bundle-{version}" / path for version in (1, 2)]
    if not quick and all(bundle.exists() for bundle in bundles):
        return bundles[0], bundles[1], "MiniLM light model, OpenVINO INT8, version 1 to 2 of the quickstart"
    rng = np.random.default_rng(0)
    weights = np.clip(np.round(rng.normal(size=4_000_000) * 30), -127, 127).astype(np.int8)
    moved = weights + (rng.random(weights.size) < 1 / 12) * rng.choice([-1, 1], weights.size)
    (folder / "old").write_bytes(weights.tobytes())
    (folder / "new").write_bytes(moved.astype(np.int8).tobytes())
    return folder / "old", folder / "new", "stand-in: 4 M INT8 weights, 1 in 12 moved by one step"


def _ours(old: Path, new: Path, folder: Path, *, repeats: int) -> dict[str, Any]:
    delta, out = folder / "delta", folder / "out"
    make_s = _seconds(lambda: make_delta(old, new, delta), 1)
    digest, length = sha256_file(new), new.stat().st_size
    apply_s = _seconds(lambda: apply_delta(old, delta, out, sha256=digest, length=length), repeats)
    return _row("isthmus delta", delta.stat().st_size, length, make_s, apply_s)


def _peers(old: bytes, new: bytes) -> list[dict[str, Any]]:
    rows = []
    dictionary = zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    window = (len(old) + len(new)).bit_length()
    for name, reference in (("zstd -19", None), ("zstd -19 --patch-from --long", dictionary)):
        parameters = zstandard.ZstdCompressionParameters.from_level(
            19, source_size=len(new), window_log=window, enable_ldm=reference is not None
        )
        compressor = zstandard.ZstdCompressor(dict_data=reference, compression_params=parameters)
        begun = time.perf_counter()
        frame = compressor.compress(new)
        make_s = time.perf_counter() - begun
        decompressor = zstandard.ZstdDecompressor(dict_data=reference, max_window_size=1 << window)
        apply_s = _seconds(partial(decompressor.decompress, frame, max_output_size=len(new)), 3)
        rows.append(_row(name, len(frame), len(new), make_s, apply_s))
    return rows


def _seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return float(np.median(times))


def _row(name: str, size: int, length: int, make_s: float, apply_s: float) -> dict[str, Any]:
    return {
        "tool": name,
        "bytes": size,
        "file_bytes": length,
        "percent": round(100 * size / length, 2),
        "make_s": round(make_s, 2),
        "apply_mb_per_s": round(length / apply_s / 1e6, 1),
    }


app()
