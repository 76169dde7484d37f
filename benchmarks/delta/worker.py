"""One tool on one pair, in the environment of the tools: `python worker.py TOOL OLD NEW SPANS`.

It prints a line of JSON: the delta's bytes, and the seconds of one core to make and to apply it. What was applied is
compared with the new file. SPANS is a JSON file: the aligned tensors as [type, offset in old, offset in new, bytes],
for those tools that know of tensors.
"""

from __future__ import annotations

import json
import lzma
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_LEVEL: Final = 19


Make = Callable[[], bytes]
Apply = Callable[[bytes], bytes]
Coder = tuple[Make, Apply]


class RefusedError(Exception):
    """The tool cannot take the pair."""


@dataclass(frozen=True)
class Pair:
    """Both files, and the tensors that they share."""

    old: bytes
    new: bytes
    spans: list[tuple[str, int, int, int]]


def _zstd(old: bytes | None, new: bytes) -> Coder:
    import zstandard

    # A window over both files: what `zstd --long --patch-from` chooses.
    window = min(31, max(10, (len(new) + len(old or b"")).bit_length()))
    dictionary = None if old is None else zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, source_size=len(new), window_log=window, enable_ldm=old is not None
    )
    compressor = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters)
    decompressor = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << 31)
    return lambda: compressor.compress(new), lambda delta: decompressor.decompress(delta, max_output_size=len(new))


def zstd(pair: Pair) -> Coder:
    """zstd of the new file alone."""
    return _zstd(None, pair.new)


def zstd_patch_from(pair: Pair) -> Coder:
    """zstd with the old file as prefix."""
    return _zstd(pair.old, pair.new)


def xz(pair: Pair) -> Coder:
    """xz of the new file alone."""
    return lambda: lzma.compress(pair.new, preset=9), lambda delta: lzma.decompress(delta)


def bsdiff(pair: Pair) -> Coder:
    """bsdiff, by bsdiff4."""
    import bsdiff4

    return lambda: bsdiff4.diff(pair.old, pair.new), lambda delta: bsdiff4.patch(pair.old, delta)


def hdiffpatch(pair: Pair) -> Coder:
    """HDiffPatch with zstd, by the package of that name."""
    import hdiffpatch

    return (
        lambda: hdiffpatch.diff(pair.old, pair.new, compression=hdiffpatch.COMPRESSION_ZSTD),
        lambda delta: hdiffpatch.apply(pair.old, delta),
    )


def xdelta3(pair: Pair) -> Coder:
    """xdelta3 with its strongest settings."""
    if shutil.which("xdelta3") is None:
        raise RefusedError("not installed: apt-get install xdelta3")
    folder = Path(tempfile.mkdtemp())
    paths = {name: folder / name for name in ("old", "new", "delta", "out")}
    paths["old"].write_bytes(pair.old)
    paths["new"].write_bytes(pair.new)
    window = str(max(len(pair.old), 1 << 20))

    def run(*arguments: str) -> None:
        subprocess.run(["xdelta3", "-f", "-B", window, "-s", str(paths["old"]), *arguments], check=True)

    def make() -> bytes:
        run("-e", "-9", "-S", "lzma", str(paths["new"]), str(paths["delta"]))
        return paths["delta"].read_bytes()

    def apply(_: bytes) -> bytes:
        run("-d", str(paths["delta"]), str(paths["out"]))
        return paths["out"].read_bytes()

    return make, apply


def zipnn(pair: Pair) -> Coder:
    """ZipNN in its delta mode."""
    from zipnn import ZipNN

    if len(pair.old) != len(pair.new):
        raise RefusedError("its delta mode takes files of equal length only")
    types = {span[0] for span in pair.spans if span[3] > 4096}
    dtype = "float16" if "f16" in types else "float32"
    coder = ZipNN(delta_compressed_type="byte", bytearray_dtype=dtype, input_format="byte", threads=1)
    return (
        lambda: bytes(coder.compress(bytearray(pair.new), delta_second_data=bytearray(pair.old))),
        lambda delta: bytes(coder.decompress(bytearray(delta), delta_second_data=bytearray(pair.old))),
    )


def fm_delta(pair: Pair) -> Coder:
    """A coder after FM-Delta, and zstd for what lies between tensors."""
    import fmdelta

    old, new, spans = pair.old, pair.new, sorted(pair.spans, key=lambda span: span[2])
    by_type: dict[str, list[tuple[str, int, int, int]]] = {}
    for span in spans:
        by_type.setdefault(span[0], []).append(span)
    gaps, at = [], 0
    for _, _, start, size in spans:
        gaps.append((at, start))
        at = start + size
    gaps.append((at, len(new)))

    def before(group: list[tuple[str, int, int, int]]) -> bytes:
        return b"".join(old[start : start + size] for _, start, _, size in group)

    def after(group: list[tuple[str, int, int, int]]) -> bytes:
        return b"".join(new[start : start + size] for _, _, start, size in group)

    rest_make, rest_apply = _zstd(old, b"".join(new[start:stop] for start, stop in gaps))

    def make() -> bytes:
        parts = [rest_make()]
        for dtype, group in sorted(by_type.items()):
            parts += fmdelta.encode(before(group), after(group), dtype)
        header = json.dumps([len(part) for part in parts]).encode()
        return len(header).to_bytes(4, "little") + header + b"".join(parts)

    def apply(delta: bytes) -> bytes:
        start = 4 + int.from_bytes(delta[:4], "little")
        parts = []
        for size in json.loads(delta[4:start]):
            parts.append(delta[start : start + size])
            start += size
        out = bytearray(len(new))
        rest, at = rest_apply(parts[0]), 0
        for begin, stop in gaps:
            out[begin:stop] = rest[at : at + stop - begin]
            at += stop - begin
        for place, (dtype, group) in enumerate(sorted(by_type.items())):
            size = {"8": 1, "16": 2, "32": 4, "64": 8}[dtype.lstrip("fiu")]
            count = sum(span[3] for span in group) // size
            values = fmdelta.decode(before(group), count, dtype, *parts[1 + 2 * place : 3 + 2 * place])
            at = 0
            for _, _, begin, length in group:
                out[begin : begin + length] = values[at : at + length]
                at += length
        return bytes(out)

    return make, apply


TOOLS: dict[str, Callable[[Pair], Coder]] = {
    "zstd -19": zstd,
    "xz -9": xz,
    "zstd -19 --patch-from --long": zstd_patch_from,
    "bsdiff4": bsdiff,
    "hdiffpatch": hdiffpatch,
    "xdelta3": xdelta3,
    "zipnn": zipnn,
    "fm-delta": fm_delta,
}


def _cpu_s() -> float:
    """Return the processor time of this process and of the programs that it ran: other loads do not count."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    """Run one tool on one pair."""
    tool, old_path, new_path, spans_path = sys.argv[1:]
    pair = Pair(Path(old_path).read_bytes(), Path(new_path).read_bytes(), json.loads(Path(spans_path).read_text()))
    try:
        make, apply = TOOLS[tool](pair)
        begun = _cpu_s()
        delta = make()
        made = _cpu_s()
        result = apply(delta)
        applied = _cpu_s()
    except Exception as error:  # each tool has errors of its own
        print(json.dumps({"refused": f"{type(error).__name__}: {str(error)[:200]}"}))
        return
    if result != pair.new:
        print(json.dumps({"refused": "it does not rebuild the file"}))
        return
    print(json.dumps({"bytes": len(delta), "make_s": made - begun, "apply_s": applied - made}))


if __name__ == "__main__":
    main()
