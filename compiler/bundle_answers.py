"""What the models of a bundle answer to a labelled set: a variant on this machine's runtime, and the heavy one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compiler.calibrate import Answers, Wish, cloud_answers, score_rows
from compiler.capture import CapturedModel
from compiler.data import LabelledSamples, load_labelled, request, run_over
from compiler.evaluate import correct
from compiler.replay import Rows
from compiler.targets import Runner, load_target
from compiler.verify import BATCH
from isthmus.bundle import (
    CALIBRATION,
    Calibration,
    Manifest,
    Variant,
    check_calibration,
    open_bundle,
    parse_calibration,
)
from isthmus.errors import InputError
from isthmus.machine import machine
from isthmus.scores import HEAD
from isthmus.scores.probabilities import softmax
from isthmus.tensors import encode_request

_HEAVY = {"model.onnx": "onnxruntime", "model.xml": "openvino"}  # what runs the heavy model's file

Advance = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A bundle's models on a labelled set."""

    manifest: Manifest
    variant: Variant
    calibration: Calibration
    answers: Answers
    rows: Rows


def answer(
    bundle: Path, data: Path, *, variant_id: str = "", threads: int = 1, advance: Advance = lambda *_: None
) -> Evaluated:
    """Run one variant and the heavy model over a labelled set.

    Args:
        bundle: The bundle's folder.
        data: A safetensors file with the inputs and "labels".
        variant_id: The variant; empty for the first that runs here.
        threads: Threads of each model.
        advance: Told (what, done, total).

    Raises:
        InputError: The data are not what the model takes, or neither variant nor heavy model can be run here.
        BundleError: The bundle is not whole, or has no such variant.
        VerificationError: Its calibration record is not its own.
    """
    manifest = open_bundle(bundle)
    calibration = parse_calibration((bundle / CALIBRATION).read_bytes())
    variant = manifest.variant(variant_id) if variant_id else _first_that_runs(manifest)
    check_calibration(manifest, variant, calibration)
    point = calibration.variants[variant.id]
    model = _described(bundle / variant.entry, manifest)
    classes = next(spec.shape[-1] for spec in manifest.outputs if spec.name == calibration.output)
    decoding = calibration.decoding
    samples = load_labelled(data, model, classes=classes, sequences=bool(decoding))
    light_runner = load_target(variant.runtime, role="light").open(bundle / variant.entry, threads=threads)
    outputs = run_over(
        light_runner.infer, model, samples.inputs, batch=BATCH, advance=lambda *at: advance("light model", *at)
    )
    heavy_runner = _open_heavy(bundle / "heavy" / "1", threads)
    heavy = run_over(
        heavy_runner.infer, model, samples.inputs, batch=BATCH, advance=lambda *at: advance("heavy model", *at)
    )
    answers = Answers(outputs, heavy[calibration.output], samples.labels, calibration.output, decoding)
    wish = Wish(
        calibration.operating_point,
        score=calibration.score,
        costs=calibration.costs,
        features=calibration.features,
        head=bundle / "variants" / variant.id / HEAD,
    )
    cloud = cloud_answers(answers, point.temperature, point.fusion)
    rows = Rows(
        scores=score_rows(outputs, calibration.output, point.temperature, wish),
        light_right=correct(answers.logits, samples.labels, decoding),
        cloud_right=correct(cloud, samples.labels, decoding),
        probabilities=None if decoding else softmax(answers.logits, point.temperature)[0],
        bytes_up=_sizes(manifest, model, samples),
    )
    return Evaluated(manifest, variant, calibration, answers, rows)


def _first_that_runs(manifest: Manifest) -> Variant:
    for variant in manifest.variants:
        if variant.platform in ("any", machine()) and load_target(variant.runtime, role="light").runs_here:
            return variant
    raise InputError(f"none of {', '.join(v.id for v in manifest.variants)} runs on this machine")


def _described(path: Path, manifest: Manifest) -> CapturedModel:
    """Return what the manifest says of a model, in the compiler's words."""
    return CapturedModel(path, "", manifest.inputs, (*manifest.outputs, *manifest.features), attention=False)


def _open_heavy(folder: Path, threads: int) -> Runner:
    for name, target in _HEAVY.items():
        if (folder / name).is_file():
            return load_target(target, role="light").open(folder / name, threads=threads)
    raise InputError(
        f"{folder}: expected {' or '.join(_HEAVY)}: this heavy model runs in Triton only",
        hint="evaluate a bundle whose heavy.target is triton-python",
    )


def _sizes(
    manifest: Manifest, model: CapturedModel, samples: LabelledSamples
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return how many bytes an escalation of each sample sends up, without the transport's own."""
    one = encode_request(manifest.name, request(model, samples.inputs, 0, 1), version=str(manifest.version))
    return np.full(len(samples), int(one.ByteSize()), dtype=np.int64)
