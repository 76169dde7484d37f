"""Swaps of the light model under load: no request fails, the slowest hardly wait longer, and no memory is left behind.

`python -m benchmarks.swap [--quick] [--json FILE]`. Eight clients ask an agent's listener without pause. Slices of the
load in which a version is brought, tested and swapped take turns with slices in which nothing happens; then 50 swaps
follow each other. Both runtimes serve the same EfficientNet-Lite0. The ratio is that of the p99 of all slices with a
swap to that of all slices without one: a slice alone has some 300 requests, so its own p99 is that of its three slowest
(the median and range of the slices' ratios are in the table, too). Growth is that of the resident memory from after the
fifth swap to the end.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Final

from isthmus import tls13

tls13.enforce()  # before anything imports grpc

import openvino  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from benchmarks.result import Goal, publish  # noqa: E402
from benchmarks.servers import Child, ServedModel, ServerError, child, workload  # noqa: E402
from benchmarks.servers.bundle import VARIANT, write_bundle  # noqa: E402
from benchmarks.servers.load import percentile  # noqa: E402
from benchmarks.soak import CLIENTS, resident_kib  # noqa: E402
from isthmus.bundle import (  # noqa: E402
    CALIBRATION,
    GOLDEN,
    MANIFEST,
    index_files,
    parse_calibration,
    parse_manifest,
)
from isthmus.terminal import note  # noqa: E402

OPENVINO: Final = "openvino-fp32"
VARIANTS: Final = (VARIANT, OPENVINO)
MOST_SLOWER: Final = 1.5
MOST_GROWTH: Final = 0.1
_WARM: Final = 5  # swaps


def add_openvino(bundle: Path, onnx: Path) -> None:
    """Add the same model in OpenVINO's form to a bundle, with the golden answers of the other variant."""
    folder = bundle / "variants" / OPENVINO
    folder.mkdir(parents=True)
    openvino.save_model(openvino.convert_model(onnx), folder / "model.xml", compress_to_fp16=False)
    golden = load_file(bundle / GOLDEN)
    mine = {name.replace(VARIANT, OPENVINO): array for name, array in golden.items() if VARIANT in name}
    save_file(golden | mine, bundle / GOLDEN)
    record = parse_calibration((bundle / CALIBRATION).read_bytes())
    points = dict(record.variants) | {OPENVINO: record.variants[VARIANT]}
    (bundle / CALIBRATION).write_bytes(record.model_copy(update={"variants": points}).to_json())
    manifest = parse_manifest((bundle / MANIFEST).read_bytes())
    first = manifest.variants[0]
    changes = {"id": OPENVINO, "runtime": "openvino", "entry": f"variants/{OPENVINO}/model.xml"}
    variants = (first, first.model_copy(update=changes | {"tolerance": 1e-2}))
    (bundle / MANIFEST).unlink()
    whole = manifest.model_copy(update={"variants": variants, "files": index_files(bundle)})
    (bundle / MANIFEST).write_bytes(whole.to_json())


class Swapped:
    """One runtime's agent under load.

    Args:
        server: A child of benchmarks.servers.swapping.
        load: A child of benchmarks.servers.load.
        model: What is asked for.
        address: Where.
    """

    def __init__(self, server: Child, load: Child, model: ServedModel, address: str) -> None:
        self._server = server
        self._load = load
        self._job = {"address": address, "model": model.name, "inputs": str(model.inputs), "clients": CLIENTS}
        self._version = 1
        self.swaps_ms: list[float] = []
        self.failures: list[str] = []

    def ask(self, seconds: float) -> list[float]:
        """Return the milliseconds of every request of a slice of the load."""
        done = self._load.ask(self._job | {"seconds": seconds})
        self.failures += done["failures"]
        times: list[float] = done["ms"]
        return times

    def ask_and_swap(self, seconds: float, pool: ThreadPoolExecutor) -> list[float]:
        """Do the same while a version is brought."""
        asking = pool.submit(self.ask, seconds)
        self.swap()
        return asking.result()

    def swap(self) -> None:
        """Bring the next version to serve."""
        self._version += 1
        told = self._server.ask({"version": self._version})
        if told["became"] != "active":
            raise ServerError(f"version {self._version} is {told['became']}: {told['detail']}")
        self.swaps_ms.append(told["ms"])

    @property
    def resident_kib(self) -> int:
        """Return the memory of the agent."""
        return resident_kib(self._server.process.pid)


def measure(swapped: Swapped, *, rounds: int, slice_s: float, swaps: int) -> tuple[dict[str, Any], list[Goal]]:
    """Return the row of one runtime, and its goals."""
    swapped.ask(slice_s)
    ratios, before, during = [], [], []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(rounds):
            quiet, busy = swapped.ask(slice_s), swapped.ask_and_swap(slice_s, pool)
            ratios.append(percentile(busy, 99) / percentile(quiet, 99))
            before += quiet
            during += busy
        under_load = median(swapped.swaps_ms)
        for _ in range(_WARM):
            swapped.swap()
        swapped.ask(slice_s)
        first = swapped.resident_kib
        asking = pool.submit(swapped.ask, slice_s)
        for _ in range(swaps):
            swapped.swap()
        asking.result()
    swapped.ask(slice_s)
    last = swapped.resident_kib
    ratio = percentile(during, 99) / percentile(before, 99)
    row = {
        "requests": len(before) + len(during),
        "failed": len(swapped.failures),
        "p50 ms": percentile(before, 50),
        "p99 ms": percentile(before, 99),
        "p50 ms, swap": percentile(during, 50),
        "p99 ms, swap": percentile(during, 99),
        "p99 ratio": round(ratio, 2),
        "of slices": f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        "update ms": round(under_load, 1),
        "RSS MiB": round(first / 1024, 1),
        f"after {swaps} swaps": round(last / 1024, 1),
    }
    goals = [
        Goal("failed requests", len(swapped.failures), 0),
        Goal("p99 during swaps / p99 between them", round(ratio, 3), MOST_SLOWER),
        Goal(f"growth of resident memory over {swaps} swaps", round(last / first - 1, 4), MOST_GROWTH),
    ]
    return row, goals


def main(arguments: Sequence[str] | None = None) -> int:
    """Start, load, swap, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swap", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    rounds, slice_s, swaps = (3, 2.0, 10) if chosen.quick else (12, 4.0, 50)
    rows, goals = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = workload.medium(folder)
        bundle = folder / "bundle"
        write_bundle(bundle, model)
        add_openvino(bundle, model.onnx)
        for variant in VARIANTS:
            note(f"{variant}: {rounds} rounds of {2 * slice_s:g} s, then {swaps} swaps")
            arguments_: list[str | Path] = ["-m", "benchmarks.servers.swapping", bundle, variant, folder / variant]
            with (
                child(f"agent-{variant}", arguments_, folder) as server,
                child("load", ["-m", "benchmarks.servers.load"], folder) as load,
            ):
                swapped = Swapped(server, load, model, server.read()["address"])
                row, reached = measure(swapped, rounds=rounds, slice_s=slice_s, swaps=swaps)
            rows.append({"runtime": variant, **row})
            goals += [Goal(f"{variant}: {goal.goal}", goal.value, goal.limit) for goal in reached]
    publish("swap", rows, goals, chosen.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
