"""Programs of torch.export.save."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from compiler.capture import capture
from compiler.sources.pt2_archive import clean_archive
from isthmus.errors import InputError
from tests.compiler.sources.conftest import quiet


@pytest.mark.slow
def test_a_program_keeps_its_names_and_bounds(program: Path, tmp_path: Path) -> None:
    model = capture(program, tmp_path / "out.onnx")

    assert model.axes == {"images": ("batch", ""), "logits": ("batch", "")}
    assert model.lengths == {"batch": (1, 32)}
    images = np.random.default_rng(0).random((5, 8), np.float32)
    got = onnxruntime.InferenceSession(str(model.path)).run(None, {"images": images})[0]
    with quiet():
        expected = torch.export.load(program).module()(torch.from_numpy(images))["logits"]
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-6)


@pytest.mark.slow
def test_two_symbols_are_batch_and_sequence(tmp_path: Path) -> None:
    class Mean(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scaled = tokens.float() * weights
            return scaled.mean(1), scaled.reshape(-1, 2 * tokens.shape[1] // 2)

    axes = {0: torch.export.Dim("n"), 1: torch.export.Dim("t", min=2, max=16)}
    example = (torch.ones((3, 5), dtype=torch.int64), torch.rand(3, 5))
    with quiet():
        exported = torch.export.export(Mean(), example, dynamic_shapes={"tokens": axes, "weights": axes})
        torch.export.save(exported, tmp_path / "m.pt2")

    model = capture(tmp_path / "m.pt2", tmp_path / "out.onnx")

    assert model.axes["tokens"] == model.axes["weights"] == ("batch", "sequence")
    assert [spec.name for spec in model.outputs] == ["output_0", "output_1"]
    assert model.lengths["sequence"] == (1, 16)


def test_a_cleaned_archive_holds_no_pickle_and_no_path(program: Path, tmp_path: Path) -> None:
    clean_archive(program, tmp_path / "clean.pt2")

    with zipfile.ZipFile(tmp_path / "clean.pt2") as archive:
        assert archive.read("program/data/sample_inputs/model.pt") == b""
        graph = archive.read("program/models/model.json")
    assert b"stack_trace" not in graph
    assert b"conftest.py" not in graph
    with zipfile.ZipFile(program) as archive:
        names = [name for name in archive.namelist() if name.endswith("models/model.json")]
        assert b"conftest.py" in archive.read(names[0])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\xff" * 1000])
def test_what_is_no_program_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt2").write_bytes(content)

    with pytest.raises(InputError, match=r"not a file that torch\.export\.save wrote"):
        capture(tmp_path / "m.pt2", tmp_path / "out.onnx")


def test_half_a_program_is_refused(program: Path, tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(program.read_bytes()[:3000])

    with pytest.raises(InputError, match=r"not a file that torch\.export\.save wrote"):
        capture(tmp_path / "m.pt2", tmp_path / "out.onnx")
