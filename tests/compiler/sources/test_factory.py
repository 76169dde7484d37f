"""Weights in safetensors and pickles, and the functions that make their modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from compiler.capture import CapturedModel, capture
from compiler.sources import SourceOptions
from compiler.sources.factory import source_file
from compiler.sources.pickle_file import UnpickledWarning, read_pickle
from isthmus.errors import InputError
from tests.compiler.sources.nets import SOURCE


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"words.weight": (20, 8), "head.weight": (3, 8), "head.bias": (3,)}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def source(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A file of weights, with the factories beside it."""
    (tmp_path / "nets.py").write_text(SOURCE)
    save_file(weights, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def captured(source: Path, factory: str, **options: Any) -> CapturedModel:
    return capture(source, source.parent / "out.onnx", SourceOptions(factory=factory, **options))


def check_answers(model: CapturedModel, weights: dict[str, torch.Tensor], batch: int, length: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 20, (batch, length), dtype=np.int64)
    got = onnxruntime.InferenceSession(str(model.path)).run(None, {"tokens": tokens})[0]
    table, head, bias = (weights[name].numpy() for name in ("words.weight", "head.weight", "head.bias"))
    np.testing.assert_allclose(got, table[tokens].mean(1) @ head.T + bias, atol=1e-5)


@pytest.mark.slow
def test_a_factory_makes_the_module_of_the_weights(source: Path, weights: dict[str, torch.Tensor]) -> None:
    model = captured(source, "nets.py:attribute")

    assert model.axes == {"tokens": ("batch", ""), "output": ("batch", "")}
    check_answers(model, weights, 7, 6)


@pytest.mark.slow
def test_a_factory_may_name_more_axes(source: Path, weights: dict[str, torch.Tensor]) -> None:
    model = captured(source, "nets.py:with_sequence", lengths={"sequence": (1, 9)})

    assert model.axes["tokens"] == ("batch", "sequence")
    assert model.lengths == {"batch": (1, 64), "sequence": (1, 9)}
    check_answers(model, weights, 1, 1)


@pytest.mark.slow
def test_a_module_that_works_with_one_batch_alone_is_refused(source: Path) -> None:
    with pytest.raises(InputError, match="the model works with batch = 3 alone, not with any") as caught:
        captured(source, "nets.py:fixed")

    assert "lengths = { batch = 3 }" in caught.value.hint


def test_an_importable_module_can_hold_the_factory(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source.parent / "isthmus_test_nets.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(source.parent)

    assert source_file("isthmus_test_nets:make", Path("/nowhere")) == source.parent / "isthmus_test_nets.py"
    with pytest.raises(InputError, match="RuntimeError: no such layer"):
        captured(source, "isthmus_test_nets:fails")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("", "holds weights alone; expected a factory"),
        ("nets.py", "expected module:function or file.py:function"),
        ("nets.py:", "expected module:function"),
        ("other.py:make", "there is no file .*other.py"),
        ("no_such_package.nets:make", "cannot find the module 'no_such_package.nets'"),
        ("nets.py:makes", "AttributeError"),
        ("nets.py:nothing", "expected a torch module and a mapping of example inputs"),
        ("nets.py:fails", "RuntimeError: no such layer"),
    ],
)
def test_a_factory_that_is_none_is_refused(source: Path, factory: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        captured(source, factory)


def test_weights_of_another_module_are_refused(source: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file({"words.weight": weights["words.weight"], "tail.bias": weights["head.bias"]}, source)

    with pytest.raises(InputError, match=r"missing 'head\.bias', 'head\.weight'; unknown 'tail\.bias'"):
        captured(source, "nets.py:make")


def test_weights_of_another_shape_are_refused(source: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file({**weights, "head.bias": torch.zeros(4)}, source)

    with pytest.raises(InputError, match=r"'head\.bias': the module expects \[3\], got \[4\]"):
        captured(source, "nets.py:make")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x08\x00\x00\x00\x00\x00\x00\x00{}{}{}{}"])
def test_what_is_no_safetensors_file_is_refused(source: Path, content: bytes) -> None:
    source.write_bytes(content)

    with pytest.raises(InputError, match="not a safetensors file"):
        captured(source, "nets.py:make")


@pytest.mark.slow
def test_a_pickle_is_read_when_the_recipe_says_so(source: Path, weights: dict[str, torch.Tensor]) -> None:
    path = source.with_suffix(".pt")
    torch.save(weights, path)

    with pytest.raises(InputError, match="a pickle, which can run code") as caught:
        captured(path, "nets.py:make")
    assert "allow_pickle = true" in caught.value.hint

    with pytest.warns(UnpickledWarning, match="reading a pickle"):
        model = captured(path, "nets.py:make", allow_pickle=True)
    check_answers(model, weights, 4, 6)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_weights_are_found_in_a_checkpoint(tmp_path: Path, weights: dict[str, torch.Tensor], key: str) -> None:
    torch.save({"epoch": 3, key: weights}, tmp_path / "w.pt")

    with pytest.warns(UnpickledWarning):
        read = read_pickle(tmp_path / "w.pt")

    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: tensor.tolist() for name, tensor in weights.items()
    }


@pytest.mark.parametrize("content", [[1, 2], {"a": "text"}, {1: "x"}])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")

    with pytest.warns(UnpickledWarning), pytest.raises(InputError, match="expected a state dict"):
        read_pickle(tmp_path / "w.pt")
