"""What `isthmus compile` adds to the tools' own time, and how long it takes again.

`python -m benchmarks.overhead [--quick] [--json FILE]`. One recipe is compiled three times with one build at a time:
from nothing; with nothing changed; with one target more. The tools' own time is what the builds themselves took
(conversion, quantization, code generation, measured around the tools' calls) and what running the models over the
data took. Everything else is overhead: starting processes, capture, checks, calibration, packaging, digests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file

from benchmarks.result import Goal, publish
from benchmarks.zoo import MODELS

LIGHT: Final = "efficientnet-lite0"
HEAVY: Final = "resnet50"  # the same interface: 224 pixels, 1,000 classes
QUICK: Final = ("mobilenetv3-small", "mobilenetv3-small")
MOST_OVERHEAD: Final = 1.2
MOST_REBUILD_S: Final = 2.0
_SAMPLES: Final = 256
_QUANTIZATION: Final = 96

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


def tools_s(cache: Path) -> tuple[float, float]:
    """Return the seconds of all builds and of all runs over the data, as the results in the cache say."""
    build = prove = 0.0
    for path in cache.rglob("result.json"):
        result: dict[str, Any] = json.loads(path.read_text())
        build += result.get("build_s", 0.0)
        prove += result.get("prove_s", 0.0)
    return build, prove


def _write_data(folder: Path, name: str) -> None:
    import onnxruntime

    model = MODELS[name]
    samples = model.samples(_SAMPLES, 3)
    session = onnxruntime.InferenceSession(str(model.onnx()), providers=["CPUExecutionProvider"])
    best = [int(session.run([model.logits], model.feed(samples, row))[0].argmax()) for row in range(_SAMPLES)]
    save_file(samples | {"labels": np.array(best, np.int64)}, folder / "calibration.safetensors")
    save_file(model.samples(_QUANTIZATION), folder / "quantization.safetensors")


def _compile(recipe: Path) -> float:
    command = [sys.executable, "-m", "isthmus.cli", "compile", str(recipe), "--cores", "1", "--jobs", "1", "--json"]
    begun = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode != 0:
        raise SystemExit(f"isthmus compile failed: {done.stderr[-1000:]}")
    return time.perf_counter() - begun


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile three times and print what it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    light, heavy = QUICK if chosen.quick else (LIGHT, HEAVY)
    sources = MODELS[light].onnx(), MODELS[heavy].onnx()
    with tempfile.TemporaryDirectory(prefix="overhead-") as scratch:
        folder = Path(scratch)
        _write_data(folder, light)
        recipe = write_recipe(folder, *sources, VARIANTS)
        first = _compile(recipe)
        build, prove = tools_s(folder / ".compile-cache")
        again = _compile(recipe)
        write_recipe(folder, *sources, (*VARIANTS, ADDED))
        changed = _compile(recipe)
        more_build, more_prove = (
            a - b for a, b in zip(tools_s(folder / ".compile-cache"), (build, prove), strict=True)
        )
    rows = [
        {"compilation": "from nothing", "s": first, "tools: builds s": build, "tools: runs s": prove},
        {"compilation": "nothing changed", "s": again, "tools: builds s": 0.0, "tools: runs s": 0.0},
        {"compilation": f"one target more ({'-'.join(ADDED)})", "s": changed, "tools: builds s": more_build,
         "tools: runs s": more_prove},
    ]  # fmt: skip
    goals = [
        Goal("isthmus compile / the tools' own time", first / (build + prove), MOST_OVERHEAD),
        Goal("nothing changed, s", again, MOST_REBUILD_S),
    ]
    publish("overhead", rows, goals, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
