"""A story small enough for a test: points in 16 dimensions, four classes, models that train in seconds.

The light model sees the first four coordinates only, so some points are hard for it and easy for the heavy one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.progress import Progress
from torch import Tensor, nn

from examples.quickstart.datasets import Array, Split, Splits, divide
from examples.quickstart.training import (
    Examples,
    Schedule,
    export_onnx,
    fit,
    fix_seed,
    gold_targets,
    join,
    load_checkpoint,
    save_checkpoint,
    soft_targets,
    to_tensors,
)

CLASSES = 4
SEEN = 4  # coordinates that the light model uses
SCHEDULE = Schedule(epochs=6, batch=64, body_rate=5e-3, head_rate=5e-3)


class Classifier(nn.Module):
    """Two layers over the first `seen` coordinates."""

    def __init__(self, seen: int, width: int) -> None:
        super().__init__()
        self.seen = seen
        self.body = nn.Sequential(nn.Linear(seen, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, point: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(point[:, : self.seen]))
        return logits


class TinyStory:
    """See `examples.quickstart.story.Story`."""

    name = "tiny"
    model_name = "tiny"
    title = "Points in space"
    licence = "Drawn by a random generator."
    labels = tuple(f"class {number}" for number in range(CLASSES))
    max_escalation = 0.3
    max_accuracy_drop = 0.02

    def prepare(self, cache: Path, progress: Progress) -> Splits:
        del cache, progress
        rng = np.random.default_rng(7)
        centres = rng.normal(size=(CLASSES, 16)) * 0.9
        return divide(draw(rng, centres, 5000), draw(rng, centres, 1600), labelled=1500, quantization=100)

    def train_heavy(self, splits: Splits, out: Path, progress: Progress) -> None:
        fix_seed(0)
        model = Classifier(16, 64)
        fit(model, examples(splits.labelled), SCHEDULE, progress, "heavy")
        export_onnx(model, splits.labelled.inputs, out)

    def train_light(self, splits: Splits, out: Path, checkpoint: Path, progress: Progress) -> None:
        fix_seed(1)
        model = Classifier(SEEN, 64)
        fit(model, examples(splits.labelled), SCHEDULE, progress, "light")
        save_checkpoint(model, checkpoint)
        export_onnx(model, splits.labelled.inputs, out)

    def train_light_update(
        self,
        splits: Splits,
        checkpoint: Path,
        captured_inputs: Mapping[str, Array],
        captured_logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
        out: Path,
        progress: Progress,
    ) -> None:
        model = Classifier(SEEN, 64)
        load_checkpoint(model, checkpoint)
        captured = Examples(to_tensors(captured_inputs), soft_targets(captured_logits, CLASSES))
        schedule = Schedule(epochs=1, batch=64, body_rate=3e-5, head_rate=3e-5)
        fit(model, join(examples(splits.labelled), captured), schedule, progress, "update")
        export_onnx(model, splits.labelled.inputs, out)


def draw(rng: np.random.Generator, centres: Array, count: int) -> Split:
    labels = rng.integers(0, CLASSES, count)
    points = np.asarray(centres)[labels] + rng.normal(size=(count, 16))
    return Split({"point": points.astype(np.float32)}, labels.astype(np.int64))


def examples(split: Split) -> Examples:
    return Examples(to_tensors(split.inputs), gold_targets(split.labels, CLASSES))
