"""Weights in a .safetensors file, with the factory that makes their module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.sources import Exported, SourceOptions, factory
from compiler.sources.onnx_file import refuse
from isthmus.errors import InputError

if TYPE_CHECKING:
    import torch


class SafetensorsFile:
    """A file of weights alone."""

    def files(self, source: str, options: SourceOptions) -> Mapping[str, Path]:
        """Return the weights' file and the factory's."""
        refuse(source, options, "a .safetensors file", ("task", "adapter"))
        return weights_and_factory(source, options)

    def to_onnx(self, source: str, options: SourceOptions, folder: Path) -> Exported:
        """Return the factory's module with these weights."""
        self.files(source, options)
        return factory.export_weights(read_weights(Path(source)), source, options, folder)


def weights_and_factory(source: str, options: SourceOptions) -> Mapping[str, Path]:
    """Return the two files that make a module.

    Raises:
        InputError: One of them is not there.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(f"cannot read {path}: there is no such file", hint="light.source and heavy.source name models")
    if not options.factory:
        raise InputError(
            f"{source}: holds weights alone; expected a factory that makes the module",
            hint='factory = "file.py:function", or name a Hugging Face folder instead of the file in it',
        )
    return {path.name: path, "factory": factory.source_file(options.factory, path.parent)}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in the file.

    Raises:
        InputError: It is not a safetensors file, or cut short.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a safetensors file: {str(error)[:200]}", hint="save the weights anew") from error
