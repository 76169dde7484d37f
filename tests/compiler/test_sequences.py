"""Sequences are calibrated as classes are: the same promises, the same refusals; a sequence is right as a whole."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from typer.testing import CliRunner

from compiler.calibrate import Answers, Wish, calibrate, score_rows
from compiler.evaluate import correct, route
from compiler.evaluate_cli import app
from compiler.operating_point import TooFewSamplesError
from compiler.pipeline import compile_bundle
from compiler.recipe import load_recipe
from edge.agreement import count_agreement
from edge.model import open_model
from isthmus.bundle import OperatingPoint, parse_calibration
from isthmus.errors import InputError
from isthmus.tensors import Array

POSITIONS, TOKENS, REPEATS, LONGEST = 20, 8, 3, 5
RECIPE = """\
[model]
name = "reader"
version = 1
[light]
source = "light.onnx"
[heavy]
source = "heavy.onnx"
[[variants]]
target = "onnxruntime"
[data]
calibration = "calibration.safetensors"
[guard]
metric = "{metric}"
[measure]
enabled = false
[calibration]
{calibration}
"""
RISK = 'score = "sequence"\nmax_risk = 0.15\ndelta = 0.1'


def sequences(count: int, seed: int) -> tuple[Array, Array]:
    """Return noisy frames [rows, positions, tokens], and what they say: each token for a few frames, then a blank."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((count, LONGEST), np.int64)
    best = np.zeros((count, POSITIONS), np.int64)
    for row in range(count):
        said = rng.integers(1, TOKENS, rng.integers(1, LONGEST + 1))
        labels[row, : len(said)] = said
        for place, token in enumerate(said):
            best[row, place * (REPEATS + 1) : place * (REPEATS + 1) + REPEATS] = token
    noise = rng.uniform(0.2, 1.1, (count, 1, 1)) * rng.normal(size=(count, POSITIONS, TOKENS))
    return (3 * np.eye(TOKENS)[best] + noise).astype(np.float32), labels


def write_model(path: Path, smoothing: float) -> None:
    """Write a model that adds a share of each frame's neighbours: more of it reads more of the noisy ones."""
    mixed = np.eye(POSITIONS, dtype=np.float32)
    for place in range(POSITIONS // (REPEATS + 1)):
        start = place * (REPEATS + 1)
        mixed[start : start + REPEATS, start : start + REPEATS] += np.float32(smoothing)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["mixed", "x"], ["logits"])],
        path.stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", POSITIONS, TOKENS])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", POSITIONS, TOKENS])],
        [numpy_helper.from_array(mixed, "mixed")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def workspace(folder: Path, *, rows: int = 1500, labels: Array | None = None, **changes: Any) -> Path:
    x, truth = sequences(rows, seed=1)
    save_file({"x": x, "labels": truth if labels is None else labels}, folder / "calibration.safetensors")
    write_model(folder / "light.onnx", 0.0)
    write_model(folder / "heavy.onnx", 1.0)
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(**{"calibration": RISK, "metric": "accuracy"} | changes))
    return recipe


