"""Pairs of a light and a heavy model on real data, with labelled rows for every stage of calibration.

Each pair is made once and kept in build/pairs. The light model also gives its penultimate features. Rows are dealt out
so that what is calibrated is what is tested: the deferral score and the threshold see other rows than the test, from
the same population (`text`: the later posts of the data set; `sensor`: its test households; `image`: other modules).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from rich.progress import Progress

from examples.quickstart.datasets import Array, Split
from examples.quickstart.models import save_samples

FEATURES: Final = "features"
_MAKERS: Final = {
    "text": "benchmarks.pairs.text:make",
    "sensor": "benchmarks.pairs.sensor:make",
    "image": "benchmarks.pairs.image:make",
}
NAMES: Final = tuple(_MAKERS)
PARTS: Final = ("quantization", "deferral", "calibration", "test")


@dataclass(frozen=True, slots=True)
class Pair:
    """Where a pair lies: light.onnx, heavy.onnx and a safetensors file for each part."""

    name: str
    folder: Path

    @property
    def light(self) -> Path:
        """Return the light model, with logits and features."""
        return self.folder / "light.onnx"

    @property
    def heavy(self) -> Path:
        """Return the heavy model."""
        return self.folder / "heavy.onnx"

    def part(self, name: str) -> Path:
        """Return a part's labelled rows."""
        return self.folder / f"{name}.safetensors"


@dataclass(frozen=True, slots=True)
class Made:
    """What a maker returns."""

    light: Path
    heavy: Path
    parts: dict[str, Split]


def pair(name: str, build: Path, progress: Progress) -> Pair:
    """Return a pair, made on first use (minutes)."""
    found = Pair(name, build / "pairs" / name)
    if found.part("test").is_file():
        return found
    module, _, attribute = _MAKERS[name].partition(":")
    make: Callable[[Path, Path, Progress], Made] = getattr(importlib.import_module(module), attribute)
    found.folder.mkdir(parents=True, exist_ok=True)
    made = make(build, found.folder, progress)
    expose_features(made.light, found.light)
    if made.heavy != found.heavy:
        found.heavy.write_bytes(made.heavy.read_bytes())
    for part in PARTS:  # the test last: it says that all are there
        save_samples(made.parts[part], found.part(part), labels=True)
    return found


def expose_features(source: Path, out: Path) -> None:
    """Write the model again with a further output: what goes into the layer that makes the logits."""
    model = onnx.load(str(source))
    last = next(node for node in model.graph.node if "logits" in node.output)
    assert last.op_type == "Gemm", last.op_type  # noqa: S101 - all of these models end in a linear layer
    weight = next(array for array in model.graph.initializer if array.name == last.input[1])
    width = weight.dims[1] if any(a.name == "transB" and a.i for a in last.attribute) else weight.dims[0]
    batch = model.graph.output[0].type.tensor_type.shape.dim[0].dim_param
    model.graph.node.append(onnx.helper.make_node("Identity", [last.input[0]], [FEATURES]))
    model.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, [batch, width]))
    onnx.save(model, str(out))


def rows(split: Split, order: Array, start: int, stop: int) -> Split:
    """Return part of a split in an order."""
    return split.take(np.asarray(order[start:stop], dtype=np.intp))
