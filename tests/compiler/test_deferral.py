"""The learned score: it finds what the largest probability cannot see, and the same rows give the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compiler.deferral import deferral_target, train_head
from compiler.evaluate import area_under_risk
from isthmus.scores import ScoreOptions, open_score
from isthmus.scores.learned import deferral_features, load_head, predict_gain
from isthmus.tensors import Array


def overconfident(count: int, seed: int) -> tuple[Array, Array, Array]:
    """Three classes, all answered as surely; class 2 is wrong half of the time, and its feature says so."""
    rng = np.random.default_rng(seed)
    answers = rng.integers(0, 3, count)
    logits = np.eye(3)[answers] * rng.uniform(1.0, 4.0, (count, 1))
    hint = rng.normal(0, 1, (count, 4))
    wrong = (answers == 2) & (hint[:, 1] > 0)
    return logits, hint, ~wrong


def test_it_beats_the_largest_probability_where_there_is_something_to_learn(tmp_path: Path) -> None:
    logits, hint, right = overconfident(3000, 0)
    rows, finite = deferral_features({"logits": logits, "features": hint}, "logits", "features", 1.0)
    train_head(rows, deferral_target("max_risk", right, np.ones_like(right)), tmp_path / "head.safetensors")
    logits, hint, right = overconfident(2000, 1)
    outputs = {"logits": logits, "features": hint}

    learned = open_score("learned", ScoreOptions("logits", features="features", head=tmp_path / "head.safetensors"))(
        outputs
    )
    plain = open_score("max_probability", ScoreOptions("logits"))(outputs)

    assert finite.all()
    assert area_under_risk(learned, right) < 0.4 * area_under_risk(plain, right)


@pytest.mark.parametrize("kind", ["max_escalation", "target_accuracy", "max_risk"])
def test_the_target_is_the_gain_or_the_error_that_is_bounded(kind: str) -> None:
    light, heavy = np.array([True, True, False, False]), np.array([True, False, True, False])

    target = deferral_target(kind, light, heavy)

    assert target.tolist() == ([0, 0, 1, 1] if kind == "max_risk" else [0, -1, 1, 0])


def test_the_same_rows_and_seed_give_the_same_file(tmp_path: Path) -> None:
    logits, hint, right = overconfident(400, 2)
    rows, _ = deferral_features({"logits": logits, "features": hint}, "logits", "features", 1.0)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_head(rows, (~right).astype(float), tmp_path / name, seed=seed)

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_features_that_never_change_do_no_harm(tmp_path: Path) -> None:
    rows = np.zeros((300, 5))
    rows[:, 0] = np.linspace(-1, 1, 300)

    train_head(rows, (rows[:, 0] > 0).astype(float), tmp_path / "head.safetensors")

    found = predict_gain(load_head(tmp_path / "head.safetensors"), rows)
    assert np.corrcoef(found, rows[:, 0] > 0)[0, 1] > 0.8
