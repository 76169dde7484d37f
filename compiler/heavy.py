"""The heavy model's answers to the calibration data.

A new version of the light model is usually calibrated against the same heavy one. Its answers depend on the model, the
data and ONNX Runtime's version only, so they are kept in the cache under a key made from these.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import load_file, save_file

from compiler.cache import Cache, key, tool_versions
from compiler.capture import CapturedModel
from compiler.data import LabelledSamples, run_over
from compiler.evaluate import Logits
from compiler.targets.onnxruntime import OnnxRunner
from compiler.verify import check_source
from isthmus.digests import sha256_file

BATCH: Final = 64
_FILE: Final = "logits.safetensors"


def heavy_logits(
    model: CapturedModel,
    data: LabelledSamples,
    output: str,
    cache: Cache,
    advance: Callable[[int, int], None],
    *,
    threads: int,
) -> Logits:
    """Return the model's logits for all samples, from the cache where they are there.

    Raises:
        VerificationError: The model's outputs are not what its file declares.
    """

    def run(folder: Path) -> None:
        outputs = run_over(
            OnnxRunner(model.path, threads=threads).infer, model, data.inputs, batch=BATCH, advance=advance
        )
        check_source(outputs, model, len(data), what="heavy")
        save_file({"logits": np.ascontiguousarray(outputs[output])}, folder / _FILE)

    parts = key(model=sha256_file(model.path), data=data.sha256, output=output, tools=tool_versions(["onnxruntime"]))
    folder = cache.get("heavy", parts, run)
    advance(len(data), len(data))
    return load_file(folder / _FILE)["logits"]
