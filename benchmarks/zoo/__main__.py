"""`python -m benchmarks.zoo`: list the models, or make their ONNX files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.zoo import FOLDER, MODELS
from examples.quickstart.datasets import DatasetError
from isthmus.terminal import show_table


def main(arguments: Sequence[str] | None = None) -> int:
    """List, or make what is asked for; one that cannot be made does not keep the others from being made."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*MODELS, []], metavar="NAME")
    parser.add_argument("--all", action="store_true", help="make every model")
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder of the ONNX files (%(default)s)")
    chosen = parser.parse_args(arguments)
    names = list(MODELS) if chosen.all else chosen.names
    if not names:
        show_table("zoo", [{"model": m.name, "task": m.task, "weights": m.source} for m in MODELS.values()])
        return 0
    failed: list[str] = []
    for name in names:
        try:
            path = MODELS[name].onnx(chosen.to)
        except DatasetError as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
        else:
            print(f"{path}  {path.stat().st_size:,} bytes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
