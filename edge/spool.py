"""Capture: what the heavy model answered to hard requests, kept on the device for the next fine-tuning.

Opt-in. Where inputs of the model are sealed for the gateway, so is every file here (".sealed"), whole: this device
cannot read it again, and it is exported where the gateway's keys are. Rows wait in memory and go to disk in safetensors
files of at most 256 rows ("input.<name>", "output.<name>"); each file appears by one rename. The folder is bounded by
bytes, the oldest files go first; memory is bounded by rows and bytes, and what does not fit is dropped and counted,
because serving comes first.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np
import structlog
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edge.store import write_atomically
from isthmus.errors import ConfigError, InputError, NotFoundError, UnavailableError
from isthmus.tensors import Array

FILE_ROWS: Final = 256
_PLAIN: Final = ".safetensors"
_SEALED: Final = ".sealed"
_WAITING_ROWS: Final = 4 * FILE_ROWS
_FULL_BYTES: Final = 4 << 20
_WAITING_BYTES: Final = 4 * _FULL_BYTES

log = structlog.get_logger(__name__)


class Spool:
    """The captures of one model.

    Args:
        folder: Made when it is missing; for the owner's eyes only.
        limit_bytes: Size of all files together.
        seal: Seals a file's bytes, or raises UnavailableError; None leaves them readable.
    """

    def __init__(
        self, folder: Path, *, limit_bytes: int = 64 << 20, seal: Callable[[bytes], bytes] | None = None
    ) -> None:
        self._seal = seal
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._rows: list[dict[str, Array]] = []
        self._bytes = 0  # of the arrays in `_rows`
        self._writing = threading.Lock()
        self.dropped = 0
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()

    def offer(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> bool:
        """Take the rows of one cloud answer; return whether a file's worth is waiting for `flush`."""
        tensors = {f"input.{name}": array for name, array in inputs.items()}
        tensors |= {f"output.{name}": array for name, array in outputs.items()}
        lengths = {len(array) for array in tensors.values()}
        if len(lengths) != 1:  # no common batch axis: the request as a whole is one row
            tensors = {name: array[np.newaxis] for name, array in tensors.items()}
            lengths = {1}
        rows, size = lengths.pop(), sum(array.nbytes for array in tensors.values())
        if len(self._rows) + rows > _WAITING_ROWS or self._bytes + size > _WAITING_BYTES:
            self.dropped += rows
        else:
            # Copies: a view would keep the whole request's bytes alive.
            self._rows += [{name: array[i].copy() for name, array in tensors.items()} for i in range(rows)]
            self._bytes += size
        return len(self._rows) >= FILE_ROWS or self._bytes >= _FULL_BYTES

    async def flush(self) -> None:
        """Write what is waiting; a disk that cannot take it costs the captures, nothing else."""
        rows, self._rows, self._bytes = self._rows, [], 0
        try:
            await asyncio.to_thread(self._write_all, rows)
        except (OSError, UnavailableError) as error:
            self.dropped += len(rows)
            log.warning("captures dropped", rows=len(rows), error=str(error))

    def _write_all(self, rows: list[dict[str, Array]]) -> None:
        with self._writing:
            for _, group in groupby(rows, key=_signature):  # an update may change the tensors' form
                alike = list(group)
                for start in range(0, len(alike), FILE_ROWS):
                    self._write(alike[start : start + FILE_ROWS])

    def _write(self, rows: list[dict[str, Array]]) -> None:
        data = save({name: np.stack([row[name] for row in rows]) for name in rows[0]})
        if self._seal is not None:
            data = self._seal(data)
        if len(data) > self._limit_bytes:
            self.dropped += len(rows)
            return
        files = _files(self._folder)
        sizes = [path.stat().st_size for path in files]
        number = max((int(path.stem) for path in files if path.stem.isdecimal()), default=0) + 1
        while files and sum(sizes) + len(data) > self._limit_bytes:
            files.pop(0).unlink()
            sizes.pop(0)
        suffix = _PLAIN if self._seal is None else _SEALED
        write_atomically(self._folder / f"{number:012d}{suffix}", data, mode=0o600)


def export_captures(folder: Path, output: Path, unseal: Callable[[bytes], bytes] | None = None) -> int:
    """Join all captures of a model into one safetensors file; return its rows.

    Args:
        folder: Of the captures.
        output: The file to write.
        unseal: Opens sealed files; None where the keys are not here.

    Raises:
        NotFoundError: There are none.
        ConfigError: There are sealed ones, and no keys.
    """
    parts: list[dict[str, Array]] = []
    for path in _files(folder):
        if path.suffix == _SEALED and unseal is None:
            raise ConfigError(
                f"the captures in {folder} are sealed for the gateway",
                hint="copy the device's spool folder to where DIR/cloud is, and name it: --sealing-keys DIR/cloud",
                reason="sealed-captures",
            )
        try:
            data = path.read_bytes()
            parts.append(load(unseal(data) if unseal is not None and path.suffix == _SEALED else data))
        except (SafetensorError, OSError, InputError) as error:  # a disk error in one file must not cost the others
            log.warning("captures left out", file=path.name, error=str(error))
    newest = _form(parts[-1]) if parts else None
    # A model whose tensors changed starts anew: rows of the old form fit no training set of the new one.
    parts = [part for part in parts if _form(part) == newest]
    if not parts:
        raise NotFoundError(f"no captures in {folder}", hint="run the agent with --capture")
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    write_atomically(output, save(joined), mode=0o600)
    return len(next(iter(joined.values())))


def find_spool(folder: Path, model: str | None) -> Path:
    """Return the folder of a model's captures; the only one there is when `model` is None.

    Raises:
        NotFoundError: There is none of that name.
        InputError: There are several, and `model` is None.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if model is None and len(names) > 1:
        raise InputError(f"expected --model, one of {', '.join(names)}")
    wanted = model if model is not None else next(iter(names), None)
    if wanted not in names:
        raise NotFoundError(f"no captures in {folder}", hint="run the agent with --capture")
    return folder / str(wanted)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (_PLAIN, _SEALED))


def _signature(row: Mapping[str, Array]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (array.dtype.str, array.shape) for name, array in row.items()}


def _form(part: Mapping[str, Array]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return _signature({name: array[0] for name, array in part.items()})
