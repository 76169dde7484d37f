"""Tiny models learn, repeat themselves, and export to ONNX graphs that answer as torch does."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from rich.progress import Progress

from examples.quickstart.datasets import Array, DatasetError, Split, Splits
from examples.quickstart.meter import LIGHT_BLOCKS, MeterStory, SeriesClassifier
from examples.quickstart.minilm import EncoderShape, MiniLmClassifier, WeightsError
from examples.quickstart.news import NewsStory
from examples.quickstart.training import (
    Examples,
    Schedule,
    TrainingError,
    export_onnx,
    fit,
    fix_seed,
    gold_targets,
    join,
    load_checkpoint,
    predict,
    save_checkpoint,
    soft_targets,
    to_tensors,
)

QUIET = Progress(disable=True)
SHAPE = EncoderShape(vocabulary=50, positions=12, hidden=16, intermediate=32, heads=4, layers=2)


def texts(count: int, tokens: int = 12) -> dict[str, Array]:
    random = np.random.default_rng(0)
    lengths = random.integers(2, tokens + 1, count)
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    return {"input_ids": random.integers(1, 50, (count, tokens)) * mask, "attention_mask": mask}


def series(count: int) -> Split:
    random = np.random.default_rng(0)
    labels = random.integers(0, 7, count)
    wave = np.sin(np.arange(96)[None] * (labels[:, None] + 1) / 8)
    noisy = wave + random.normal(0, 0.1, wave.shape)
    return Split({"series": noisy[:, None].astype(np.float32)}, labels)


def encoder(shape: EncoderShape = SHAPE) -> MiniLmClassifier:
    fix_seed(0)
    return MiniLmClassifier(shape, classes=3).eval()


def run_onnx(path: Path, inputs: dict[str, Array]) -> Array:
    return np.asarray(onnxruntime.InferenceSession(str(path)).run(["logits"], inputs)[0])


def test_training_learns_and_repeats_itself() -> None:
    split = series(210)
    examples = Examples(to_tensors(split.inputs), gold_targets(split.labels, 7))
    answers = []
    for _ in range(2):
        fix_seed(0)
        model = SeriesClassifier(LIGHT_BLOCKS, 7)
        fit(model, examples, Schedule(epochs=8, batch=16, body_rate=1e-2, head_rate=1e-2), QUIET, "test")
        answers.append(predict(model, split.inputs))
    assert (answers[0].argmax(1) == split.labels).mean() > 0.9
    assert np.array_equal(answers[0], answers[1])


def test_frozen_parts_do_not_move() -> None:
    model = encoder()
    model.freeze_bottom(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = to_tensors(texts(20))
    examples = Examples(inputs, gold_targets(np.arange(20) % 3, 3), lengths=inputs["attention_mask"].sum(dim=1))
    fit(model, examples, Schedule(epochs=2, batch=4, body_rate=1e-2, head_rate=1e-2), QUIET, "test")
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith(("layers.1.", "head.")) for name in moved)


def test_padding_changes_no_answer() -> None:
    inputs = texts(6)
    other = {**inputs, "input_ids": np.where(inputs["attention_mask"] == 1, inputs["input_ids"], 7)}
    assert np.allclose(predict(encoder(), inputs), predict(encoder(), other), atol=1e-6)


def test_light_model_looks_at_its_first_tokens_only() -> None:
    light = encoder(SHAPE.slice(layers=1, positions=5))
    inputs = texts(6)
    cut = {name: array[:, :5] for name, array in inputs.items()}
    assert np.allclose(predict(light, inputs), predict(light, cut), atol=1e-6)


def test_onnx_answers_as_torch_whatever_the_order_of_arrays(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = encoder(SHAPE.slice(layers=1, positions=5))
    inputs = texts(5)
    level = logging.getLogger("torch.onnx").level
    export_onnx(model, dict(reversed(inputs.items())), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == level
    for count in (1, 5):
        few = {name: array[:count] for name, array in inputs.items()}
        assert np.allclose(run_onnx(tmp_path / "model.onnx", few), predict(model, few), atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_export_refuses_inputs_the_model_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="attention_mask"):
        export_onnx(encoder(), {"input_ids": np.zeros((2, 12), dtype=np.int64)}, tmp_path / "model.onnx")


def test_both_light_versions_are_one_graph(tmp_path: Path) -> None:
    split = series(70)
    splits = Splits(split, split, split, split, split)
    story = MeterStory()
    checkpoint = tmp_path / "light.safetensors"
    story.train_light(splits, tmp_path / "1.onnx", checkpoint, QUIET)
    answers = np.eye(7, dtype=np.float32)[split.labels] * 9
    story.train_light_update(splits, checkpoint, split.inputs, answers, tmp_path / "2.onnx", QUIET)
    graphs = [onnx.load(str(tmp_path / name)).graph for name in ("1.onnx", "2.onnx")]
    nodes = [[(n.name, n.op_type, list(n.input), list(n.output)) for n in graph.node] for graph in graphs]
    assert nodes[0] == nodes[1]
    assert [i.name for i in graphs[0].initializer] == [i.name for i in graphs[1].initializer]
    assert run_onnx(tmp_path / "2.onnx", dict(split.inputs)).shape == (70, 7)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save_checkpoint(encoder(), tmp_path / "weights")
    load_checkpoint(encoder(), tmp_path / "weights")
    with pytest.raises(TrainingError, match="cannot take the weights"):
        load_checkpoint(SeriesClassifier(LIGHT_BLOCKS, 7), tmp_path / "weights")


def test_news_story_wants_to_be_prepared_first(tmp_path: Path) -> None:
    split = Split(texts(5), np.zeros(5, dtype=np.int64))
    with pytest.raises(DatasetError, match="call prepare"):
        NewsStory().train_heavy(Splits(split, split, split, split, split), tmp_path / "heavy.onnx", QUIET)


def test_missing_encoder_weight_is_named() -> None:
    with pytest.raises(WeightsError, match=r"weight embeddings.word.weight: expected shape \[50, 16\], got nothing"):
        encoder().load_encoder({})


@pytest.mark.parametrize("config", [b"", b"{}", b"[]", b'{"model_type": "gpt2", "hidden_act": "gelu"}'])
def test_bad_encoder_config_is_refused(config: bytes) -> None:
    with pytest.raises(WeightsError):
        EncoderShape.parse(config)


def test_bad_targets_are_refused() -> None:
    with pytest.raises(TrainingError, match="labels from 0 to 2, got 0 to 3"):
        gold_targets(np.array([0, 3]), 3)
    with pytest.raises(TrainingError, match=r"shape \[samples, 3\], got \[2, 4\]"):
        soft_targets(np.zeros((2, 4), dtype=np.float32), 3)
    with pytest.raises(TrainingError, match="not finite"):
        soft_targets(np.full((2, 3), np.nan, dtype=np.float32), 3)


def test_training_sets_of_unlike_inputs_are_not_joined() -> None:
    first = Examples({"series": torch.zeros(2, 1, 96)}, torch.ones(2, 7))
    second = Examples({"series": torch.zeros(2, 1, 48)}, torch.ones(2, 7))
    with pytest.raises(TrainingError, match="the same inputs"):
        join(first, second)
