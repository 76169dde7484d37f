from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from compiler.capture import capture
from compiler.targets import BuildOptions
from compiler.targets.tvm import TvmTarget
from edge.runtimes.tvm import TvmRuntime
from isthmus.errors import BundleError, ConfigError, InputError, MissingExtraError
from tests.compiler import models

TOKENS = models.tokens(2)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tvm")
    source = models.write_encoder(folder / "source.onnx", models.encoder_weights())
    (folder / "out").mkdir()
    TvmTarget().build(capture(source, folder / "captured.onnx"), folder / "out", BuildOptions())
    return folder / "out"


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """The artefact, to be spoilt."""
    return Path(shutil.copytree(built, tmp_path / "artefact"))


def opened(folder: Path, threads: int = 1) -> TvmRuntime:
    return TvmRuntime(folder / "model.json", threads=threads, inference_precision="f32")


def change(folder: Path, **changes: Any) -> None:
    entry = folder / "model.json"
    entry.write_text(json.dumps(json.loads(entry.read_text()) | changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"platform": "aarch64"}, "wrong-platform"),
        ({"features": ["avx2", "avx1024"]}, "processor-lacks-features"),
        ({"tvm": "0.26.0"}, "wrong-runtime-version"),
        ({"weights": []}, "cannot-open"),
    ],
)
def test_a_library_for_something_else_is_refused(folder: Path, changes: dict[str, Any], reason: str) -> None:
    change(folder, **changes)

    with pytest.raises(BundleError) as caught:
        opened(folder)

    assert caught.value.reason == reason


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.so", "weights.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"\x7fELF" + b"\x00" * 4096])
def test_a_broken_file_is_refused(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)

    with pytest.raises(BundleError, match=f"cannot open {name}") as caught:
        opened(folder)

    assert caught.value.reason == "cannot-open"


@pytest.mark.slow
def test_weights_of_another_model_are_refused(folder: Path) -> None:
    weights = load_file(folder / "weights.safetensors")
    first = min(weights)

    save_file(weights | {first: weights[first][:, :1].copy()}, folder / "weights.safetensors")
    with pytest.raises(BundleError, match=f"{first}: expected FP32"):
        opened(folder)

    save_file({name: array for name, array in weights.items() if name != first}, folder / "weights.safetensors")
    with pytest.raises(BundleError, match="of other names"):
        opened(folder)


@pytest.mark.slow
def test_an_index_outside_of_the_table_is_the_callers_error(built: Path) -> None:
    runtime = opened(built)
    tokens = TOKENS.copy()
    tokens[1, 3] = models.WORDS

    with pytest.raises(InputError, match=f"indices from -{models.WORDS} to {models.WORDS - 1}, got {models.WORDS}"):
        runtime.infer({"tokens": tokens})

    tokens[1, 3] = -1
    last = TOKENS.copy()
    last[1, 3] = models.WORDS - 1
    np.testing.assert_array_equal(
        runtime.infer({"tokens": tokens})["logits"], runtime.infer({"tokens": last})["logits"]
    )


@pytest.mark.slow
def test_threads_that_call_one_after_the_other_get_the_same_answers(built: Path) -> None:
    runtime = opened(built, threads=2)
    before = os.sched_getaffinity(0)
    answers = [runtime.infer({"tokens": TOKENS})["logits"]]

    thread = threading.Thread(target=lambda: answers.append(runtime.infer({"tokens": TOKENS})["logits"]))
    thread.start()
    thread.join()

    np.testing.assert_array_equal(answers[0], answers[1])
    assert os.sched_getaffinity(0) == before  # TVM's thread pool would move the caller to one core


@pytest.mark.slow
def test_the_device_loads_neither_the_compiler_nor_torch(built: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import numpy as np; from edge.runtimes.tvm import TvmRuntime\n"
        f"runtime = TvmRuntime(Path({str(built / 'model.json')!r}), threads=1, inference_precision='f32')\n"
        "assert runtime.infer({'tokens': np.zeros((1, 8), np.int64)})['logits'].shape == (1, 3)\n"
        "assert not {'tvm', 'torch', 'compiler'} & sys.modules.keys()\n"
        "assert 'libtvm_compiler' not in Path('/proc/self/maps').read_text()\n"
    )

    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": ".:proto"})


@pytest.mark.slow
def test_another_precision_is_refused(built: Path) -> None:
    with pytest.raises(ConfigError, match="computes in f32"):
        TvmRuntime(built / "model.json", threads=1, inference_precision="bf16")


def without_apache_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)


@pytest.mark.slow
def test_the_other_project_of_the_name_is_told_apart(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_apache_tvm(monkeypatch)

    with pytest.raises(ConfigError, match="time value of money") as caught:
        opened(built)

    assert "pip uninstall tvm" in caught.value.hint


@pytest.mark.slow
def test_a_missing_library_names_the_extra(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_apache_tvm(monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(MissingExtraError) as caught:
        opened(built)

    assert caught.value.hint == "pip install 'isthmus[edge-tvm]'"
