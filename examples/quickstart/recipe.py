"""The recipe that the story hands to `isthmus compile`."""

from __future__ import annotations

import json
from os.path import relpath
from pathlib import Path

from examples.quickstart.story import Story

_TEMPLATE = """\
# {title}
[model]
name = {name}
version = {version}
labels = {labels}

[light]
source = {light}

[heavy]
source = {heavy}
target = "triton-python"
instances = 1
threads = 2

[[variants]]
target = "openvino"
precision = "int8"

[[variants]]
target = "onnxruntime"
precision = "int8"
required = false     # left out where it loses more than the guard allows

[[variants]]
target = "onnxruntime"
precision = "fp32"

[[variants]]
target = "tvm"
precision = "fp32"

[[variants]]
target = "tensorrt-rtx"  # for devices with an NVIDIA GPU; no GPU is needed to build it
precision = "fp16"

[data]
quantization = {quantization}
calibration = {calibration}

[guard]
max_accuracy_drop = {max_accuracy_drop}

[calibration]
max_escalation = {max_escalation}
delta = 0.1
"""


def write_recipe(
    path: Path, *, story: Story, version: int, light: Path, heavy: Path, samples: Path, previous: Path | None
) -> Path:
    """Write the TOML recipe of one version to `path` and return it; paths in it are relative to it."""

    def quoted(file: Path) -> str:
        return json.dumps(relpath(file, path.parent))

    text = _TEMPLATE.format(
        title=story.title,
        name=json.dumps(story.model_name),
        version=version,
        labels=json.dumps(list(story.labels)),
        light=quoted(light),
        heavy=quoted(heavy),
        quantization=quoted(samples / "quantization.safetensors"),
        calibration=quoted(samples / "calibration.safetensors"),
        max_escalation=story.max_escalation,
        max_accuracy_drop=story.max_accuracy_drop,
    )
    if previous is not None:
        text += f"\n[update]\ndelta_from = {quoted(previous)}\n"
    path.write_text(text)
    return path
