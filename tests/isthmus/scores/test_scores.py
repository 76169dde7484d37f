"""The contract of every score in the table, and what each one is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

from compiler.deferral import train_head
from isthmus.errors import BundleError
from isthmus.scores import CLASSIFICATION, SCORES, Score, ScoreOptions, open_score
from isthmus.scores.costs import class_thresholds
from isthmus.scores.learned import deferral_features
from isthmus.tensors import Array

CLASSES = 4
FINITE = st.floats(-1e4, 1e4, width=32)
ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(CLASSES)), elements=FINITE)
SHAPES = {"sequence": (3, 5, CLASSES), "detection": (3, 6)}  # all others take logits [rows, classes]


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained learned score: sure answers gain nothing, unsure ones do."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (600, CLASSES))
    rows, _ = deferral_features({"logits": logits}, "logits", "", 1.0)
    gain = (rows[:, CLASSES] < 0.5).astype(float)
    path = tmp_path_factory.mktemp("head") / "deferral.safetensors"
    train_head(rows, gain, path)
    return path


@pytest.fixture(params=sorted(SCORES))
def score(request: pytest.FixtureRequest, head: Path) -> tuple[Score, tuple[int, ...]]:
    options = ScoreOptions("logits", 1.5, head=head)
    return open_score(request.param, options), SHAPES.get(request.param, (3, CLASSES))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 50.0, 1e4])
def test_one_score_between_0_and_1_for_each_row(score: tuple[Score, tuple[int, ...]], scale: float) -> None:
    compute, shape = score
    found = compute({"logits": (np.random.default_rng(1).normal(size=shape) * scale).astype(np.float32)})

    assert found.shape == (shape[0],)
    assert found.dtype == np.float64
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_has_no_score_and_takes_none_from_others(
    score: tuple[Score, tuple[int, ...]], bad: float
) -> None:
    compute, shape = score
    rows = np.random.default_rng(2).random(shape, dtype=np.float32)
    whole = compute({"logits": rows})
    rows[1].flat[-1] = bad

    found = compute({"logits": rows})

    assert np.isnan(found[1])
    np.testing.assert_allclose(found[[0, 2]], whole[[0, 2]])


def test_a_row_alone_scores_as_in_a_batch(score: tuple[Score, tuple[int, ...]]) -> None:
    compute, shape = score
    rows = np.random.default_rng(3).random(shape, dtype=np.float32)

    alone = [float(compute({"logits": rows[i : i + 1]})[0]) for i in range(len(rows))]

    np.testing.assert_allclose(compute({"logits": rows}), alone, rtol=1e-12)


def test_inputs_are_not_written_to(score: tuple[Score, tuple[int, ...]]) -> None:
    compute, shape = score
    rows = np.random.default_rng(4).random(shape, dtype=np.float32)
    rows.setflags(write=False)

    compute({"logits": rows})


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_a_clear_answer_is_surer_than_one_between_classes(name: str, head: Path) -> None:
    compute = open_score(name, ScoreOptions("logits", head=head))
    clear, unclear = compute({"logits": np.array([[6.0, 0, 0, 0], [0.1, 0, 0, 0]], np.float32)})

    assert clear > unclear


@given(ROWS, st.floats(0.05, 20))
def test_the_first_is_the_largest_softmax_probability(logits: Array, temperature: float) -> None:
    rows = logits.astype(np.float64) / temperature
    exponentials = np.exp(rows - rows.max(axis=1, keepdims=True))
    largest = (exponentials / exponentials.sum(axis=1, keepdims=True)).max(axis=1)

    found = open_score("max_probability", ScoreOptions("logits", temperature))({"logits": logits})

    np.testing.assert_allclose(found, largest, rtol=1e-9)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.sampled_from([2, 5, 40])),
        elements=st.floats(-10, 10, width=32) | st.sampled_from([np.nan, np.inf, -np.inf]),
    )
)
def test_few_numbers_and_many_are_scored_alike(logits: Array) -> None:
    compute = open_score("max_probability", ScoreOptions("logits", 2.0))

    many = compute({"logits": np.tile(logits, (50, 1))})[: len(logits)]

    np.testing.assert_allclose(compute({"logits": logits}), many, rtol=1e-12)


@given(ROWS)
def test_margin_and_entropy_are_those_of_the_textbook(logits: Array) -> None:
    rows = logits.astype(np.float64)
    exponentials = np.exp(rows - rows.max(axis=1, keepdims=True))
    p = exponentials / exponentials.sum(axis=1, keepdims=True)
    ordered = np.sort(p, axis=1)
    logarithms = np.log(np.where(p > 0, p, 1.0))

    margin = open_score("margin", ScoreOptions("logits"))({"logits": logits})
    entropy = open_score("entropy", ScoreOptions("logits"))({"logits": logits})

    np.testing.assert_allclose(margin, ordered[:, -1] - ordered[:, -2], atol=1e-12)
    np.testing.assert_allclose(entropy, 1 + (p * logarithms).sum(axis=1) / np.log(CLASSES), atol=1e-9)


def test_energy_sees_how_large_the_logits_are() -> None:
    compute = open_score("energy", ScoreOptions("logits"))
    far, near = compute({"logits": np.array([[900.0, 898, 0, 0], [9.0, 7, 0, 0]], np.float32)})

    assert far > near


def test_no_boxes_are_hard() -> None:
    compute = open_score("detection", ScoreOptions("boxes"))

    assert compute({"boxes": np.zeros((2, 0), np.float32)}).tolist() == [0.0, 0.0]
    assert compute({"boxes": np.full((1, 3), -1.0, np.float32)}).tolist() == [0.0]
    assert compute({"boxes": np.array([[0.2, 0.75, -1.0]], np.float32)}) == pytest.approx([0.75])


def test_an_empty_sequence_is_hard_and_blanks_do_not_count() -> None:
    compute = open_score("sequence", ScoreOptions("tokens"))
    blank = np.zeros((1, 4, 3), np.float32)
    blank[:, :, 0] = 9.0
    mixed = blank.copy()
    mixed[0, 1] = [0.0, np.log(3.0), 0.0]  # probability 0.6

    assert compute({"tokens": blank}).tolist() == [0.0]
    assert compute({"tokens": np.zeros((2, 0, 3), np.float32)}).tolist() == [0.0, 0.0]
    assert compute({"tokens": mixed}) == pytest.approx([0.6])


def test_dear_classes_have_higher_thresholds() -> None:
    costs = (1.0, 4.0, 1.0, 2.0)
    weighted = open_score("max_probability", ScoreOptions("logits", costs=costs))
    plain = open_score("max_probability", ScoreOptions("logits"))
    logits = np.random.default_rng(5).normal(0, 2, (500, CLASSES)).astype(np.float32)

    limits = np.asarray(class_thresholds(0.8, costs))[logits.argmax(axis=1)]

    assert limits.max() == pytest.approx(0.8)
    np.testing.assert_array_equal(weighted({"logits": logits}) < 0.8, plain({"logits": logits}) < limits)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(["mean", "scale", "weight", "bias", "readout", "offset"]), st.sampled_from(["drop", "cut", "nan"])
)
def test_weights_that_do_not_fit_are_refused(head: Path, name: str, how: str) -> None:
    tensors = dict(load_file(head))
    if how == "drop":
        del tensors[name]
    elif how == "cut":
        tensors[name] = np.ascontiguousarray(tensors[name][..., :-1])
    else:
        tensors[name] = tensors[name] * np.float32(np.nan)
    broken = head.with_name("broken.safetensors")
    save_file(tensors, broken)

    with pytest.raises(BundleError, match=r"broken\.safetensors"):
        open_score("learned", ScoreOptions("logits", head=broken))


def test_weights_for_another_model_are_refused(head: Path) -> None:
    compute = open_score("learned", ScoreOptions("logits", head=head))

    with pytest.raises(BundleError, match="features"):
        compute({"logits": np.zeros((1, 9), np.float32)})


def test_there_is_no_such_score(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="max_probability"):
        open_score("luck", ScoreOptions("logits"))
    with pytest.raises(BundleError, match="weights"):
        open_score("learned", ScoreOptions("logits"))
    with pytest.raises(BundleError):
        open_score("learned", ScoreOptions("logits", head=tmp_path / "none.safetensors"))
