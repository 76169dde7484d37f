"""One tool on one pair, in the environment of the tools: `python worker.py TOOL OLD NEW SPANS`.

It prints a line of JSON: the delta's bytes, and the seconds to make and to apply it. What was applied is compared with
the new file. SPANS is a JSON file: the aligned tensors as [type, offset in old, offset in new, bytes], for those tools
that know of tensors.
"""

from __future__ import annotations

import json
import lzma
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_LEVEL = 19


class Refused(Exception):
    """The tool cannot take the pair."""


def _zstd(old: bytes | None, new: bytes):
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


def zstd(old, new, _):
    return _zstd(None, new)


def zstd_patch_from(old, new, _):
    return _zstd(old, new)


def xz(old, new, _):
    return lambda: lzma.compress(new, preset=9), lzma.decompress


def bsdiff(old, new, _):
    import bsdiff4

    return lambda: bsdiff4.diff(old, new), lambda delta: bsdiff4.patch(old, delta)


def hdiffpatch(old, new, _):
    import hdiffpatch

    return (
        lambda: hdiffpatch.diff(old, new, compression=hdiffpatch.COMPRESSION_ZSTD),
        lambda delta: hdiffpatch.apply(old, delta),
    )


def xdelta3(old, new, _):
    if shutil.which("xdelta3") is None:
        raise Refused("not installed: apt-get install xdelta3")
    folder = Path(tempfile.mkdtemp())
    paths = {name: folder / name for name in ("old", "new", "delta", "out")}
    paths["old"].write_bytes(old)
    paths["new"].write_bytes(new)
    window = str(max(len(old), 1 << 20))

    def run(*arguments: str) -> None:
        subprocess.run(["xdelta3", "-f", "-B", window, "-s", str(paths["old"]), *arguments], check=True)

    def make() -> bytes:
        run("-e", "-9", "-S", "lzma", str(paths["new"]), str(paths["delta"]))
        return paths["delta"].read_bytes()

    def apply(_: bytes) -> bytes:
        run("-d", str(paths["delta"]), str(paths["out"]))
        return paths["out"].read_bytes()

    return make, apply


def zipnn(old, new, spans):
    from zipnn import ZipNN

    if len(old) != len(new):
        raise Refused("its delta mode takes files of equal length only")
    types = {span[0] for span in spans if span[3] > 4096}
    dtype = "float16" if "f16" in types else "float32"
    coder = ZipNN(delta_compressed_type="byte", bytearray_dtype=dtype, input_format="byte", threads=1)
    return (
        lambda: bytes(coder.compress(bytearray(new), delta_second_data=bytearray(old))),
        lambda delta: bytes(coder.decompress(bytearray(delta), delta_second_data=bytearray(old))),
    )


def fm_delta(old, new, spans):
    import fmdelta

    spans = sorted(spans, key=lambda span: span[2])
    by_type: dict[str, list] = {}
    for span in spans:
        by_type.setdefault(span[0], []).append(span)
    gaps, at = [], 0
    for _, _, start, size in spans:
        gaps.append((at, start))
        at = start + size
    gaps.append((at, len(new)))

    def pieces(data: bytes, group: list, side: int) -> bytes:
        return b"".join(data[span[side] : span[side] + span[3]] for span in group)

    rest_make, rest_apply = _zstd(old, b"".join(new[start:stop] for start, stop in gaps))

    def make() -> bytes:
        parts = [rest_make()]
        for dtype, group in sorted(by_type.items()):
            parts += fmdelta.encode(pieces(old, group, 1), pieces(new, group, 2), dtype)
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
            data = fmdelta.decode(pieces(old, group, 1), count, dtype, *parts[1 + 2 * place : 3 + 2 * place])
            at = 0
            for _, _, begin, length in group:
                out[begin : begin + length] = data[at : at + length]
                at += length
        return bytes(out)

    return make, apply


TOOLS = {
    "zstd -19": zstd,
    "xz -9": xz,
    "zstd -19 --patch-from --long": zstd_patch_from,
    "bsdiff4": bsdiff,
    "hdiffpatch": hdiffpatch,
    "xdelta3": xdelta3,
    "zipnn": zipnn,
    "fm-delta": fm_delta,
}


def main() -> None:
    tool, old_path, new_path, spans_path = sys.argv[1:]
    old, new = Path(old_path).read_bytes(), Path(new_path).read_bytes()
    try:
        make, apply = TOOLS[tool](old, new, json.loads(Path(spans_path).read_text()))
        begun = time.perf_counter()
        delta = make()
        made = time.perf_counter()
        result = apply(delta)
        applied = time.perf_counter()
    except Exception as error:  # each tool has errors of its own
        print(json.dumps({"refused": f"{type(error).__name__}: {str(error)[:200]}"}))
        return
    if result != new:
        print(json.dumps({"refused": "it does not rebuild the file"}))
        return
    print(json.dumps({"bytes": len(delta), "make_s": made - begun, "apply_s": applied - made}))


if __name__ == "__main__":
    main()
