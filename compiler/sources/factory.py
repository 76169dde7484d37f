"""Weights without a graph, and the function that makes the module they belong to.

A factory is "module:function" of an importable module, or "file.py:function" beside the weights. It takes nothing and
returns the module, with example inputs:
- a torch module with an attribute `example_inputs`, a mapping from the names of forward's parameters to tensors;
- or a pair (module, example inputs);
- or (module, example inputs, axes), where axes names more axes that may vary: {"tokens": {1: "sequence"}}.
The first axis of every input is the batch, unless axes mentions the input.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compiler.sources import Exported, SourceOptions
from compiler.sources.axes import BATCH
from isthmus.errors import InputError

if TYPE_CHECKING:
    import torch

_BATCH: Final = 3  # samples of the traced example
_OTHER_BATCH: Final = 2  # of the one that the export is compared with
_HINT: Final = 'factory = "file.py:function", a function without arguments that returns (module, example inputs)'


def source_file(factory: str, beside: Path) -> Path:
    """Return the file that defines the factory.

    Raises:
        InputError: There is no such module or file.
    """
    module, _, function = factory.partition(":")
    if not module or not function.isidentifier():
        raise InputError(f"factory: expected module:function or file.py:function, got {factory[:200]!r}", hint=_HINT)
    if module.endswith(".py"):
        path = beside / module
        if not path.is_file():
            raise InputError(f"factory: there is no file {path}", hint="its path is relative to the weights' folder")
        return path
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError) as error:
        raise InputError(f"factory: cannot find the module {module!r}: {str(error)[:200]}", hint=_HINT) from error
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise InputError(f"factory: cannot find the module {module!r}", hint=_HINT)
    return Path(spec.origin)


def export_weights(weights: Mapping[str, torch.Tensor], source: str, options: SourceOptions, folder: Path) -> Exported:
    """Return the factory's module with these weights, as ONNX.

    Raises:
        InputError: The factory fails or returns something else, or the weights are not the module's.
    """
    from compiler.sources.torch_module import export_module

    module, example, axes = _make(options.factory, Path(source).parent)
    load_weights(module, weights, source)
    named = {name: dict(axes[name]) if name in axes else {0: BATCH} for name in example}
    examples = [
        {name: _with_batch(tensor, named[name], size) for name, tensor in example.items()}
        for size in (_BATCH, _OTHER_BATCH)
    ]
    path = export_module(
        module, examples[0], named, options=options, path=folder / "model.onnx", what=source, other=examples[1]
    )
    return Exported(path)


def load_weights(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Put the weights into the module.

    Raises:
        InputError: Some are missing, are not the module's, or have another shape.
    """
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unknown:
        raise InputError(
            f"{source}: the weights are not the module's: missing {_some(missing)}; unknown {_some(unknown)}",
            hint="make the module as it was trained",
        )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise InputError(
                f"{source}: {name!r}: the module expects {list(own[name].shape)}, got {list(tensor.shape)}",
                hint="make the module as it was trained",
            )
    module.load_state_dict(dict(weights))


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name[:80]) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"


def _make(factory: str, beside: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor], Mapping[str, Any]]:
    import torch

    path = source_file(factory, beside)
    name, _, function = factory.partition(":")
    try:
        made = getattr(_load(name, path), function)()
    except Exception as error:  # it is the user's own code: whatever it raises is theirs to read
        raise InputError(
            f"factory {factory!r} failed: {type(error).__name__}: {str(error)[:300]}", hint=_HINT
        ) from error
    parts = made if isinstance(made, tuple) else (made, getattr(made, "example_inputs", None))
    module, example, axes = (*parts, {})[:3]
    fits = (
        isinstance(module, torch.nn.Module) and isinstance(example, Mapping) and isinstance(axes, Mapping) and example
    )
    if not fits or not all(isinstance(tensor, torch.Tensor) for tensor in example.values()):
        raise InputError(f"factory {factory!r}: expected a torch module and a mapping of example inputs", hint=_HINT)
    if any(tensor.dim() == 0 for name, tensor in example.items() if name not in axes):
        raise InputError(f"factory {factory!r}: expected example inputs with a first axis, the batch", hint=_HINT)
    return module, dict(example), axes


def _load(name: str, path: Path) -> Any:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"isthmus_factory_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and the like look their module up there
    spec.loader.exec_module(module)
    return module


def _with_batch(tensor: torch.Tensor, axes: Mapping[int, str], size: int) -> torch.Tensor:
    """Return the example with this many samples."""
    for index, name in axes.items():
        if name == BATCH:
            repeats = -(-size // tensor.shape[index])
            tensor = tensor.repeat_interleave(repeats, dim=index).narrow(index, 0, size)
    return tensor.contiguous()
