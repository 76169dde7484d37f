"""Training of the learned score: a small network that predicts what escalating a request would gain.

The target is the signed gain, (heavy right) - (light right), in {-1, 0, 1}; where the operator bounds the risk of the
edge's own answers, it is whether the light model is wrong, for that is what the bound is about. Gold labels, on rows
that neither model was trained on: a light model is right on its own training rows, and there is nothing to learn from
that. Label-free targets, such as disagreement, do worse than the largest probability.

Several members are trained on different halves of the rows with early stopping on what each has not seen, and averaged.
Members with one hidden layer average to one network with a wider hidden layer: the device evaluates a single one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from isthmus.scores.learned import CLIP

Floats = NDArray[np.float64]

MEMBERS: Final = 4
HIDDEN: Final = 24  # of each member
LEAST_ROWS: Final = 200
_EPOCHS: Final = 60
_PATIENCE: Final = 8
_BATCH: Final = 128
_RATE: Final = 2e-3
_DECAY: Final = 1e-2
_HELD_OUT: Final = 0.25


@dataclass(slots=True)
class _Member:
    weight: Floats
    bias: Floats
    readout: Floats
    offset: Floats

    def parts(self) -> list[Floats]:
        return [self.weight, self.bias, self.readout, self.offset]


def deferral_target(kind: str, light_right: NDArray[np.bool_], heavy_right: NDArray[np.bool_]) -> Floats:
    """Return what the network learns to predict, for an operating point of this kind."""
    if kind == "max_risk":
        return 1.0 - light_right.astype(np.float64)
    return heavy_right.astype(np.float64) - light_right


def train_head(features: Floats, target: Floats, path: Path, *, seed: int = 0) -> None:
    """Train on rows [rows, features] with the target of each, and write the weights as safetensors.

    The same rows and seed give the same file.
    """
    mean, spread = features.mean(axis=0), features.std(axis=0)
    scale = np.where(spread > 1e-9, 1.0 / np.maximum(spread, 1e-9), 0.0)
    rows = np.clip((features - mean) * scale, -CLIP, CLIP)
    random = np.random.default_rng(seed)
    members = [_train(rows, target, random) for _ in range(MEMBERS)]
    tensors = {
        "mean": mean,
        "scale": scale,
        "weight": np.concatenate([member.weight for member in members], axis=1),
        "bias": np.concatenate([member.bias for member in members]),
        "readout": np.concatenate([member.readout for member in members]) / MEMBERS,
        "offset": np.mean([member.offset for member in members], axis=0),
    }
    path.write_bytes(save({name: np.ascontiguousarray(array, dtype=np.float32) for name, array in tensors.items()}))


def _train(rows: Floats, target: Floats, random: np.random.Generator) -> _Member:
    """Return one member: Adam (Kingma & Ba, 2015) with decoupled weight decay, stopped where held-out rows say so."""
    order = random.permutation(len(rows))
    held, seen = np.split(order, [int(_HELD_OUT * len(rows))])
    member = _Member(
        random.normal(0.0, np.sqrt(2.0 / rows.shape[1]), (rows.shape[1], HIDDEN)),
        np.zeros(HIDDEN),
        random.normal(0.0, 0.1 / np.sqrt(HIDDEN), HIDDEN),
        np.array([target[seen].mean()]),
    )
    first = [np.zeros_like(part) for part in member.parts()]
    second = [np.zeros_like(part) for part in member.parts()]
    best, kept, waited, step = np.inf, [part.copy() for part in member.parts()], 0, 0
    for _ in range(_EPOCHS):
        shuffled = random.permutation(seen)
        for start in range(0, len(shuffled), _BATCH):
            batch = shuffled[start : start + _BATCH]
            step += 1
            _update(member, _gradients(member, rows[batch], target[batch]), first, second, step)
        loss = float(((_predict(member, rows[held]) - target[held]) ** 2).mean())
        if loss < best - 1e-5:
            best, kept, waited = loss, [part.copy() for part in member.parts()], 0
            continue
        waited += 1
        if waited >= _PATIENCE:
            break
    return _Member(*kept)


def _predict(member: _Member, rows: Floats) -> Floats:
    hidden = np.maximum(rows @ member.weight + member.bias, 0.0)
    return np.asarray(hidden @ member.readout + member.offset)


def _gradients(member: _Member, rows: Floats, target: Floats) -> list[Floats]:
    """Return the gradients of half the mean squared error."""
    hidden = np.maximum(rows @ member.weight + member.bias, 0.0)
    error = (hidden @ member.readout + member.offset - target) / len(rows)
    back = np.outer(error, member.readout) * (hidden > 0)
    return [rows.T @ back, back.sum(axis=0), hidden.T @ error, np.array([error.sum()])]


def _update(member: _Member, gradients: list[Floats], first: list[Floats], second: list[Floats], step: int) -> None:
    for place, (part, gradient) in enumerate(zip(member.parts(), gradients, strict=True)):
        first[place] = 0.9 * first[place] + 0.1 * gradient
        second[place] = 0.999 * second[place] + 0.001 * gradient**2
        move = (first[place] / (1 - 0.9**step)) / (np.sqrt(second[place] / (1 - 0.999**step)) + 1e-8)
        part -= _RATE * (move + (_DECAY * part if part.ndim == 2 else 0.0))
