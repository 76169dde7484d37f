"""The heavy model's answers to the calibration data, and the cache that keeps them.

A new version of the light model is usually calibrated against the same heavy one. Its answers depend on the model, the
data and ONNX Runtime's version only, so they are kept under a name made from these.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from compiler.capture import CapturedModel
from compiler.data import LabelledSamples, run_in_batches
from compiler.evaluate import Logits
from compiler.targets.onnxruntime import OnnxRunner
from compiler.verify import check_source
from isthmus.digests import sha256_bytes

THREADS: Final = 2
BATCH: Final = 64


def heavy_logits(
    model: CapturedModel,
    data: LabelledSamples,
    output: str,
    cache: Path,
    advance: Callable[[int, int], None],
) -> Logits:
    """Return the model's logits for all samples, from the cache where they are there.

    Raises:
        VerificationError: The model's outputs are not what its file declares.
    """
    key = sha256_bytes("\n".join([model.sha256, data.sha256, output, version("onnxruntime")]).encode())
    path = cache / f"heavy-{key[:32]}.safetensors"
    specs = [spec for spec in model.outputs if spec.name == output]
    logits = _cached(path, (len(data), *specs[0].shape[1:]))
    if logits is not None:
        advance(len(data), len(data))
        return logits
    outputs = run_in_batches(OnnxRunner(model.path, threads=THREADS).infer, data.inputs, batch=BATCH, advance=advance)
    check_source(outputs, specs, len(data), what="heavy")
    _keep(path, outputs[output])
    return outputs[output]


def _cached(path: Path, shape: tuple[int, ...]) -> Logits | None:
    try:
        logits = load_file(path).get("logits")
    except (OSError, SafetensorError, ValueError):
        return None
    usable = logits is not None and logits.shape == shape and logits.dtype == np.float32 and np.isfinite(logits).all()
    return logits if usable else None


def _keep(path: Path, logits: Logits) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(save({"logits": np.ascontiguousarray(logits)}))
    Path(name).replace(path)
