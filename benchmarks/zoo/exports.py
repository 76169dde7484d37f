"""Torch models to ONNX files: seeded weights, statistics and last layers fitted to real inputs, symbolic axes.

A freshly initialised network is a poor stand-in for a trained one: its activations drift and its best class is noise.
So normalization statistics are taken from real inputs, and the last layer is fitted by ridge regression to a small
task (which photograph is this a crop of; which newsgroup; which appliance). What is below the last layer stays random.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

OPSET: Final = 18
_RIDGE: Final = 0.1  # of the features' summed variance, for each sample
_SHARPNESS: Final = 10.0  # logits between 0 and about this


def seeded(seed: int = 0) -> None:
    """Make the weights that are drawn next the same on every machine."""
    torch.manual_seed(seed)


def load_pth(model: nn.Module, content: bytes) -> None:
    """Load a published checkpoint, tensors only, and check that it fits entirely."""
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    model.load_state_dict(state, strict=True)


@torch.no_grad()
def settle(model: nn.Module, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
    """Take the statistics of batch normalizations from real inputs."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = 1.0
    for module in norms:
        module.train()
    model(*_tensors(inputs))
    model.eval()


@torch.no_grad()
def fit_head(
    model: nn.Module, head: nn.Linear, inputs: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[np.int64]
) -> None:
    """Fit the last layer to `labels` by ridge regression; classes that do not occur score 0.

    Features keep their scale and the ridge is wide: many features of a random network hardly vary, and a layer that
    leant on those would be thrown off by any rounding, unlike a trained one.
    """
    model.eval()
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for start in range(0, len(labels), 32):
        model(*(tensor[start : start + 32] for tensor in _tensors(inputs)))
    handle.remove()
    features = torch.cat(seen).double()
    mean = features.mean(0)
    x = features - mean
    y = torch.nn.functional.one_hot(torch.from_numpy(labels), head.out_features).double()
    centre = y.mean(0)
    gram = x.T @ x
    gram += torch.eye(len(gram), dtype=torch.float64) * (_RIDGE * gram.trace() / len(x))
    weight = torch.linalg.solve(gram, x.T @ (y - centre)).T
    head.weight.copy_(_SHARPNESS * weight)
    head.bias.copy_(_SHARPNESS * (centre - weight @ mean))


def export(
    model: nn.Module,
    inputs: Mapping[str, npt.NDArray[Any]],
    outputs: Sequence[str],
    out: Path,
    *,
    axes: Mapping[str, Mapping[int, str]] | None = None,
) -> None:
    """Write the model as one ONNX file: batch symbolic in every input, and the other `axes` that are named.

    `inputs` are two samples: with one, the exporter takes the batch for a constant.
    """
    model.eval()
    names = {name: {0: "batch"} | dict((axes or {}).get(name, {})) for name in inputs}
    dims = {axis: torch.export.Dim(axis, min=1) for places in names.values() for axis in places.values()}
    with _quiet():
        program = torch.onnx.export(
            model,
            tuple(_tensors(inputs)),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            dynamic_shapes=tuple({place: dims[axis] for place, axis in places.items()} for places in names.values()),
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("the exporter returned no program")
    program.save(str(out), external_data=False)


def _tensors(inputs: Mapping[str, npt.NDArray[Any]]) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs.values()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on its own internals off the console."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
