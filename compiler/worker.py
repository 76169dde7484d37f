"""The processes that capture and build: `python -m compiler.worker FOLDER` does the job in FOLDER/job.json.

What each leaves in its folder: a capture, `model.onnx` and `capture.json`; a build, `artefact/`, `result.json`,
`logits.safetensors` (the score output for all samples) and `golden.safetensors` (all outputs for the golden rows);
answers, `outputs.safetensors` (all outputs for all samples).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter
from safetensors.numpy import load_file, save_file

from compiler.capture import CapturedModel, capture
from compiler.data import LABELS, run_over
from compiler.grid import PreviousGrid, TensorGrid
from compiler.processes import say, serve
from compiler.sources import SourceOptions
from compiler.targets import BuildOptions, Labels, Serving, Target, Tuning, load_target
from compiler.verify import Materials, Proof, prove
from isthmus.tensors import Array

JOB: Final = "job.json"
MODEL: Final = "model.onnx"
CAPTURE: Final = "capture.json"
ARTEFACT: Final = "artefact"
RESULT: Final = "result.json"
LOGITS: Final = "logits.safetensors"
GOLDEN: Final = "golden.safetensors"
OUTPUTS: Final = "outputs.safetensors"
CAPTURED: Final = TypeAdapter(CapturedModel)


class _Job(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CaptureJob(_Job):
    """Make one ONNX file of a source."""

    kind: Literal["capture"] = "capture"
    source: str
    options: SourceOptions


class BuildJob(_Job):
    """Build one variant with one setting, and prove it where it can run here."""

    kind: Literal["build"] = "build"
    target: str
    role: Literal["light", "heavy"]
    model: CapturedModel
    precision: str
    setting: str = ""
    platform: str = "x86_64"
    cpu: str = ""
    samples: Path | None = None  # for quantization; with labels, for targets that control accuracy themselves
    score_output: str = ""
    previous: PreviousGrid | None = None
    name: str = "model"
    max_batch: int = 64
    max_accuracy_drop: float = 0.02
    tuning: Tuning = Tuning()
    serving: Serving = Serving()
    materials: Path | None = None  # what to prove it with; None: nothing is run
    threads: int = 1


class AnswersJob(_Job):
    """Run an artefact over samples."""

    kind: Literal["answers"] = "answers"
    target: str
    entry: Path
    model: CapturedModel
    samples: Path
    batch: int
    threads: int = 1


class BuildResult(_Job):
    """What came of a build."""

    entry: str
    grid: Literal["", "kept", "part", "new"]
    note: str
    tensors: tuple[TensorGrid, ...]
    not_reproducible: str
    inference_precision: Literal["f32", "bf16"]
    bytes: int
    build_s: float
    prove_s: float = 0.0
    proof: Proof | None = None  # None: it cannot run here


_JOBS: Final[TypeAdapter[CaptureJob | BuildJob | AnswersJob]] = TypeAdapter(CaptureJob | BuildJob | AnswersJob)


def read_captured(folder: Path) -> CapturedModel:
    """Return the captured model that a job, or the cache, left in this folder."""
    record = CAPTURED.validate_json((folder / CAPTURE).read_bytes())
    return CAPTURED.validate_python({**CAPTURED.dump_python(record), "path": folder / MODEL})


def _capture(folder: Path, job: CaptureJob) -> None:
    say("capture", 0, 1)
    model = capture(job.source, folder / MODEL, job.options)
    (folder / CAPTURE).write_bytes(CAPTURED.dump_json(model))
    say("capture", 1, 1)


def _build(folder: Path, job: BuildJob) -> None:
    target = load_target(job.target, role=job.role)
    artefact = folder / ARTEFACT
    artefact.mkdir()
    say("build", 0, 1)
    begun = time.perf_counter()
    built = target.build(job.model, artefact, _options(job))
    build_s = time.perf_counter() - begun
    say("build", 1, 1)
    proof: Proof | None = None
    begun = time.perf_counter()
    if job.materials is not None:
        proof = _prove(folder, job, target, artefact / built.entry)
    result = BuildResult(
        entry=built.entry,
        grid=built.grid,
        note=built.note,
        tensors=built.tensors,
        not_reproducible=built.not_reproducible,
        inference_precision=built.inference_precision,
        bytes=sum(path.stat().st_size for path in artefact.rglob("*") if path.is_file()),
        build_s=build_s,
        prove_s=time.perf_counter() - begun,
        proof=proof,
    )
    (folder / RESULT).write_text(result.model_dump_json())


def _prove(folder: Path, job: BuildJob, target: Target, entry: Path) -> Proof:
    assert job.materials is not None  # noqa: S101  # the caller looked
    proof, logits, golden = prove(
        target.open(entry, threads=job.threads),
        target.open(entry, threads=1),
        job.model,
        Materials(job.materials),
        job.precision,
        job.score_output,
        partial(say, "verify"),
    )
    _save(logits, folder / LOGITS)
    _save(golden, folder / GOLDEN)
    return proof


def _save(tensors: Mapping[str, Array], path: Path) -> None:
    save_file({name: np.ascontiguousarray(array) for name, array in sorted(tensors.items())}, path)


def _options(job: BuildJob) -> BuildOptions:
    samples: dict[str, Any] | None = None if job.samples is None else load_file(job.samples)
    labels = None if samples is None else samples.pop(LABELS, None)
    labelled = None if samples is None or labels is None else Labels(samples, labels, job.score_output)
    return BuildOptions(
        precision=job.precision,
        setting=job.setting,
        platform=job.platform,
        cpu=job.cpu,
        samples=samples,
        labelled=labelled,
        previous=job.previous,
        name=job.name,
        max_batch=job.max_batch,
        max_accuracy_drop=job.max_accuracy_drop,
        advance=say,
        tuning=job.tuning,
        serving=job.serving,
    )


def _answer(folder: Path, job: AnswersJob) -> None:
    runner = load_target(job.target, role="light").open(job.entry, threads=job.threads)
    samples = load_file(job.samples)
    inputs = {spec.name: samples[spec.name] for spec in job.model.inputs}
    outputs = run_over(runner.infer, job.model, inputs, batch=job.batch, advance=partial(say, "answers"))
    _save(outputs, folder / OUTPUTS)


class _AllButTorch(PathFinder):
    """Finds what is installed, except torch."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if fullname == "torch" else super().find_spec(fullname, path, target)


def _hide_torch() -> None:
    """Let NNCF and TVM do without torch: they import it only because it is there, for two seconds and 200 MB."""
    sys.meta_path[:] = [_AllButTorch if finder is PathFinder else finder for finder in sys.meta_path]


def _work(folder: Path) -> None:
    job = _JOBS.validate_json((folder / JOB).read_bytes())
    if isinstance(job, CaptureJob):
        _capture(folder, job)
        return
    _hide_torch()
    if isinstance(job, AnswersJob):
        _answer(folder, job)
    else:
        _build(folder, job)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), _work)
