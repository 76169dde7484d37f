"""Pictures to run models on: crops of photographs, and rendered words; never white noise, which quantizes unlike both.

All are float32 of shape [count, 3 or 1, height, width] in 0..1, before a model's own normalization.
"""

from __future__ import annotations

import io
import string
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from benchmarks.zoo.packages import PHOTOS, Packages

Pictures = npt.NDArray[np.float32]

# Photographs that scikit-image's package holds (public domain or CC0, see its data/README.txt).
NAMES: Final = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
)
# Those that show what ImageNet has classes for.
OBJECTS: Final = (
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
)
_LETTERS: Final = string.ascii_letters + string.digits


def crops(
    packages: Packages, count: int, seed: int, size: int, *, names: tuple[str, ...] = NAMES, least: float = 0.35
) -> tuple[Pictures, npt.NDArray[np.int64]]:
    """Return square crops of the photographs, of random scale, place and brightness, and each one's photo.

    Args:
        packages: Where the photographs are.
        count: How many crops.
        seed: The same one gives the same crops.
        size: Of a crop's side, in pixels.
        names: The photographs, taken in turn.
        least: The smallest crop's side, as a share of the photograph's shorter one.
    """
    random = np.random.default_rng(seed)
    photos = _decoded(tuple(packages.read(PHOTOS, f"skimage/data/{name}") for name in names))
    pictures = np.empty((count, 3, size, size), np.float32)
    sources = np.empty(count, np.int64)
    for row in range(count):
        which = (row + seed) % len(photos)
        photo = photos[which]
        side = int(min(photo.size) * random.uniform(least, 1.0))
        left, top = (int(random.integers(0, extent - side + 1)) for extent in photo.size)
        crop = photo.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        pixels = np.asarray(crop, np.float32) / 255
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        pictures[row] = np.clip(pixels * random.uniform(0.7, 1.2), 0, 1).transpose(2, 0, 1)
        sources[row] = which
    return pictures, sources


def words(count: int, seed: int, height: int, width: int, *, channels: int) -> Pictures:
    """Return one line of random letters and digits for each picture, dark on light paper with grain."""
    random = np.random.default_rng(seed)
    pictures = np.empty((count, channels, height, width), np.float32)
    for row in range(count):
        text = "".join(random.choice(list(_LETTERS), random.integers(4, 11)))
        pictures[row] = _page([text], height, width, random)[None]
    return pictures


def pages(count: int, seed: int, size: int) -> Pictures:
    """Return pages with several lines of words, three channels."""
    random = np.random.default_rng(seed)
    pictures = np.empty((count, 3, size, size), np.float32)
    for row in range(count):
        lines = [
            " ".join("".join(random.choice(list(_LETTERS), random.integers(3, 9))) for _ in range(3))
            for _ in range(int(random.integers(2, 6)))
        ]
        pictures[row] = _page(lines, size, size, random)[None]
    return pictures


def _page(lines: list[str], height: int, width: int, random: np.random.Generator) -> npt.NDArray[np.float32]:
    paper, ink = random.uniform(0.7, 1.0), random.uniform(0.0, 0.35)
    page = Image.new("L", (width, height), int(255 * paper))
    pen = ImageDraw.Draw(page)
    step = height // len(lines)
    for place, line in enumerate(lines):
        font = ImageFont.load_default(size=max(10.0, min(step * 0.7, 1.6 * width / len(line))))
        pen.text((width * 0.03, place * step + step * 0.1), line, fill=int(255 * ink), font=font)
    turned = page.rotate(float(random.uniform(-2, 2)), Image.Resampling.BILINEAR, fillcolor=int(255 * paper))
    grain = random.normal(0, 0.02, (height, width)).astype(np.float32)
    return np.clip(np.asarray(turned, np.float32) / 255 + grain, 0, 1)


@cache
def _decoded(contents: tuple[bytes, ...]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]
