"""20 Newsgroups: the news story's encoder and the slice of it that is the light model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.progress import Progress

from benchmarks.pairs import Made, rows
from examples.quickstart.datasets import Split
from examples.quickstart.models import train_first
from examples.quickstart.news import NewsStory


def make(build: Path, folder: Path, progress: Progress) -> Made:
    """Train both models on 4,000 posts; the other parts come from the 7,528 later ones."""
    del folder
    story = NewsStory()
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


def joined(first: Split, second: Split) -> Split:
    """Return the rows of both."""
    inputs = {name: np.concatenate([array, second.inputs[name]]) for name, array in first.inputs.items()}
    return Split(inputs, np.concatenate([first.labels, second.labels]))
