"""The delta benchmark: what it tells tools of files, its own coder, and its goals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

from benchmarks.delta import DeltaPair, ours
from benchmarks.delta.__main__ import goals
from benchmarks.delta.pairs import FORMS, names
from benchmarks.delta.spans import aligned, spans

WEIGHTS = np.arange(400, dtype=np.float32).reshape(20, 20)


def check(path: Path, expected: dict[str, bytes]) -> None:
    data = path.read_bytes()
    found = {span.name: data[span.offset : span.offset + span.size] for span in spans(path)}
    assert {name: found[name] for name in expected} == expected


def test_tensors_of_safetensors_are_found(tmp_path: Path) -> None:
    save_file({"a": WEIGHTS, "b": WEIGHTS.astype(np.int8)}, tmp_path / "x.safetensors")

    check(tmp_path / "x.safetensors", {"a": WEIGHTS.tobytes(), "b": WEIGHTS.astype(np.int8).tobytes()})


def test_tensors_of_onnx_are_found_inside_branches_too(tmp_path: Path) -> None:
    inner = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(WEIGHTS + 1))
    branch = helper.make_graph([inner], "b", [], [helper.make_tensor_value_info("c", 1, [20, 20])])
    node = helper.make_node("If", ["which"], ["y"], then_branch=branch, else_branch=branch)
    ends = [helper.make_tensor_value_info(*end) for end in (("which", 9, []), ("y", 1, [20, 20]))]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [numpy_helper.from_array(WEIGHTS, "w")])
    onnx.save(helper.make_model(graph), tmp_path / "x.onnx")

    check(tmp_path / "x.onnx", {"w": WEIGHTS.tobytes(), "y.then_branch/c.value": (WEIGHTS + 1).tobytes()})


def test_tensors_of_openvino_are_found(tmp_path: Path) -> None:
    x = openvino.opset13.parameter([1, 20], np.float32, name="x")
    constant = openvino.opset13.constant(WEIGHTS, name="w")
    model = openvino.Model([openvino.opset13.matmul(x, constant, False, False)], [x])
    openvino.save_model(model, str(tmp_path / "x.xml"), compress_to_fp16=False)

    check(tmp_path / "x.bin", {"w": WEIGHTS.tobytes()})


def test_only_tensors_that_both_have_are_aligned(tmp_path: Path) -> None:
    save_file({"a": WEIGHTS, "b": WEIGHTS, "c": WEIGHTS}, tmp_path / "old.safetensors")
    save_file({"a": WEIGHTS, "b": WEIGHTS[1:], "d": WEIGHTS}, tmp_path / "new.safetensors")

    found = aligned(tmp_path / "old.safetensors", tmp_path / "new.safetensors")

    assert [(dtype, size) for dtype, _, _, size in found] == [("f32", WEIGHTS.nbytes)]


def test_every_update_comes_in_every_form() -> None:
    made = names()

    assert len(set(made)) == len(made)
    for form in FORMS:
        assert f"minilm-{form}-full" in made
        assert f"cells-{form}-continued" in made


def test_our_own_figures_are_those_of_the_codec(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old = rng.integers(-100, 100, 200_000).astype(np.int8)
    new = old + (rng.random(old.size) < 0.05).astype(np.int8)
    paths = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    for path, weights in zip(paths, (old, new), strict=True):
        save_file({"w": weights}, path)

    figures = ours.measure(DeltaPair("p", "f", "u", *paths), 1)

    assert 0 < figures["bytes"] < old.size / 10
    assert figures["make_s"] > 0
    assert figures["apply_s"] > 0
    assert 0 <= figures["peak_mib"] < 200


def row(pair: str, tool: str, size: int | None, speed: float = 100.0) -> dict[str, Any]:
    return {"pair": pair, "tool": tool, "bytes": size, "make_mb_per_s": speed, "apply_mb_per_s": speed}


def test_goals_compare_with_the_best_of_each_kind() -> None:
    pair = "minilm-int8-onnx-full"
    sizes = {"isthmus": 80, "fm-delta": 100, "bsdiff4": 110, "hdiffpatch": 120, "zipnn": 90, "xdelta3": None}

    found = {goal.goal: goal for goal in goals([row(pair, tool, size) for tool, size in sizes.items()])}

    assert found[f"{pair}: ours / zipnn, the best of all"].value == pytest.approx(0.8889)
    assert found[f"{pair}: ours / fm-delta"].value == 0.8
    assert found[f"{pair}: ours / bsdiff4, the best byte tool"].value == pytest.approx(0.7273)
    assert found[f"100 MB/s / apply, int8, slowest: {pair}"].value == 1.0
    assert found[f"5 MB/s / make, slowest: {pair}"].holds
    assert all(goal.holds for goal in found.values())


def test_goals_of_single_precision_ask_for_less_and_releases_for_the_least() -> None:
    rows = [row(pair, tool, size) for pair in ("minilm-fp32-safetensors-full", "silero-vad-6.1-6.2-onnx")
            for tool, size in (("isthmus", 90), ("fm-delta", 100))]  # fmt: skip

    found = goals(rows)

    assert [goal.limit for goal in found if "/ fm-delta" in goal.goal and "best of all" not in goal.goal] == [0.95]
    assert sum("best of all" in goal.goal for goal in found) == 2
