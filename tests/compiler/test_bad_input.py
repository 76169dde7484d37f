"""What people get wrong, through the whole pipeline: the message names the field or file, and nothing is left."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from compiler.pipeline import compile_bundle
from compiler.processes import Budget
from isthmus.errors import IsthmusError
from tests.compiler import models
from tests.compiler.conftest import ALL, fill_workspace, write_recipe

pytestmark = pytest.mark.slow

ORT = '[[variants]]\ntarget = "onnxruntime"\n'
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A change to a workspace that works, and what is said of it."""

    name: str
    change: Change
    message: str
    hint: str = ""
    code: int = 2


def recipe(old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / "recipe.toml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def data(file: str = "calibration", **tensors: Any) -> Change:
    """Replace tensors of a data file; None removes one."""

    def change(folder: Path) -> None:
        path = folder / f"{file}.safetensors"
        whole = load_file(path) | tensors
        path.unlink()
        save_file({name: array for name, array in whole.items() if array is not None}, path)

    return change


def light(write: Callable[[Path], object]) -> Change:
    def change(folder: Path) -> None:
        (folder / "light-v1.onnx").unlink()
        write(folder / "light-v1.onnx")

    return change


def edited(edit: Callable[[Any], object]) -> Change:
    """Load the light model, edit it, write it back."""

    def change(folder: Path) -> None:
        model = onnx.load(folder / "light-v1.onnx")
        edit(model)
        (folder / "light-v1.onnx").unlink()
        (folder / "light-v1.onnx").write_bytes(model.SerializeToString())

    return change


def source(file: str, content: bytes, more: str = "") -> Change:
    """Make another file the light source."""

    def change(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
        name = Path(file).parts[0] if "/" in file else file
        recipe('source = "light-v1.onnx"', f'source = "{name}"\n{more}')(folder)

    return change


def truncated(folder: Path) -> None:
    whole = (folder / "light-v1.onnx").read_bytes()
    (folder / "light-v1.onnx").unlink()
    (folder / "light-v1.onnx").write_bytes(whole[: len(whole) // 2])


def external(location: str) -> Change:
    """Say that a weight lies in another file."""

    def edit(model: Any) -> None:
        tensor = next(entry for entry in model.graph.initializer if entry.name == "head")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return edited(edit)


def opset(number: int) -> Change:
    return edited(lambda model: setattr(model.opset_import[0], "version", number))


def operator(kind: str, domain: str = "") -> Change:
    """Put one more operator of this kind behind the logits."""

    def edit(model: Any) -> None:
        model.graph.node[-1].output[0] = "inner"
        model.graph.node.append(helper.make_node(kind, ["inner"], ["logits"], name="strange", domain=domain))
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))

    return edited(edit)


def write_recurrent(path: Path) -> None:
    """A model with a loop, which TVM cannot take."""
    body = helper.make_graph(
        [helper.make_node("Add", ["carried", "carried"], ["next"], name="double"),
         helper.make_node("Identity", ["going"], ["on"], name="go")],
        "body",
        [helper.make_tensor_value_info("round", TensorProto.INT64, []),
         helper.make_tensor_value_info("going", TensorProto.BOOL, []),
         helper.make_tensor_value_info("carried", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []),
         helper.make_tensor_value_info("next", TensorProto.FLOAT, None)],
    )  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["words", "tokens"], ["embedded"], name="embed"),
        helper.make_node("ReduceMean", ["embedded"], ["pooled"], name="pool", axes=[1], keepdims=0),
        helper.make_node("ReduceSum", ["tokens"], ["rounds"], name="count", keepdims=0),
        helper.make_node("Loop", ["rounds", "", "pooled"], ["logits"], name="again", body=body),
    ]
    inputs = [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", models.TOKENS])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", models.CLASSES])]
    words = numpy_helper.from_array(np.zeros((models.WORDS, models.CLASSES), np.float32), "words")
    graph = helper.make_graph(nodes, "loop", inputs, outputs, [words])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def several(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


LABELS = np.zeros(400, np.int64)
TOKENS = models.tokens(400)
CASES = [
    # the recipe
    Case("typing error", recipe("[guard]", "[gaurd]"), "gaurd: there is no such field", "did you mean guard?"),
    Case("unknown target", recipe('"onnxruntime"', '"openvin"'), "unknown target 'openvin'", "did you mean openvino?"),
    Case("unknown precision", recipe(ORT, ORT + 'precision = "int7"\n'), "variants.0.precision"),
    Case("precision a target lacks", recipe(ORT, ORT + 'precision = "int4"\n'), "has no precision 'int4'; it has fp32"),
    Case("variant twice", recipe(ORT, ORT + ORT), "variants must differ"),
    Case("heavy target as a variant", recipe('"onnxruntime"', '"triton-python"'), "name it as heavy.target"),
    Case("light target as the heavy one", recipe("threads = 1", 'target = "tvm"'), "'tvm' is for the light model"),
    Case(
        "int8 without samples",
        several(recipe(ORT, ORT + 'precision = "int8"\n'), recipe('quantization = "quantization.safetensors"', "")),
        "data.quantization is needed",
    ),
    Case("unknown setting", recipe(ORT, ORT + 'setting = "turbo"\n'), "has no setting 'turbo'", "leave the setting"),
    Case("unknown platform", recipe(ORT, ORT + 'platform = "aarch64"\n'), "has no platform 'aarch64'; it has any"),
    Case("unknown metric", recipe("[guard]", '[guard]\nmetric = "charm"'), "guard: metric: expected one of accuracy"),
    Case("not TOML", recipe("[model]", "[model"), "not a TOML document"),
    Case("labels that do not fit", recipe('["a", "b", "c"]', '["a", "b"]'), "has 3 classes, model.labels has 2"),
    Case("no such output", recipe("[data]", '[calibration]\noutput = "scores"\n[data]'), "got 'scores'; the model has"),
    Case(
        "no such axis",
        recipe("[heavy]", "lengths = { width = 3 }\n[heavy]"),
        "lengths.width: the model has no such axis; those that may vary are batch",
    ),
    Case(
        "no such input to bake in",
        recipe("[heavy]", "constants = { rate = 3 }\n[heavy]"),
        "there is no input 'rate'; there are tokens",
    ),
    # the models
    Case("no such model", lambda folder: (folder / "light-v1.onnx").unlink(), "light-v1.onnx: No such file"),
    Case("an empty file", light(lambda path: path.write_bytes(b"")), "light-v1.onnx: not an ONNX file: it is empty"),
    Case("half a file", truncated, "is the file cut short?"),
    Case(
        "a picture", light(lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" * 90)), "light-v1.onnx: not an ONNX file"
    ),
    Case(
        "weights that are missing",
        external("weights.bin"),
        "weights: expected a file in the model's folder, got 'weights.bin'",
    ),
    Case(
        "weights outside of the folder", external("../../etc/passwd"), "in the model's folder, got '../../etc/passwd'"
    ),
    Case("weights at an absolute path", external("/etc/passwd"), "in the model's folder, got '/etc/passwd'"),
    Case("an opset of long ago", opset(7), "expected an opset from 11 to 26, got 7"),
    Case("an opset to come", opset(999), "expected an opset from 11 to 26, got 999"),
    Case(
        "an unknown operator", operator("Frobnicate"), "node 'strange': there is no operator 'Frobnicate' in opset 17"
    ),
    Case(
        "an operator of an unknown domain",
        operator("Swizzle", "com.example"),
        "node 'strange': there is no operator 'com.example.Swizzle'",
    ),
    Case("other inputs than the heavy model", light(models.write_cnn), "must have the same inputs"),
    Case("a pickle", source("light.pt", b"\x80\x04K\x01."), "light.pt: a pickle, which can run code", "allow_pickle"),
    Case(
        "weights without a graph",
        source("light.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"),
        "expected a factory that makes the module",
        "factory =",
    ),
    Case("a folder without a model", source("folder/readme.txt", b"hello"), "expected a folder with config.json"),
    Case(
        "no such kind of file",
        source("light.h5", b"x"),
        "light.h5: expected a file .onnx, .pt2,",
        "nothing is downloaded",
    ),
    Case(
        "a loop for TVM",
        several(light(write_recurrent), recipe('"onnxruntime"', '"tvm"')),
        "operator Loop (node 'again')",
        "onnxruntime",
    ),
    # the data
    Case(
        "no such data",
        lambda folder: (folder / "calibration.safetensors").unlink(),
        "calibration.safetensors",
        "safetensors files",
    ),
    Case(
        "data of another kind",
        lambda folder: _overwrite(folder / "calibration.safetensors", b"a,b\n1,2\n"),
        "calibration.safetensors: not a safetensors file",
    ),
    Case("a tensor that is missing", data(tokens=None), "missing tensor 'tokens'; the file has labels"),
    Case("no labels", data(labels=None), "missing tensor 'labels'"),
    Case("another datatype", data(tokens=TOKENS.astype(np.int32)), "'tokens': expected int64[samples, 8], got int32"),
    Case("another shape", data(tokens=TOKENS[:, :5].copy()), "got int64[400, 5]"),
    Case("too few labels", data(labels=LABELS[:9]), "'labels': expected int64[400], got int64[9]"),
    Case("a label too many", data(labels=LABELS + 3), "expected classes 0 to 2, got 3 to 3"),
    Case(
        "too few samples",
        data(tokens=TOKENS[:12], labels=LABELS[:12]),
        "calibration samples cannot support",
        "labelled samples",
        6,
    ),
    Case("no sample at all", data(tokens=TOKENS[:0], labels=LABELS[:0]), "got int64[0, 8]"),
    Case(
        "samples for quantization of another shape",
        several(recipe(ORT, ALL), data("quantization", tokens=TOKENS[:, :3].copy())),
        "got int64[400, 3]",
    ),
]


def _overwrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace that compiles, and has been: its cache holds both models and the heavy one's answers."""
    folder = tmp_path_factory.mktemp("good")
    fill_workspace(folder)
    compile_bundle(write_recipe(folder, variants=ORT), folder / "out")
    return folder


@pytest.fixture
def workspace(good: Path, tmp_path: Path) -> Path:
    for path in good.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    return tmp_path


def failure(folder: Path, cache: Path, **more: Any) -> IsthmusError:
    with pytest.raises(IsthmusError) as caught:
        compile_bundle(folder / "recipe.toml", folder / "bundle", cache=cache, **more)
    return caught.value


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input_is_named_and_leaves_nothing(case: Case, workspace: Path, good: Path) -> None:
    case.change(workspace)
    before = set(workspace.rglob("*"))

    error = failure(workspace, good / ".compile-cache")

    assert case.message in error.message
    assert case.hint in error.hint
    assert error.exit_code == case.code
    assert len(error.message) < 1000
    assert "Traceback" not in error.message
    assert set(workspace.rglob("*")) == before


def test_values_that_are_not_numbers_are_refused(workspace: Path, tmp_path: Path) -> None:
    image = np.ones((40, 1, 8, 8), np.float32)
    image[7, 0, 3, 3] = np.nan
    for name in ("light-v1.onnx", "heavy.onnx", "calibration.safetensors"):
        (workspace / name).unlink()
    for name in ("light-v1.onnx", "heavy.onnx"):
        models.write_cnn(workspace / name)
    save_file({"image": image, "labels": np.zeros(40, np.int64)}, workspace / "calibration.safetensors")

    error = failure(workspace, tmp_path / "cache")

    assert "calibration.safetensors: 'image' holds values that are not finite" in error.message


def test_a_missing_extra_is_named(workspace: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "compiler.targets.tvm", raising=False)
    monkeypatch.setitem(sys.modules, "tvm", None)
    recipe('"onnxruntime"', '"tvm"')(workspace)

    error = failure(workspace, good / ".compile-cache")

    assert "what target 'tvm' needs" in error.message
    assert error.hint == "pip install 'isthmus[tvm]'"


def test_too_little_memory_is_said_with_what_there_was(workspace: Path, tmp_path: Path) -> None:
    error = failure(workspace, tmp_path / "cache", budget=Budget(cores=2, memory=20 << 20, jobs=2))

    assert "needs more than the 0.0195 GiB that may be used" in error.message
    assert "--memory" in error.hint
    assert error.exit_code == 2
    assert not (workspace / "bundle").exists()


def test_something_else_at_the_output_is_kept(workspace: Path, good: Path) -> None:
    (workspace / "bundle").mkdir()
    (workspace / "bundle" / "thesis.tex").write_text("years of work")

    error = failure(workspace, good / ".compile-cache")

    assert "exists and is not a bundle" in error.message
    assert error.exit_code == 3
    assert (workspace / "bundle" / "thesis.tex").read_text() == "years of work"
