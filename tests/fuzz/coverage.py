"""Fuzz one target by coverage until libFuzzer ends the process: `python -m tests.fuzz.coverage TARGET CORPUS FLAGS`."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

from isthmus import tls13

tls13.enforce()
with atheris.instrument_imports(include=["isthmus", "edge", "cloud", "security", "tests.fuzz", "jwt"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Begin with the target's seeds."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    target = TARGETS[name]
    for number, seed in enumerate(target.seeds()):
        (folder / f"seed-{number}").write_bytes(seed)

    def run(data: bytes) -> None:
        target.check(data)

    atheris.Setup([sys.argv[0], *sys.argv[3:], str(folder)], run)
    atheris.Fuzz()


main()
