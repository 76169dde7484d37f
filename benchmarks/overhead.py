"""What `isthmus compile` adds to the tools' own time, and how long it takes again.

`python -m benchmarks.overhead [--quick] [--json FILE]`. One recipe is compiled three times with one build at a time:
from nothing; with nothing changed; with one target more. The tools' own time is that of the same by hand: a short
script for each variant that converts or quantizes, saves, and runs the result once over the data in batches, and one
for each source model that runs it over the data, all on one thread. Everything else is overhead: starting processes,
capture, some samples alone, edge cases, checks, calibration, packaging, digests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.result import Goal, publish
from benchmarks.zoo import MODELS
from isthmus.privacy import forbid_usage_reports

LIGHT: Final = "efficientnet-lite0"
HEAVY: Final = "resnet50"  # the same interface: 224 pixels, 1,000 classes
QUICK: Final = ("mobilenetv3-small", "mobilenetv3-small")
MOST_OVERHEAD: Final = 1.2
MOST_REBUILD_S: Final = 2.0
_SAMPLES: Final = 1000  # as many as a recipe needs to bound a rate of escalation to a few percent
_QUANTIZATION: Final = 96
_BATCH: Final = 64
_BY_ONNXRUNTIME: Final = frozenset({"light", "heavy", "onnxruntime-fp32"})

_RECIPE: Final = """
[model]
name = "overhead"
version = 1

[light]
source = "{light}"

[heavy]
source = "{heavy}"
target = "triton-python"

[data]
calibration = "calibration.safetensors"
quantization = "quantization.safetensors"

[guard]
max_accuracy_drop = 0.2

[calibration]
max_escalation = 0.5

[measure]
enabled = false
"""
VARIANTS: Final = (("openvino", "fp32"), ("openvino", "int8"), ("onnxruntime", "fp32"))
ADDED: Final = ("tvm", "fp32")


def write_recipe(folder: Path, light: Path, heavy: Path, variants: Sequence[tuple[str, str]]) -> Path:
    """Write recipe.toml with these variants."""
    text = _RECIPE.format(light=light.resolve(), heavy=heavy.resolve())
    for target, precision in variants:
        text += f'\n[[variants]]\ntarget = "{target}"\nprecision = "{precision}"\nrequired = false\n'
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _write_data(folder: Path, name: str) -> None:
    import onnxruntime

    model = MODELS[name]
    samples = model.samples(_SAMPLES, 3)
    session = onnxruntime.InferenceSession(str(model.onnx()), providers=["CPUExecutionProvider"])
    best = [int(session.run([model.logits], model.feed(samples, row))[0].argmax()) for row in range(_SAMPLES)]
    save_file(samples | {"labels": np.array(best, np.int64)}, folder / "calibration.safetensors")
    save_file(model.samples(_QUANTIZATION), folder / "quantization.safetensors")


def compile_s(recipe: Path) -> float:
    """Return the seconds of `isthmus compile`.

    Raises:
        SystemExit: It failed.
    """
    command = [sys.executable, "-m", "isthmus", "compile", str(recipe), "--cores", "1", "--jobs", "1", "--json"]
    begun = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode != 0:
        raise SystemExit(f"isthmus compile failed: {done.stderr[-1000:]}")
    return time.perf_counter() - begun


def by_hand_s(job: str, light: Path, heavy: Path, folder: Path) -> float:
    """Return the seconds of one script by hand, its imports included."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--by-hand", job, str(light), str(heavy), str(folder)]
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return time.perf_counter() - begun


def _by_hand(job: str, light: Path, heavy: Path, folder: Path) -> None:
    samples = load_file(folder / "calibration.safetensors")
    samples.pop("labels")
    count = len(next(iter(samples.values())))
    batches = [
        {name: rows[start : start + _BATCH] for name, rows in samples.items()} for start in range(0, count, _BATCH)
    ]
    infer = _onnxruntime(job, light, heavy, folder) if job in _BY_ONNXRUNTIME else _openvino(job, light, folder)
    for batch in batches:
        infer(batch)


def _onnxruntime(job: str, light: Path, heavy: Path, folder: Path) -> Callable[[dict[str, Any]], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if job == "onnxruntime-fp32":
        options.optimized_model_filepath = str(folder / "by-hand.onnx")
    path = heavy if job == "heavy" else light
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, batch)


def _openvino(job: str, light: Path, folder: Path) -> Callable[[dict[str, Any]], Any]:
    forbid_usage_reports()
    import openvino

    graph = openvino.convert_model(light)
    if job == "openvino-int8":
        import nncf

        samples = load_file(folder / "quantization.safetensors")
        rows = [{name: array[row : row + 1] for name, array in samples.items()} for row in range(_QUANTIZATION)]
        graph = nncf.quantize(graph, nncf.Dataset(rows), subset_size=_QUANTIZATION)
    openvino.save_model(graph, folder / f"by-hand-{job}.xml", compress_to_fp16=False)
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    request = openvino.compile_model(graph, "CPU", hints).create_infer_request()
    return lambda batch: request.infer(batch)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile three times and print what it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--by-hand", nargs=4, metavar=("JOB", "LIGHT", "HEAVY", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.by_hand:
        job, *paths = chosen.by_hand
        _by_hand(job, *map(Path, paths))
        return 0
    light, heavy = QUICK if chosen.quick else (LIGHT, HEAVY)
    sources = MODELS[light].onnx(), MODELS[heavy].onnx()
    with tempfile.TemporaryDirectory(prefix="overhead-") as scratch:
        folder = Path(scratch)
        _write_data(folder, light)
        recipe = write_recipe(folder, *sources, VARIANTS)
        first = compile_s(recipe)
        again = compile_s(recipe)
        write_recipe(folder, *sources, (*VARIANTS, ADDED))
        changed = compile_s(recipe)
        jobs = ("light", "heavy", *("-".join(variant) for variant in VARIANTS))
        scripts = {job: by_hand_s(job, *sources, folder) for job in jobs}
    rows = [{"what": f"by hand: {job}", "s": seconds} for job, seconds in scripts.items()]
    rows += [
        {"what": "by hand, all", "s": sum(scripts.values())},
        {"what": "isthmus compile, from nothing", "s": first},
        {"what": "isthmus compile, nothing changed", "s": again},
        {"what": f"isthmus compile, one target more ({'-'.join(ADDED)})", "s": changed},
    ]
    goals = [
        Goal("isthmus compile / by hand", first / sum(scripts.values()), MOST_OVERHEAD),
        Goal("nothing changed, s", again, MOST_REBUILD_S),
    ]
    publish("overhead", rows, goals, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
