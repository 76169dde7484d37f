"""`isthmus.delta` on one pair, making and applying each in a process of its own: `python -m benchmarks.delta.ours`.

The peak of memory is that of the process that applies, less what it had before it read a byte of the pair.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.delta import DeltaPair
from isthmus.delta import apply_delta, make_delta
from isthmus.digests import sha256_file


def measure(pair: DeltaPair, repeats: int) -> dict[str, Any]:
    """Return bytes, make_s and apply_s (the median) in seconds of one core, and peak_mib."""
    with tempfile.TemporaryDirectory() as folder:
        delta, out = Path(folder) / "delta", Path(folder) / "out"
        made = _step("make", pair, delta, out, 1)
        applied = _step("apply", pair, delta, out, repeats)
        return {"bytes": delta.stat().st_size, **made, **applied}


def _step(what: str, pair: DeltaPair, delta: Path, out: Path, repeats: int) -> dict[str, Any]:
    paths = [str(path) for path in (pair.old, pair.new, delta, out)]
    command = [sys.executable, "-m", "benchmarks.delta.ours", what, str(repeats), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _memory_mib(what: str) -> float:
    """Return VmRSS, what is resident now, or VmHWM, its peak since the last reset."""
    status = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in status if line.startswith(f"{what}:"))) / 1024


def main(what: str, repeats: int, old: Path, new: Path, delta: Path, out: Path) -> dict[str, Any]:
    """Do one step and return its figures."""
    if what == "make":
        begun = time.process_time()
        make_delta(old, new, delta)
        return {"make_s": time.process_time() - begun}
    digest, length = sha256_file(new), new.stat().st_size
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which counts what importing took
    before, times = _memory_mib("VmRSS"), []
    for _ in range(repeats):
        begun = time.process_time()
        apply_delta(old, delta, out, sha256=digest, length=length)
        times.append(time.process_time() - begun)
    return {"apply_s": median(times), "peak_mib": _memory_mib("VmHWM") - before}


if __name__ == "__main__":
    step, count, *files = sys.argv[1:]
    print(json.dumps(main(step, int(count), *(Path(file) for file in files))))
