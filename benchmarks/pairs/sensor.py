"""ElectricDevices: the meter story's two networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.progress import Progress

from benchmarks.pairs import Made, rows
from benchmarks.pairs.text import joined
from examples.quickstart.meter import MeterStory
from examples.quickstart.models import train_first


def make(build: Path, folder: Path, progress: Progress) -> Made:
    """Train both models on 3,000 series; the other parts come from the 7,711 of the test households."""
    del folder
    story = MeterStory()
    splits = story.prepare(build / "data", progress)
    models = train_first(story, splits, build / "models", progress)
    later = joined(splits.calibration, splits.test)
    order = np.random.default_rng(0).permutation(len(later))
    parts = {
        "quantization": splits.quantization,
        "deferral": rows(later, order, 0, 3500),
        "calibration": rows(later, order, 3500, 4500),
        "test": rows(later, order, 4500, len(later)),
    }
    return Made(models.light, models.heavy, parts)
