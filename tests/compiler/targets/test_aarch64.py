"""The variants for Arm devices, computed on an emulated one by the device's own adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from compiler.capture import CapturedModel, capture
from compiler.targets import BuildOptions, load_target
from isthmus.tensors import Array
from tests.aarch64 import device
from tests.compiler import models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(device.what_is_missing()), reason=device.what_is_missing() or "nothing"),
]
RUNTIMES = ("tvm", "onnxruntime", "openvino")
MODELS = ("encoder", "cnn")
INPUTS: dict[str, dict[str, Array]] = {
    "encoder": {"tokens": models.tokens(5)},
    "cnn": {"image": np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CapturedModel]:
    folder = tmp_path_factory.mktemp("sources")
    encoder = models.write_encoder(folder / "encoder.onnx", models.encoder_weights())
    cnn = models.write_cnn(folder / "cnn.onnx")
    return {path.stem: capture(path, folder / f"captured-{path.stem}.onnx") for path in (encoder, cnn)}


def build(name: str, model: CapturedModel, folder: Path, platform: str = "aarch64") -> Path:
    folder.mkdir()
    return folder / load_target(name, role="light").build(model, folder, BuildOptions(platform=platform)).entry


@pytest.fixture(scope="module")
def on_arm(sources: dict[str, CapturedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Array]:
    """The logits of every model in every runtime; one emulated process, since starting it takes the longest."""
    folder = tmp_path_factory.mktemp("arm")
    cells = [(runtime, model) for runtime in RUNTIMES for model in MODELS]
    jobs = [
        device.Job(runtime, build(runtime, sources[model], folder / f"{runtime}-{model}"), INPUTS[model])
        for runtime, model in cells
    ]
    return {cell: outputs["logits"] for cell, outputs in zip(cells, device.infer(jobs, folder), strict=True)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_arm_computes_what_the_source_says(
    sources: dict[str, CapturedModel], on_arm: dict[tuple[str, str], Array], runtime: str, model: str
) -> None:
    source = onnxruntime.InferenceSession(str(sources[model].path)).run(None, INPUTS[model])[0]

    np.testing.assert_allclose(on_arm[runtime, model], source, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_tvm_on_arm_agrees_with_tvm_on_x86(
    sources: dict[str, CapturedModel], on_arm: dict[tuple[str, str], Array], tmp_path: Path, model: str
) -> None:
    entry = build("tvm", sources[model], tmp_path / "x86", "x86_64")
    here = load_target("tvm", role="light").open(entry, threads=1).infer(INPUTS[model])["logits"]

    np.testing.assert_allclose(on_arm["tvm", model], here, atol=1e-4, rtol=1e-4)
