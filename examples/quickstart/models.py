"""The story's models, trained once and kept: the files are named by everything that they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.progress import Progress
from safetensors.numpy import load_file, save_file

from examples.quickstart.datasets import Array, Split, Splits
from examples.quickstart.story import Story


@dataclass(frozen=True, slots=True)
class Models:
    """Where the models of version 1 lie."""

    heavy: Path
    light: Path
    light_checkpoint: Path


def train_first(story: Story, splits: Splits, cache: Path, progress: Progress) -> Models:
    """Train the heavy model and version 1 of the light one, or find them in the cache."""
    folder = cache / f"{story.name}-{_fingerprint(story)}"
    folder.mkdir(parents=True, exist_ok=True)
    models = Models(folder / "heavy.onnx", folder / "light-v1.onnx", folder / "light-v1.safetensors")
    if not models.heavy.exists():
        _whole(models.heavy, lambda out: story.train_heavy(splits, out, progress))
    if not models.light.exists():
        _whole(models.light, lambda out: story.train_light(splits, out, models.light_checkpoint, progress))
    return models


def train_update(story: Story, splits: Splits, models: Models, captured: Path, out: Path, progress: Progress) -> int:
    """Train version 2 of the light model on what the agent captured; return how many answers that were.

    Requests end in another order in every run, so the rows are put in the order of their own bytes first.
    """
    arrays = load_file(captured)
    inputs = {name.removeprefix("input."): a for name, a in arrays.items() if name.startswith("input.")}
    order = _order(inputs)
    story.train_light_update(
        splits,
        models.light_checkpoint,
        {name: array[order] for name, array in inputs.items()},
        arrays["output.logits"][order].astype(np.float32),
        out,
        progress,
    )
    return len(order)


def save_samples(split: Split, path: Path, *, labels: bool) -> None:
    """Write samples as the compiler reads them: one tensor for each input, and "labels"."""
    arrays = {name: np.ascontiguousarray(array) for name, array in split.inputs.items()}
    save_file(arrays | ({"labels": split.labels} if labels else {}), path)


def _order(inputs: Mapping[str, Array]) -> list[int]:
    count = len(next(iter(inputs.values())))
    keys = [b"".join(inputs[name][row].tobytes() for name in sorted(inputs)) for row in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def _whole(out: Path, make: Callable[[Path], None]) -> None:
    """Let `make` write a file that appears under its name only when it is whole."""
    part = out.with_name(f"part-{out.name}")
    make(part)
    part.replace(out)


def _fingerprint(story: Story) -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    relevant = [p for p in sources if p.stem in {story.name, "minilm", "training", "datasets"}]
    digest = hashlib.sha256("".join(version(name) for name in ("torch", "numpy", "onnx")).encode())
    for path in relevant:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
