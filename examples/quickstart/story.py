"""What a story is: one data set, a heavy and a light model for it, and how the light one learns from traffic.

A story only makes models and samples. Compiling, publishing, serving and updating them is the work of the
programs that it shows. Stories are named in one table of lazy import strings, so listing them imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Final, Protocol, cast

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from examples.quickstart.datasets import Array, Splits

STORIES: Final[Mapping[str, str]] = {
    "news": "examples.quickstart.news:NewsStory",
    "meter": "examples.quickstart.meter:MeterStory",
}


class UnknownStoryError(Exception):
    """There is no story of that name."""


class Story(Protocol):
    """One data set with its pair of models.

    Call :meth:`prepare` first. All models take the inputs of a :class:`~examples.quickstart.datasets.Split`
    with a symbolic batch axis and answer ``logits``, FP32 ``[batch, classes]``. Both versions of the light model
    are one graph with different weights, so that version 2 can be quantized on the grid of version 1.
    """

    @property
    def name(self) -> str:
        """The key in :data:`STORIES`."""
        ...

    @property
    def model_name(self) -> str:
        """The name under which clients ask for the model."""
        ...

    @property
    def title(self) -> str:
        """One line for people."""
        ...

    @property
    def licence(self) -> str:
        """Source, licence and citation of data and weights."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the order of the logits."""
        ...

    @property
    def max_escalation(self) -> float:
        """The largest share of requests that may go to the heavy model."""
        ...

    @property
    def max_accuracy_drop(self) -> float:
        """How much accuracy an INT8 variant may lose against its source before the compiler refuses it."""
        ...

    def prepare(self, cache: Path, progress: Progress) -> Splits:
        """Fetch, parse and divide the data; a second call reads the cache."""
        ...

    def train_heavy(self, splits: Splits, out: Path, progress: Progress) -> None:
        """Train the heavy model on the labelled samples and write it to the ONNX file ``out``."""
        ...

    def train_light(self, splits: Splits, out: Path, checkpoint: Path, progress: Progress) -> None:
        """Train version 1 of the light model; ``checkpoint`` is what version 2 starts from."""
        ...

    def train_light_update(
        self,
        splits: Splits,
        checkpoint: Path,
        captured_inputs: Mapping[str, Array],
        captured_logits: npt.NDArray[np.float32],
        out: Path,
        progress: Progress,
    ) -> None:
        """Train version 2: version 1 taken further on what the heavy model answered to escalated requests."""
        ...


def load_story(name: str) -> Story:
    """Import and build the story called ``name``.

    Raises:
        UnknownStoryError: no such story; the message lists those that exist.
    """
    target = STORIES.get(name)
    if target is None:
        close = get_close_matches(name, STORIES, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise UnknownStoryError(f"unknown story {name!r}; known stories: {', '.join(sorted(STORIES))}{meant}")
    module, _, attribute = target.partition(":")
    return cast("Story", getattr(import_module(module), attribute)())
