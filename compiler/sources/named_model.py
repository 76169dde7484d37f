"""What timm and torchvision models have in common: a name instead of a file, and weights of one's own.

A source is "timm:NAME" or "torchvision:NAME" (random weights, always the same ones: for measuring speed) or
"timm:NAME@weights.safetensors". Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.sources import Exported, SourceOptions
from compiler.sources.axes import BATCH
from compiler.sources.onnx_file import refuse
from isthmus.digests import sha256_bytes
from isthmus.errors import ConfigError, InputError

if TYPE_CHECKING:
    import torch


def cannot_import(library: str, error: Exception) -> ConfigError:
    """Return the error for a library that is missing or made for another torch; no extra can bring the right one."""
    return ConfigError(
        f"{library} cannot be imported: {' '.join(str(error).split())[:100]}",
        hint="install timm and torchvision from where torch came from: they must be made for its release",
        reason="missing-extra",
    )


def files(source: str, options: SourceOptions) -> Mapping[str, Path]:
    """Return the file of weights, if the source names one.

    Raises:
        InputError: It is not there, or the options hold what names have no use for.
    """
    refuse(source, options, "a named model", ("task", "adapter", "factory"))
    _, weights = split(source)
    if weights is None:
        return {}
    if weights.suffix != ".safetensors" or not weights.is_file():
        raise InputError(f"{source}: expected a safetensors file after the @, got {weights}")
    return {weights.name: weights}


def split(source: str) -> tuple[str, Path | None]:
    """Return the model's name and its weights, if the source names them."""
    name, at, weights = source.partition(":")[2].partition("@")
    return name, Path(weights) if at else None


def seed(source: str) -> int:
    """Return a number for random weights: the same for the same name."""
    return int(sha256_bytes(split(source)[0].encode())[:8], 16)


def export(
    source: str,
    make: Callable[[str, int | None], torch.nn.Module],
    classifier: Callable[[torch.nn.Module], str],
    size: Callable[[torch.nn.Module], tuple[int, int, int]],
    options: SourceOptions,
    folder: Path,
) -> Exported:
    """Return the model as ONNX, from "images" to "logits".

    Args:
        source: The model's name, perhaps with weights.
        make: Makes the module, given its name and the number of classes (None: the model's own).
        classifier: Names the parameter of the module whose first axis is the classes.
        size: Channels, height and width of the module's images.
        options: As for every source.
        folder: Where to write.

    Raises:
        InputError: There is no such model, or the weights are not its own.
    """
    import torch

    from compiler.sources.factory import load_weights
    from compiler.sources.safetensors_file import read_weights
    from compiler.sources.torch_module import export_module

    files(source, options)
    name, path = split(source)
    weights = None if path is None else read_weights(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed(source))
        module = make(name, None)
        if weights is not None:
            head = weights.get(classifier(module))
            if head is not None:
                module = make(name, int(head.shape[0]))
            load_weights(module, weights, source)
        images = torch.rand((3, *size(module)))
    exported = export_module(
        _images_to_logits(module), {"images": images}, {"images": {0: BATCH}}, options=options,
        path=folder / "model.onnx", what=source, other={"images": images[:2]},
    )  # fmt: skip
    return Exported(exported)


def _images_to_logits(module: torch.nn.Module) -> torch.nn.Module:
    import torch

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, images: torch.Tensor) -> dict[str, Any]:
            outputs = self.model(images)
            return dict(outputs) if isinstance(outputs, Mapping) else {"logits": outputs}

    return Named()
