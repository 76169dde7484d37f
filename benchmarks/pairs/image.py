"""ELPV: photographs of solar cells, defective or not, split by module (neighbouring cells), never within one.

Data: C. Buerhop-Lutz et al., A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence
Imagery, EU PVSEC 2018, as packaged in elpv-dataset 1.0.0.post1; CC BY-NC-SA 4.0: measured with, never shipped.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.pairs import Made
from examples.quickstart.datasets import Package, Split, fetch
from examples.quickstart.training import Examples, Schedule, export_onnx, fit, fix_seed, gold_targets, to_tensors

CELLS: Final = Package(
    "elpv-dataset==1.0.0.post1",
    "elpv_dataset-1.0.0.post1-py3-none-any.whl",
    "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
)
SIDE: Final = 96  # pixels, of 300
LIGHT_SIDE: Final = 32
MODULES: Final = 44  # blocks of neighbouring cells
HEAVY: Final = Schedule(epochs=24, batch=32, body_rate=3e-3, head_rate=3e-3, smoothing=0.05)
LIGHT: Final = Schedule(epochs=24, batch=32, body_rate=5e-3, head_rate=5e-3, smoothing=0.05)
SHARES: Final = {"train": 0.5, "deferral": 0.2, "calibration": 0.1, "test": 0.2}


class CellClassifier(nn.Module):
    """Convolutions, the mean over the picture, and a linear head; the light one looks at a smaller picture."""

    def __init__(self, channels: tuple[int, ...], side: int) -> None:
        """Build a model with fresh weights."""
        super().__init__()
        parts: list[nn.Module] = []
        before = 1
        for width in channels:
            parts += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.side = side
        self.body = nn.Sequential(*parts)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(before, 2)

    def forward(self, cell: Tensor) -> Tensor:
        """Classify FP32 ``[batch, 1, 96, 96]``."""
        seen = functional.avg_pool2d(cell, SIDE // self.side) if self.side != SIDE else cell
        logits: Tensor = self.head(self.dropout(self.body(seen).mean(dim=(2, 3))))
        return logits


def make(build: Path, folder: Path, progress: Progress) -> Made:
    """Train both models on half of the modules."""
    parts = _parts(read_cells(fetch(CELLS, build / "data", progress), progress))
    train = parts.pop("train")
    flipped = np.concatenate([train.inputs["cell"][:, :, ::a, ::b] for a in (1, -1) for b in (1, -1)])
    examples = Examples(to_tensors({"cell": np.ascontiguousarray(flipped)}), gold_targets(np.tile(train.labels, 4), 2))
    for name, channels, side, schedule in (
        ("heavy", (24, 48, 96, 128), SIDE, HEAVY),
        ("trained-light", (8, 12), LIGHT_SIDE, LIGHT),
    ):
        fix_seed(0)
        model = CellClassifier(channels, side)
        fit(model, examples, schedule, progress, f"training the {name} model")
        export_onnx(model, train.inputs, folder / f"{name}.onnx")
    quantization = train.take(np.arange(0, len(train), max(1, len(train) // 300)))
    return Made(folder / "trained-light.onnx", folder / "heavy.onnx", parts | {"quantization": quantization})


def read_cells(archive: Path, progress: Progress) -> Split:
    """Return all cells as FP32 [1, 96, 96] between -1 and 1, labelled 1 where a defect is more likely than not."""
    with zipfile.ZipFile(archive) as opened:
        table = opened.read("elpv_dataset/data/labels.csv").decode().split("\n")
        lines = [line.split() for line in table if line.strip()]
        task = progress.add_task("reading cells", total=len(lines))
        cells = np.zeros((len(lines), 1, SIDE, SIDE), np.float32)
        for row, (name, *_) in enumerate(lines):
            picture = Image.open(io.BytesIO(opened.read(f"elpv_dataset/data/{name}"))).convert("L")
            cells[row, 0] = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 127.5 - 1.0
            progress.update(task, advance=1)
    return Split({"cell": cells}, np.array([float(line[1]) >= 0.5 for line in lines], dtype=np.int64))


def _parts(cells: Split) -> dict[str, Split]:
    blocks = np.array_split(np.arange(len(cells)), MODULES)
    order = np.random.default_rng(0).permutation(MODULES)
    parts, begin = {}, 0
    for name, share in SHARES.items():
        end = MODULES if name == "test" else begin + round(share * MODULES)
        chosen = np.random.default_rng(1).permutation(np.concatenate([blocks[block] for block in order[begin:end]]))
        parts[name] = cells.take(chosen)
        begin = end
    return parts
