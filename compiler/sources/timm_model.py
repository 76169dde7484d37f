"""timm:NAME, an architecture of PyTorch Image Models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.sources import Exported, SourceOptions, named_model
from isthmus.errors import InputError

if TYPE_CHECKING:
    import torch


class TimmModel:
    """A model that timm makes."""

    def files(self, source: str, options: SourceOptions) -> Mapping[str, Path]:
        """Return the file of weights, if the source names one."""
        return named_model.files(source, options)

    def to_onnx(self, source: str, options: SourceOptions, folder: Path) -> Exported:
        """Return the model as ONNX."""
        return named_model.export(source, _make, _classifier, _size, options, folder)


def _make(name: str, classes: int | None) -> torch.nn.Module:
    try:
        import timm
    except Exception as error:  # a torchvision of another torch fails with whatever it likes
        raise named_model.cannot_import("timm", error) from error
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0].split('.')[0]}*")[:5])
        raise InputError(
            f"timm has no model {name[:80]!r}", hint=f"there are {near}" if near else "see timm.list_models()"
        )
    more = {} if classes is None else {"num_classes": classes}
    return timm.create_model(name, pretrained=False, exportable=True, **more)  # type: ignore[no-any-return]


def _classifier(module: torch.nn.Module) -> str:
    name = module.pretrained_cfg.get("classifier") or ""  # type: ignore[union-attr,operator]
    return f"{name if isinstance(name, str) else name[0]}.weight"


def _size(module: torch.nn.Module) -> tuple[int, int, int]:
    channels, height, width = module.pretrained_cfg["input_size"]  # type: ignore[index]
    return int(channels), int(height), int(width)
