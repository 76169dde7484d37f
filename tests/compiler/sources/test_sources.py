"""Which kind a source is, and its digest."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from compiler import sources
from compiler.sources import SOURCES, SourceOptions, digest, kind_of, resolve
from isthmus.digests import sha256_file
from isthmus.errors import InputError
from tests.compiler import models


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("model.onnx", "onnx"),
        ("folder/MODEL.ONNX", "onnx"),
        ("model.pt2", "torch-export"),
        ("model.safetensors", "safetensors"),
        ("model.pt", "pickle"),
        ("model.pth", "pickle"),
        ("models:/name/3", "mlflow"),
        ("models:/name@champion", "mlflow"),
        ("runs:/0123/model", "mlflow"),
        ("timm:resnet18", "timm"),
        ("torchvision:resnet18@w.safetensors", "torchvision"),
    ],
)
def test_a_source_is_told_by_its_name(source: str, kind: str) -> None:
    assert kind_of(source) == kind
    assert kind in SOURCES


@pytest.mark.parametrize(("name", "kind"), [("config.json", "huggingface"), ("MLmodel", "mlflow")])
def test_a_folder_is_told_by_what_it_holds(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text("{}")

    assert kind_of(tmp_path) == kind


@pytest.mark.parametrize("source", ["bert-base-uncased", "model.h5", "model", ""])
def test_what_is_no_source_is_refused_with_a_list_of_what_is(source: str) -> None:
    with pytest.raises(InputError, match=r"expected a f.*"):
        kind_of(source)


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a folder with config\.json"):
        kind_of(tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_can_be_loaded_without_its_library(name: str) -> None:
    source = sources.load_source(name)

    module, _, attribute = SOURCES[name].location.partition(":")
    assert isinstance(source, getattr(import_module(module), attribute))


def test_relative_paths_are_taken_from_the_folder_of_the_recipe(tmp_path: Path) -> None:
    assert resolve("m.onnx", tmp_path) == str(tmp_path / "m.onnx")
    assert resolve("/abs/m.onnx", tmp_path) == "/abs/m.onnx"
    assert resolve("models:/name@champion", tmp_path) == "models:/name@champion"
    assert resolve("timm:vit@w.safetensors", tmp_path) == f"timm:vit@{tmp_path / 'w.safetensors'}"


def test_the_digest_of_one_file_is_the_file_s(tmp_path: Path) -> None:
    path = models.write_cnn(tmp_path / "cnn.onnx")

    assert digest(path) == sha256_file(path)


def test_the_digest_covers_the_factory(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    (tmp_path / "nets.py").write_text("def make(): ...\n")
    options = SourceOptions(factory="nets.py:make")

    before = digest(tmp_path / "w.safetensors", options)
    (tmp_path / "nets.py").write_text("def make(): return None\n")

    assert digest(tmp_path / "w.safetensors", options) != before


@pytest.mark.slow
def test_a_digest_imports_neither_torch_nor_onnx(tmp_path: Path) -> None:
    models.write_cnn(tmp_path / "cnn.onnx")
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    (tmp_path / "nets.py").write_text("raise SystemExit\n")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"weights")
    program = (
        "import sys\nfrom compiler.sources import SourceOptions, digest\n"
        "print(digest('cnn.onnx'), digest('hf'), digest('w.safetensors', SourceOptions(factory='nets.py:make')))\n"
        "bad = {'torch', 'onnx', 'transformers', 'mlflow', 'onnxruntime'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )

    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[0] == sha256_file(tmp_path / "cnn.onnx")


@pytest.mark.parametrize("source", ["nowhere.onnx", "nowhere.pt2", "nowhere.safetensors", "timm:vit@nowhere.pt"])
def test_the_digest_of_a_missing_file_names_it(tmp_path: Path, source: str) -> None:
    with pytest.raises(InputError, match="nowhere"):
        digest(resolve(source, tmp_path), SourceOptions())


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("m.onnx", SourceOptions(task="causal-lm"), "takes no 'task'"),
        ("m.pt2", SourceOptions(factory="a:b"), "takes no 'factory'"),
        ("w.safetensors", SourceOptions(adapter=Path("a"), factory="a:b"), "takes no 'adapter'"),
        ("timm:vit", SourceOptions(factory="a:b"), "takes no 'factory'"),
        ("w.pt", SourceOptions(factory="a:b"), "a pickle, which can run code"),
    ],
)
def test_an_option_that_means_nothing_here_is_refused(source: str, options: SourceOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        digest(source, options)