def read(smoothing: float, x: Array) -> Array:
    mixed = np.kron(np.eye(POSITIONS // (REPEATS + 1)), np.pad(np.ones((REPEATS, REPEATS)), (0, 1)))
    return ((np.eye(POSITIONS) + smoothing * mixed) @ x).astype(np.float32)


def test_a_reader_compiles_with_a_promise_that_holds_on_other_rows(tmp_path: Path) -> None:
    outcome = compile_bundle(workspace(tmp_path), tmp_path / "bundle")

    record = parse_calibration((tmp_path / "bundle" / "calibration.json").read_bytes())
    assert (record.score, record.decoding, record.output) == ("sequence", "ctc", "logits")
    point = record.variants["onnxruntime-fp32"]
    assert point.samples == 1500 - record.data.fitted
    assert (point.temperature, point.fusion) == (1.0, None)
    assert outcome.report.light_accuracy < outcome.report.heavy_accuracy
    assert point.edge_accuracy == pytest.approx(outcome.report.light_accuracy)
    assert 0.0 < point.escalation_rate < 1.0

    x, labels = sequences(4000, seed=2)
    live = open_model(tmp_path / "bundle", "onnxruntime-fp32")
    outputs = asyncio.run(live.infer({"x": x[:1]}))
    scores = score_rows({"logits": read(0.0, x)}, "logits", 1.0, Wish(record.operating_point, score="sequence"))
    assert live.score(outputs) == pytest.approx(scores[0])
    live.retire()
    kept = ~route(scores, point.threshold)
    right = correct(read(0.0, x), labels, "ctc")
    assert (~right[kept]).mean() <= 0.15 < (~right).mean()


def test_a_reader_is_evaluated(tmp_path: Path) -> None:
    compile_bundle(workspace(tmp_path), tmp_path / "bundle")
    x, labels = sequences(500, seed=3)
    save_file({"x": x, "labels": labels}, tmp_path / "test.safetensors")

    words = [str(tmp_path / "bundle"), str(tmp_path / "test.safetensors"), "--draws", "20", "--json"]
    result = CliRunner().invoke(app, words)

    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["light_accuracy"] == pytest.approx(correct(read(0.0, x), labels, "ctc").mean())
    assert told["light_accuracy"] < told["policies"]["threshold"]["accuracy"]["value"]
    assert set(told["scores"]) == {"sequence, as calibrated", "random", "oracle"}
    gap = {name: figures["apgr"]["value"] for name, figures in told["scores"].items()}
    assert gap["random"] < gap["sequence, as calibrated"] < gap["oracle"]


@pytest.mark.slow
def test_the_risk_bound_is_broken_no_more_often_than_promised() -> None:
    x, labels = sequences(40_000, seed=4)
    light, heavy = read(0.0, x), read(1.0, x)
    point = OperatingPoint(kind="max_risk", value=0.15, delta=0.1)
    wish = Wish(point, score="sequence")
    scores = score_rows({"logits": light}, "logits", 1.0, wish)
    wrong = ~correct(light, labels, "ctc")
    rng, rounds, broken = np.random.default_rng(5), 200, 0
    for _ in range(rounds):
        rows = rng.choice(len(x), 400, replace=False)
        record = calibrate(Answers({"logits": light[rows]}, heavy[rows], labels[rows], decoding="ctc"), wish)
        broken += bool(wrong[~route(scores, record.threshold)].mean() > point.value)
    assert broken / rounds <= point.delta + 3 * math.sqrt(point.delta * (1 - point.delta) / rounds)


def test_data_that_cannot_support_the_promise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TooFewSamplesError, match=r"cannot support 'at most 0.001 of the edge's answers wrong"):
        compile_bundle(workspace(tmp_path, rows=200, calibration=RISK.replace("0.15", "0.001")), tmp_path / "bundle")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(1500, np.int64), r"expected int64\[1500, tokens\], got int64\[1500\]"),
        (np.full((1500, 2), TOKENS, np.int64), r"expected tokens 0 to 7, got 8 to 8"),
        (np.tile(np.array([[1, 0, 2]], np.int64), (1500, 1)), r"got a token after a 0"),
    ],
)
def test_labels_that_are_no_sequences_are_refused(tmp_path: Path, labels: Array, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compile_bundle(workspace(tmp_path, labels=labels), tmp_path / "bundle")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": 'score = "detection"'}, "'detection' cannot be calibrated: what a right answer is"),
        ({"calibration": 'decoding = "ctc"'}, "decoding is how sequences are read"),
        ({"calibration": RISK + "\nclass_costs = { a = 2 }"}, "class_costs are of classes"),
        ({"metric": "macro-f1"}, "sequences are right or wrong"),
    ],
)
def test_what_is_not_for_sequences_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(workspace(tmp_path, **changes))


def test_a_class_is_no_sequence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"one logit per class, got 'logits'"):
        compile_bundle(workspace(tmp_path, calibration="max_escalation = 0.3"), tmp_path / "bundle")


def test_models_agree_on_what_is_said_wherever_they_heard_it() -> None:
    light = np.eye(TOKENS, dtype=np.float32)[[[1, 0, 2, 0], [1, 0, 2, 0], [1, 1, 0, 0]]]
    heavy = np.eye(TOKENS, dtype=np.float32)[[[0, 1, 1, 2], [0, 1, 1, 3], [1, 0, 1, 0]]]
    assert count_agreement(light, heavy, "ctc") == (1, 3)
    light[0, 0, 0] = np.nan
    assert count_agreement(light, heavy, "ctc") == (0, 3)
