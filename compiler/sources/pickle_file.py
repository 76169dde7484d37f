"""Weights in a .pt or .pth file: a pickle, so only when the options say so, and then tensors alone.

`torch.load(weights_only=True)` builds tensors and containers and refuses everything else; it has had holes before, so a
model from somebody else belongs in a safetensors file. TorchScript archives hold programs and are refused.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compiler.sources import Exported, SourceOptions, factory
from compiler.sources.onnx_file import refuse
from compiler.sources.safetensors_file import weights_and_factory
from compiler.sources.wire import MAX_MODEL_BYTES
from isthmus.errors import InputError

if TYPE_CHECKING:
    import torch

_MAX_PICKLE_BYTES: Final = 64 << 20  # of the part that is not weights
_MAX_ENTRIES: Final = 100_000
_NESTED: Final = ("state_dict", "model_state_dict", "model")  # where training loops put the weights
_SAFER: Final = "save the weights with safetensors.torch.save_file instead"


class UnpickledWarning(UserWarning):
    """A pickle is read, because the options allow it."""


class PickleFile:
    """A file that torch.save wrote."""

    def files(self, source: str, options: SourceOptions) -> Mapping[str, Path]:
        """Return the weights' file and the factory's."""
        refuse(source, options, "a .pt or .pth file", ("task", "adapter"))
        check_allowed(source, options)
        return weights_and_factory(source, options)

    def to_onnx(self, source: str, options: SourceOptions, folder: Path) -> Exported:
        """Return the factory's module with these weights."""
        self.files(source, options)
        return factory.export_weights(read_pickle(Path(source)), source, options, folder)


def check_allowed(source: str, options: SourceOptions) -> None:
    """Check that pickles may be read.

    Raises:
        InputError: The options do not say so.
    """
    if not options.allow_pickle:
        raise InputError(
            f"{source}: a pickle, which can run code when it is read",
            hint=f"{_SAFER}, or set allow_pickle = true for a file that you made yourself",
        )


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in the file; nothing but tensors and containers is unpickled.

    Raises:
        InputError: It holds something else, is a TorchScript archive, or is no archive at all.
    """
    import torch

    warnings.warn(
        f"{path}: reading a pickle, with torch's weights_only loader; {_SAFER}", UnpickledWarning, stacklevel=2
    )
    check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a broken pickle leads it to
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: holds more than tensors, or is broken: {reason}", hint=_SAFER) from error
    return _weights(loaded, path)


def check_archive(path: Path) -> None:
    """Check that the file is a zip archive of bounded size, as torch.save writes, and no TorchScript.

    Raises:
        InputError: It is not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: expected a file that torch.save of torch 1.6 or newer wrote", hint=_SAFER) from error
    names = [entry.filename for entry in entries]
    if len(entries) > _MAX_ENTRIES or sum(entry.file_size for entry in entries) > MAX_MODEL_BYTES:
        raise InputError(f"{path}: expected at most {_MAX_ENTRIES} tensors and {MAX_MODEL_BYTES} bytes")
    if any(entry.file_size > _MAX_PICKLE_BYTES for entry in entries if entry.filename.endswith(".pkl")):
        raise InputError(f"{path}: expected at most {_MAX_PICKLE_BYTES} bytes beside the weights")
    if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
        raise InputError(
            f"{path}: a TorchScript archive, which holds a program",
            hint="export the module with torch.export.save (.pt2) or torch.onnx.export",
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(f"{path}: expected an archive without compression, as torch.save writes it", hint=_SAFER)


def _weights(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    import torch

    for key in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in loaded.items()
    ):
        raise InputError(f"{path}: expected a state dict, got {type(loaded).__name__}", hint="save module.state_dict()")
    return dict(loaded)
