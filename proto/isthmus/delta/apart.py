"""Applies a delta in a process of its own: with low priority and little memory, whatever the delta says.

The caller's event loop keeps its interpreter lock, and a delta that finds a weakness of the decoder ends a process that
holds nothing. The process ends with its parent: its standard input closes then.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import threading
from pathlib import Path
from typing import Final

from isthmus.delta.codec import apply_delta, part_of
from isthmus.delta.container import Method, read_header
from isthmus.errors import DeltaError, DigestMismatchError, IsthmusError

ALLOWANCE: Final = 144 << 20  # bytes over what Python and the libraries map: the bound of format 2, and a margin
_NICE: Final = 10
_ERRORS: Final = {kind.__name__: kind for kind in (DeltaError, DigestMismatchError)}


async def apply_apart(old: Path, delta: Path, out: Path, *, sha256: str, length: int) -> None:
    """Do what `apply_delta` does, in a process of its own; cancelling kills it and leaves nothing.

    Raises:
        DeltaError: As `apply_delta`; also when the process died or needed too much memory.
        DigestMismatchError: As `apply_delta`.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "isthmus.delta.apart", str(old), str(delta), str(out), sha256, str(length),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None  # noqa: S101 - asked for above
        said = await process.stdout.read()
        code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        if process.returncode:
            part_of(out).unlink(missing_ok=True)
    if code:
        raise _error(said, code, delta)


def _error(said: bytes, code: int, delta: Path) -> IsthmusError:
    try:
        kind, message, reason = json.loads(said)
        return _ERRORS[kind](message, reason=reason)
    except (ValueError, KeyError, TypeError):
        return DeltaError(f"{delta.name}: the process that applied it ended with code {code}")


def main(arguments: list[str]) -> int:
    """Apply the delta that the arguments name; say on standard output why not."""
    old, delta, out = map(Path, arguments[:3])
    os.nice(_NICE)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _limit_memory(delta)
        apply_delta(old, delta, out, sha256=arguments[3], length=int(arguments[4]))
    except MemoryError:
        _say("DeltaError", f"{delta.name}: applying it would need too much memory", "bad-delta")
    except (DeltaError, DigestMismatchError) as error:
        _say(type(error).__name__, str(error), error.reason)
    except OSError as error:
        _say("DeltaError", f"{delta.name}: not applied ({error.strerror})", "bad-delta")
    else:
        return 0
    return 1


def _say(kind: str, message: str, reason: str) -> None:
    sys.stdout.write(json.dumps([kind, message, reason]))


def _end_with_parent() -> None:
    # not through sys.stdin: a daemon thread that waits in it aborts the interpreter at its end
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _limit_memory(delta: Path) -> None:
    with delta.open("rb") as file:
        header = read_header(file)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ALLOWANCE
    if header.method is Method.PATCH:
        limit += 3 * header.base_length + header.target_length  # a dictionary as a whole, its index, and the window
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
