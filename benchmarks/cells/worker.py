"""The process of a cell: `python -m benchmarks.cells.worker FOLDER` does the job in FOLDER/job.json."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.cells import CALIBRATION, EVALUATION, EVALUATION_BYTES, MEMORY, OUTCOME, Cell, capture_of
from benchmarks.zoo import MODELS
from benchmarks.zoo.model import Array
from compiler.capture import CapturedModel, capture
from compiler.data import request
from compiler.parity import ParityMeter
from compiler.processes import serve
from compiler.sources import SourceOptions
from compiler.targets import BuildOptions, Labels, load_target
from compiler.worker import CAPTURE, CAPTURED, MODEL, read_captured
from isthmus.errors import InputError

CALIBRATION_FILE = "calibration.safetensors"
EVALUATION_FILE = "evaluation.safetensors"
REFERENCE_FILE = "reference.safetensors"
CONTROLLED = "accuracy-control"  # the setting that needs labelled samples
_TIMED_S = 1.0
_SEED_OF_EVALUATION = 7

Infer = Callable[[Mapping[str, Array]], Mapping[str, Array]]


def _capture(folder: Path, cell: Cell) -> dict[str, Any]:
    """Capture the model, draw samples, and run the source itself over them in ONNX Runtime."""
    import onnxruntime

    zoo = MODELS[cell.model]
    one = {name for name, (low, high) in zoo.lengths.items() if cell.fixed or low == high}
    lengths = {name: high if name in one else (low, high) for name, (low, high) in zoo.lengths.items()}
    model = capture(zoo.onnx(), folder / MODEL, SourceOptions(lengths=lengths, constants=dict(zoo.constants)))
    (folder / CAPTURE).write_bytes(CAPTURED.dump_json(model))
    save_file(zoo.samples(CALIBRATION), folder / CALIBRATION_FILE)
    samples = zoo.samples(EVALUATION, _SEED_OF_EVALUATION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(zoo.onnx()), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    first = session.run(None, zoo.feed(samples))
    count = max(8, min(EVALUATION, EVALUATION_BYTES // sum(array.nbytes for array in first)))
    answers = [first, *(session.run(None, zoo.feed(samples, row)) for row in range(1, count))]
    save_file({name: rows[:count] for name, rows in samples.items()}, folder / EVALUATION_FILE)
    reference = {name: np.stack([answer[place] for answer in answers]) for place, name in enumerate(names)}
    save_file(reference, folder / REFERENCE_FILE)
    return {"samples": count, "attention": model.attention}


def _build(folder: Path, cell: Cell) -> dict[str, Any]:
    """Build with a target of ours and compare with the source."""
    source = capture_of(cell).folder
    model = read_captured(source)
    target = load_target(cell.target, role="light")
    artefact = folder / "artefact"
    artefact.mkdir()
    samples = load_file(source / CALIBRATION_FILE)
    options = BuildOptions(
        precision=cell.precision,
        setting=cell.setting,
        platform=target.platforms[0],
        samples=samples,
        labelled=_labelled(cell.model, model, samples) if cell.setting == CONTROLLED else None,
        name=cell.model,
    )
    begun = time.perf_counter()
    built = target.build(model, artefact, options)
    result: dict[str, Any] = {
        "build_s": time.perf_counter() - begun,
        "entry": str(artefact / built.entry),
        "note": built.note,
        "bytes": sum(path.stat().st_size for path in artefact.rglob("*") if path.is_file()),
    }
    if target.runs_here:
        result |= compare(target.open(artefact / built.entry, threads=1).infer, model, source)
    return result


def _labelled(name: str, model: CapturedModel, samples: Mapping[str, Array]) -> Labels | None:
    """Return the samples with the source's best class as label, for classifiers."""
    output = MODELS[name].logits
    if not any(spec.name == output and len(spec.shape) == 2 for spec in model.outputs):
        return None
    from benchmarks.peers import open_onnxruntime

    infer = open_onnxruntime(model.path.parent)
    rows = range(len(next(iter(samples.values()))))
    best = [int(infer(request(model, samples, row, row + 1))[output].argmax()) for row in rows]
    return Labels(samples, np.array(best, np.int64), output)


def _peer(folder: Path, cell: Cell) -> dict[str, Any]:
    """Build with a tool by hand, as its documentation says, and compare with the source."""
    from benchmarks.peers import PEERS

    source = capture_of(cell).folder
    peer = PEERS[cell.target]
    artefact = folder / "artefact"
    artefact.mkdir()
    begun = time.perf_counter()
    peer.build(MODELS[cell.model], source, artefact)
    result: dict[str, Any] = {"build_s": time.perf_counter() - begun, "entry": str(artefact)}
    return result | compare(peer.open(artefact), read_captured(source), source)


def _by_hand(folder: Path, cell: Cell) -> dict[str, Any]:
    """Try the model as it came with the tool alone."""
    from benchmarks.peers import try_by_hand

    del folder
    try:
        try_by_hand(cell.target, MODELS[cell.model])
    except Exception as error:  # what the tool says is the result
        return {"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"refused": ""}


def compare(infer: Infer, model: CapturedModel, source: Path) -> dict[str, Any]:
    """Return how near the answers to the evaluation samples are to the source's, and the least time of one of them."""
    samples, reference = load_file(source / EVALUATION_FILE), load_file(source / REFERENCE_FILE)
    meter = ParityMeter()
    finite = True
    for row in range(len(next(iter(samples.values())))):
        answer = dict(infer(request(model, samples, row, row + 1)))
        for name, rows in reference.items():
            if answer[name].shape != rows[row].shape:
                raise InputError(f"{name!r}: expected shape {rows[row].shape}, got {answer[name].shape}")
            finite = finite and bool(np.isfinite(np.asarray(answer[name], np.float64)).all())
        if finite:
            meter.add(answer, {name: rows[row] for name, rows in reference.items()})
    if not finite:
        raise InputError("the answers are not finite")
    one = request(model, samples, 0, 1)
    times: list[float] = []
    end = time.perf_counter() + _TIMED_S
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        infer(one)
        times.append(time.perf_counter() - start)
    return {"parity": asdict(meter.result()), "least_ms": min(times) * 1e3}


def _work(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    cell = Cell(**json.loads((folder / "job.json").read_text()))
    jobs = {"capture": _capture, "build": _build, "peer": _peer, "by-hand": _by_hand}
    result = jobs[cell.kind](folder, cell)
    (folder / OUTCOME).write_text(json.dumps(result))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), _work)
