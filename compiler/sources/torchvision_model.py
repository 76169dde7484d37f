"""torchvision:NAME, a classifier of torchvision.models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.sources import Exported, SourceOptions, named_model
from isthmus.errors import InputError

if TYPE_CHECKING:
    import torch


class TorchvisionModel:
    """A model that torchvision makes."""

    def files(self, source: str, options: SourceOptions) -> Mapping[str, Path]:
        """Return the file of weights, if the source names one."""
        return named_model.files(source, options)

    def to_onnx(self, source: str, options: SourceOptions, folder: Path) -> Exported:
        """Return the model as ONNX."""
        return named_model.export(source, _make, _classifier, _size, options, folder)


def _make(name: str, classes: int | None) -> torch.nn.Module:
    try:
        from torchvision import models
    except Exception as error:  # a torchvision of another torch fails with whatever it likes
        raise named_model.cannot_import("torchvision", error) from error
    known = models.list_models(module=models)
    if name not in known:
        near = ", ".join([one for one in known if one.startswith(name[:6])][:5])
        raise InputError(
            f"torchvision has no model {name[:80]!r}", hint=f"there are {near}" if near else "see torchvision.models"
        )
    more = {} if classes is None else {"num_classes": classes}
    return models.get_model(name, weights=None, **more)  # type: ignore[no-any-return]


def _classifier(module: torch.nn.Module) -> str:
    """Return the last weight of the module: in torchvision's classifiers, the one of the classes."""
    return [name for name, _ in module.named_parameters() if name.endswith("weight")][-1]


def _size(module: torch.nn.Module) -> tuple[int, int, int]:
    side = getattr(module, "image_size", 224)  # vision transformers know theirs
    return 3, int(side), int(side)
