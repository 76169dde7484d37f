"""The models that are served: a small one of microseconds and a medium one of milliseconds, each with one request."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import save_file

from benchmarks.servers import ServedModel
from benchmarks.zoo import MODELS
from examples.quickstart.meter import MeterStory
from examples.quickstart.models import train_first
from isthmus.terminal import progress

SMALL: Final = "small"
MEDIUM: Final = "medium"
_MEDIUM: Final = "efficientnet-lite0"


def small(folder: Path, *, rows: int = 1) -> ServedModel:
    """Return the smart-meter story's light model, trained on first use (half a minute), with some series."""
    build, story = Path("build").absolute(), MeterStory()
    with progress() as bars:
        splits = story.prepare(build / "data", bars)
        models = train_first(story, splits, build / "models", bars)
    inputs = folder / "small.safetensors"
    save_file({name: np.ascontiguousarray(array[:rows]) for name, array in splits.test.inputs.items()}, inputs)
    return ServedModel(SMALL, models.light.absolute(), inputs)


def medium(folder: Path) -> ServedModel:
    """Return EfficientNet-Lite0 of the zoo with one picture of 602 KB."""
    model, inputs = MODELS[_MEDIUM], folder / "medium.safetensors"
    save_file(model.feed(model.samples(1)), inputs)
    return ServedModel(MEDIUM, model.onnx().absolute(), inputs)
