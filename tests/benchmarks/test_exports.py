from __future__ import annotations

import numpy as np
import torch
from torch import nn

from benchmarks.zoo.exports import fit_head, settle


def test_a_fitted_head_tells_classes_apart_that_random_features_can_tell_apart() -> None:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    labels = np.arange(200) % 4
    inputs = (random.normal(0, 0.3, (200, 8)) + 2 * np.eye(8)[labels]).astype(np.float32)
    head = nn.Linear(32, 10)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), head)
    fit_head(model, head, {"x": inputs[:100]}, labels[:100])
    answers = model(torch.from_numpy(inputs[100:])).argmax(1).numpy()
    assert (answers == labels[100:]).mean() > 0.95


def test_settled_statistics_are_those_of_the_inputs() -> None:
    images = np.random.default_rng(1).normal(3, 2, (64, 3, 8, 8)).astype(np.float32)
    norm = nn.BatchNorm2d(3)
    settle(norm, {"image": images})
    settled = norm(torch.from_numpy(images)).detach()
    assert abs(float(settled.mean())) < 0.01
    assert abs(float(settled.std()) - 1) < 0.01
    assert not norm.training
