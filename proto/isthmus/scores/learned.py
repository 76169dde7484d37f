"""Learned deferral: a small network says how much the heavy model would gain on this very answer.

It predicts (heavy right) - (light right) from the light model's logits and, where it exports them, its penultimate
features (after Mao, Mohri & Zhong, 2023, and Gupta et al., ICLR 2024, with the signed gain as the target). The score
falls as the gain rises. One hidden layer, two small matrix products: microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from isthmus.errors import BundleError
from isthmus.scores import Floats, ScoreOptions
from isthmus.scores.probabilities import masked, shifted

_LARGEST: Final = 5  # so many of the largest probabilities
CLIP: Final = 6.0  # standard deviations: a feature that is far off must not decide alone
_MOST_CLASSES: Final = 512  # up to which the logits themselves are features
_TENSORS: Final = ("mean", "scale", "weight", "bias", "readout", "offset")


def deferral_features(
    outputs: Mapping[str, NDArray[Any]], output: str, features: str, temperature: float
) -> tuple[Floats, NDArray[np.bool_]]:
    """Return what the network reads, [rows, features], and which rows are finite.

    The largest log-probabilities in order, margin, entropy, log-sum-exp of the logits, the log-probabilities by class
    (where there are not too many), and the model's own features.
    """
    logits = np.asarray(outputs[output], dtype=np.float64)
    rows, finite = shifted(logits, temperature)
    logarithms = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    probabilities = np.exp(logarithms)
    count = min(_LARGEST, logits.shape[1])
    best = -np.sort(-logarithms, axis=1)[:, :count]
    lead = np.exp(best[:, :1]) - np.exp(best[:, 1:2])
    entropy = -(probabilities * logarithms).sum(axis=1, keepdims=True)
    largest = np.where(finite, logits.max(axis=1), 0.0)[:, np.newaxis]
    parts = [np.maximum(best, -30.0), lead, entropy, largest]
    if logits.shape[1] <= _MOST_CLASSES:
        parts.append(np.maximum(logarithms, -30.0))
    if features:
        own = np.asarray(outputs[features], dtype=np.float64).reshape(len(logits), -1)
        finite = finite & np.isfinite(own).all(axis=1)
        parts.append(np.where(finite[:, np.newaxis], own, 0.0))
    return np.concatenate(parts, axis=1), finite


class Learned:
    """1/2 - tanh(predicted gain)/2; the weights are a file of the variant's folder."""

    def __init__(self, options: ScoreOptions) -> None:
        self._options = options
        if options.head is None:
            raise BundleError("the learned score needs its weights", reason="score-mismatch")
        self._head = load_head(options.head)

    def __call__(self, outputs: Mapping[str, NDArray[Any]]) -> Floats:
        """Return the score of each row.

        Raises:
            BundleError: The weights are for other features than these outputs give.
        """
        options = self._options
        rows, finite = deferral_features(outputs, options.output, options.features, options.temperature)
        expected = len(self._head["mean"])
        if rows.shape[1] != expected:
            raise BundleError(
                f"the learned score reads {expected} features, the model gives {rows.shape[1]}",
                reason="score-mismatch",
            )
        return masked(0.5 - 0.5 * np.tanh(predict_gain(self._head, rows)), finite)


def predict_gain(head: Mapping[str, Floats], rows: Floats) -> Floats:
    """Return what the network predicts for rows of `deferral_features`."""
    scaled = np.clip((rows - head["mean"]) * head["scale"], -CLIP, CLIP)
    hidden = np.maximum(scaled @ head["weight"] + head["bias"], 0.0)
    return np.asarray(hidden @ head["readout"] + head["offset"])


def load_head(path: Path) -> dict[str, Floats]:
    """Return the network's weights.

    Raises:
        BundleError: The file is missing or malformed.
    """
    try:
        tensors = {name: array.astype(np.float64) for name, array in load_file(path).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(f"{path.name}: {error}", reason="score-mismatch") from error
    shapes = {name: array.shape for name, array in tensors.items()}
    inputs, hidden = (*shapes.get("weight", ()), 0, 0)[:2]
    wanted = {
        "mean": (inputs,), "scale": (inputs,), "weight": (inputs, hidden), "bias": (hidden,),
        "readout": (hidden,), "offset": (1,),
    }  # fmt: skip
    if shapes != wanted or not all(np.isfinite(array).all() for array in tensors.values()):
        raise BundleError(
            f"{path.name}: expected finite tensors {', '.join(_TENSORS)} that fit together, got {shapes}",
            reason="score-mismatch",
        )
    return tensors
