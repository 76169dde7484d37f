"""The bundle on disk: put together in a folder of its own, checked, then moved into place at once.

Same input, same bytes: no time stamps, sorted names, canonical JSON; the archive has fixed owners, modes and times.
"""

from __future__ import annotations

import platform
import shutil
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import save

from compiler.capture import CapturedModel
from compiler.data import BATCH_AXIS, is_batchable
from compiler.pictures import draw_calibration
from compiler.recipe import Recipe
from compiler.report import Report
from isthmus import __version__
from isthmus.bundle import (
    CALIBRATION,
    GOLDEN,
    MANIFEST,
    PICTURE,
    REPORT,
    Calibration,
    Heavy,
    Manifest,
    Provenance,
    Variant,
    index_files,
    open_bundle,
)
from isthmus.digests import tree_digest
from isthmus.errors import ConflictError, InputError
from isthmus.tensors import Array

_TOOLS: Final = ("numpy", "onnx", "onnxruntime")


@dataclass(frozen=True, slots=True)
class Contents:
    """What goes into a bundle besides the variants and the heavy model, which are in the folder already."""

    recipe: Recipe
    recipe_sha256: str
    light: CapturedModel
    sources: Mapping[str, str]
    variants: Sequence[Variant]
    calibration: Calibration
    report: Report
    golden: Mapping[str, Array]
    tools: Sequence[str] = ()  # distributions whose versions decided what was built
    varies: Mapping[str, str] = field(default_factory=dict)  # files that another build may make otherwise, and why


def write_bundle(folder: Path, contents: Contents) -> Manifest:
    """Complete the bundle in `folder` and return its manifest."""
    (folder / CALIBRATION).write_bytes(contents.calibration.to_json())
    draw_calibration(contents.calibration, folder / PICTURE)
    (folder / REPORT).write_bytes(contents.report.to_json())
    tensors = {name: np.ascontiguousarray(array) for name, array in sorted(contents.golden.items())}
    (folder / GOLDEN).write_bytes(save(tensors))
    files = index_files(folder)
    heavy = {path: entry.sha256 for path, entry in files.items() if path.startswith("heavy/")}
    model, features = contents.recipe.model, contents.recipe.calibration.features
    manifest = Manifest(
        name=model.name,
        version=model.version,
        labels=model.labels,
        inputs=contents.light.inputs,
        outputs=tuple(spec for spec in contents.light.outputs if spec.name != features),
        features=tuple(spec for spec in contents.light.outputs if spec.name == features),
        max_batch=model.max_batch if is_batchable(contents.light) else 1,
        max_length=max(
            (longest for axis, (_, longest) in contents.light.lengths.items() if axis != BATCH_AXIS), default=65_536
        ),
        variants=tuple(contents.variants),
        heavy=Heavy(
            platform=contents.recipe.heavy.target.removeprefix("triton-"),
            digest=tree_digest(heavy),
            accuracy=contents.report.heavy_accuracy,
        ),
        provenance=Provenance(
            sources=dict(sorted(contents.sources.items())),
            recipe=contents.recipe_sha256,
            tools={
                "isthmus": __version__,
                "python": platform.python_version(),
                **{tool: version(tool) for tool in sorted({*_TOOLS, *contents.tools})},
            },
        ),
        varies=dict(sorted(contents.varies.items())),
        files=files,
    )
    (folder / MANIFEST).write_bytes(manifest.to_json())
    return open_bundle(folder)


def check_output(output: Path) -> None:
    """Check, before any work, that a bundle may be written to `output`.

    Raises:
        ConflictError: Something else is there.
        InputError: The folder above it is not one.
    """
    if output.exists() and not (output / MANIFEST).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ConflictError(f"{output} exists and is not a bundle", hint="give another --output, or remove it")
    check_folder(output.parent, "output")


def check_folder(folder: Path, option: str) -> None:
    """Make a folder, where it is not there, and check that files can be made in it.

    Raises:
        InputError: They cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}", hint=f"give another --{option}") from error


def move_into_place(folder: Path, output: Path) -> None:
    """Make `folder` the bundle at `output`; one that was there is replaced as a whole."""
    if output.exists():
        old = folder.with_name(f"{folder.name}.replaced")
        output.rename(old)
        try:
            folder.rename(output)
        except BaseException:
            old.rename(output)  # or it would be removed with the folder that we work in
            raise
        shutil.rmtree(old)
    else:
        folder.rename(output)


def read_archive(archive: Path, folder: Path) -> None:
    """Unpack what `write_archive` wrote; what is in it is checked when the bundle is opened.

    Raises:
        InputError: It is not an archive of plain files below one folder.
    """
    try:
        with tarfile.open(archive, "r:") as tar:  # uncompressed: it cannot be larger than it is
            if not all(entry.isreg() for entry in tar):
                raise InputError(f"{archive}: expected nothing but files in the archive of a bundle")
            tar.extractall(folder, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise InputError(
            f"{archive} is neither the folder nor the archive of a bundle: {error}",
            hint="isthmus compile RECIPE --archive FILE makes one",
        ) from error


def write_archive(bundle: Path, archive: Path) -> None:
    """Write the bundle as a tar file that depends on its files' names and bytes only."""
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
            entry = tarfile.TarInfo(path.relative_to(bundle).as_posix())
            entry.size, entry.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                tar.addfile(entry, file)
