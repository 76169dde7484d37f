"""Where things are made: captures, builds and measurements, each a process in the budget, each kept in the cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from safetensors.numpy import load_file, save_file

from compiler.cache import Cache, code_digest, key, tool_versions
from compiler.capture import CapturedModel
from compiler.data import Samples, is_batchable, request
from compiler.measure import Timing, measure
from compiler.processes import Advance, Budget, run_process
from compiler.sources import SourceOptions
from compiler.verify import BATCH
from compiler.worker import JOB, OUTPUTS, AnswersJob, BuildJob, CaptureJob, read_captured
from isthmus.bundle import index_files
from isthmus.digests import sha256_bytes, sha256_file, tree_digest
from isthmus.tensors import Array

CAPTURE_TOOLS: Final = ("onnx", "onnxruntime", "onnxscript", "torch", "transformers", "peft", "timm", "torchvision")
_SCRATCH: Final = (JOB, "log.txt")  # what a process leaves besides its result
_TIMING: Final = "timing.json"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where things are made.

    Args:
        cache: Keeps what is made.
        budget: Cores and memory.
        advance: Told (stage, done, total), from several threads.
    """

    cache: Cache
    budget: Budget
    advance: Advance

    def side_by_side(self, calls: Sequence[Callable[[], _T]]) -> list[_T]:
        """Return what the calls return, made at the same time; the first error, or Ctrl-C, ends the others."""
        with ThreadPoolExecutor(max(self.budget.jobs, 1)) as pool:
            futures = [pool.submit(call) for call in calls]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self.budget.stop()
                for future in futures:
                    future.cancel()
                raise

    def capture(
        self, source: str, options: SourceOptions, sha256: str, *, what: str = "model", path: Path | None = None
    ) -> CapturedModel:
        """Return the source as a captured model.

        Args:
            source: What `compiler.sources` can read.
            options: How it is to be read.
            sha256: The source's digest.
            what: Which model it is, for people.
            path: A further folder from which Python modules may be imported.

        Raises:
            InputError: The source is broken, unsafe, or cannot become ONNX.
        """
        job = CaptureJob(source=source, options=options)
        record = job.model_dump(mode="json", exclude={"source"})
        name = key(sha256=sha256, job=record, tools=tool_versions(CAPTURE_TOOLS), code=code_digest())
        self.advance(f"capture {what}", 0, 1)
        folder = self.cache.get(
            "capture", name, lambda place: self._run(place, job, f"reading the {what}", f"capture {what}", path)
        )
        self.advance(f"capture {what}", 1, 1)
        return read_captured(folder)

    def build(self, job: BuildJob, tools: tuple[str, ...], *, name: str) -> Path:
        """Return the cache's folder with what the job builds; equal jobs are built once.

        Args:
            job: What to build.
            tools: Distributions whose versions decide what is built.
            name: What it is, for people.

        Raises:
            InputError: The target cannot take the model, or fails.
            ConfigError: It needs more memory than there is.
        """
        self.advance(f"build {name}", 0, 1)
        folder = self.cache.get(
            job.role, _build_key(job, tools), lambda place: self._run(place, job, f"building {name}", name, None)
        )
        self.advance(f"build {name}", 1, 1)
        return folder

    def answers(
        self,
        target: str,
        entry: Path,
        model: CapturedModel,
        samples: Samples,
        *,
        tools: tuple[str, ...],
        name: str,
        batch: int,
    ) -> dict[str, Array]:
        """Return all outputs of an artefact for all samples.

        Args:
            target: A key of `compiler.targets.TARGETS`.
            entry: What it built.
            model: The captured model.
            samples: What to answer.
            tools: Distributions that run it.
            name: What it is, for people.
            batch: Samples in one request, where the model can take several.
        """
        parts = key(
            artefact=_tree(entry.parent), target=target, samples=samples.sha256, batch=batch,
            tools=tool_versions((*tools, "numpy")), code=code_digest(),
        )  # fmt: skip

        def run(place: Path) -> None:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "samples.safetensors"
                save_file({key: np.ascontiguousarray(array) for key, array in samples.inputs.items()}, path)
                job = AnswersJob(
                    target=target, entry=entry.resolve(), model=model, samples=path, batch=batch,
                    threads=self.budget.threads,
                )  # fmt: skip
                self._run(place, job, f"running {name}", name, None)

        return load_file(self.cache.get("answers", parts, run) / OUTPUTS)

    def _run(
        self, place: Path, job: CaptureJob | BuildJob | AnswersJob, what: str, name: str, path: Path | None
    ) -> None:
        (place / JOB).write_text(job.model_dump_json())

        def advance(stage: str, done: int, total: int) -> None:
            self.advance(name if isinstance(job, CaptureJob) else f"{stage} {name}", done, total)

        run_process("compiler.worker", place, what=what, budget=self.budget, advance=advance, path=path)
        for scratch in _SCRATCH:
            (place / scratch).unlink(missing_ok=True)

    def measure(
        self,
        target: str,
        entry: Path,
        model: CapturedModel,
        inputs: Mapping[str, Array],
        *,
        tools: tuple[str, ...],
        name: str,
        max_batch: int,
        seconds: float,
    ) -> Timing:
        """Return the times of an artefact on this machine; equal bytes are measured once.

        Args:
            target: A key of `compiler.targets.TARGETS`.
            entry: What it built.
            model: The captured model.
            inputs: Samples, of which the first ones are used.
            tools: Distributions that run it.
            name: What it is, for people.
            max_batch: The largest batch of the model.
            seconds: How long each figure is measured.
        """
        count = len(next(iter(inputs.values())))
        batch = min(max_batch, BATCH, count) if is_batchable(model) else 1
        one, many = (request(model, inputs, 0, size) for size in (1, batch))

        def run(place: Path) -> None:
            timing = measure(target, entry, one, many, folder=place, budget=self.budget, seconds=seconds, batch=batch)
            for path in place.iterdir():
                path.unlink()
            (place / _TIMING).write_text(timing.model_dump_json())

        parts = key(
            artefact={path: file.sha256 for path, file in index_files(entry.parent).items()},
            inputs=[sha256_bytes(array.tobytes()) for array in many.values()],
            target=target,
            processor=_processor(),
            cores=self.budget.cores,
            seconds=seconds,
            tools=tool_versions(tools),
            code=code_digest(),
        )
        self.advance(f"measure {name}", 0, 1)
        folder = self.cache.get("timing", parts, run)
        self.advance(f"measure {name}", 1, 1)
        return Timing.model_validate_json((folder / _TIMING).read_bytes())


def _build_key(job: BuildJob, tools: tuple[str, ...]) -> str:
    """Return the key of a build: files by their digests, not by where they lie; threads decide nothing."""
    record = job.model_dump(mode="json", exclude={"samples", "previous", "materials", "threads", "tuning"})
    record["model"].pop("path")
    return key(
        job=record,
        model=sha256_file(job.model.path),
        samples=None if job.samples is None else sha256_file(job.samples),
        previous=None if job.previous is None else (_tree(job.previous.entry.parent), job.previous.share),
        materials=None if job.materials is None else _tree(job.materials),
        tuning=(job.tuning.trials, job.tuning.seconds),
        tools=tool_versions((*tools, "numpy")),
        code=code_digest(),
    )


def _tree(folder: Path) -> str:
    return tree_digest({path: entry.sha256 for path, entry in index_files(folder).items()})


def _processor() -> str:
    """Return what tells this processor from others: its model and its features."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    wanted = ("model name", "flags", "Features", "CPU part")
    return sha256_bytes("\n".join(sorted({line for line in lines if line.startswith(wanted)})).encode())
