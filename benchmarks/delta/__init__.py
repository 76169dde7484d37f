"""Deltas of real updates: size and speed, against general tools and against coders made for models.

finetune.py   what is trained, and how each version differs from the one before
pairs.py      the files of both versions, in every form that a bundle holds; made once, kept in build/delta
spans.py      where tensors lie in a file
tools.py      the tools, in an environment of their own: `python -m benchmarks.delta.tools` installs it
worker.py     runs there: one tool, one pair
fmdelta.py    a coder after FM-Delta (NeurIPS 2024)
ours.py       `isthmus.delta`, each step a process of its own
__main__.py   the command
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DeltaPair:
    """Two versions of one file; `form` is a key of `pairs.FORMS`, or says what else it is."""

    name: str
    form: str
    update: str
    old: Path
    new: Path
