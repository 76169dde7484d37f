"""Pairs of files, old and new: of the updates of benchmarks.delta.finetune and of public releases.

Forms of an update, all of them made by the code that `isthmus compile` runs:

    fp32-safetensors      the checkpoint
    fp16-onnx             ONNX Runtime, half precision
    int8-onnx             ONNX Runtime, INT8 on the grid of the version before
    int8-openvino         OpenVINO, INT8 on the grid of the version before
    int8-openvino-anew    OpenVINO, INT8 with scales of its own

Everything is made on first use (about six minutes, and 2 GB) and kept: remove the folder after changes to the compiler.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.progress import Progress
from safetensors.torch import load_file, save_file

from benchmarks.delta import DeltaPair
from benchmarks.delta.finetune import PUBLISHED, STARTS, SUBJECTS, UPDATES, Subject, update
from compiler.capture import CapturedModel, capture
from compiler.grid import PreviousGrid
from compiler.targets import BuildOptions, load_target
from compiler.worker import CAPTURE, CAPTURED, MODEL, read_captured
from examples.quickstart.datasets import Package, fetch, read_member
from examples.quickstart.training import export_onnx

FOLDER: Final = Path("build/delta")
FORMS: Final = {
    "fp32-safetensors": ("", "", False),
    "fp16-onnx": ("onnxruntime", "fp16", False),
    "int8-onnx": ("onnxruntime", "int8", True),
    "int8-openvino": ("openvino", "int8", True),
    "int8-openvino-anew": ("openvino", "int8", False),
}  # form -> target, precision, on the grid of the version before
_CHECKPOINT: Final = "model.safetensors"
_ENTRIES: Final = {"onnxruntime": "model.onnx", "openvino": "model.xml"}
_WEIGHTS: Final = {"onnxruntime": "model.onnx", "openvino": "model.bin"}

_SILERO: Final = (
    Package(
        "silero-vad==6.1.0",
        "silero_vad-6.1.0-py3-none-any.whl",
        "f71004f5a6d0d784b285fba4436d9c8d462f990ee64500f723473c83e6dd16a1",
    ),
    Package(
        "silero-vad==6.2.0",
        "silero_vad-6.2.0-py3-none-any.whl",
        "8a31f1e58e73cdc20820d842f757e678e0ae1b0ee1cb7b8aa50f20f8fd7f7638",
    ),
)
_RELEASES: Final = {
    "silero-vad-6.1-6.2-onnx": (*_SILERO, "silero_vad/data/silero_vad.onnx"),
}


def names() -> list[str]:
    """Return the names of all pairs."""
    made = [f"{subject}-{form}-{kind}" for subject, kinds in UPDATES.items() for kind in kinds for form in FORMS]
    return [*made, *_RELEASES]


def pairs(wanted: Sequence[str], build: Path, progress: Progress) -> Iterator[DeltaPair]:
    """Yield the pairs with these names, each as soon as it is there.

    Raises:
        DatasetError: A package could not be fetched.
    """
    for subject in SUBJECTS:
        mine = [name for name in wanted if name.startswith(f"{subject}-")]
        if mine:
            yield from _Workshop(subject, build, progress).pairs(mine)
    for name in wanted:
        if name in _RELEASES:
            yield _release(name, build, progress)


def _release(name: str, build: Path, progress: Progress) -> DeltaPair:
    old, new, member = _RELEASES[name]
    folder = build / "delta" / name
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / "old.onnx", folder / "new.onnx")
    for package, path in zip((old, new), paths, strict=True):
        if not path.exists():
            _whole(path, read_member(fetch(package, build / "data", progress), member))
    return DeltaPair(name, "release", "release", *paths)


def _whole(path: Path, content: bytes) -> None:
    part = path.with_name(f"part-{path.name}")
    part.write_bytes(content)
    part.replace(path)


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that gets its name when everything went well."""
    part = folder.with_name(f"part-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.replace(folder)


class _Workshop:
    """One model and all that is made of it; a folder that exists is whole."""

    def __init__(self, name: str, build: Path, progress: Progress) -> None:
        self.name, self.build, self.progress = name, build, progress
        self.folder = build / "delta" / name
        self._subject: Subject | None = None

    @property
    def subject(self) -> Subject:
        """Return the model and its data, read when something is to be made of them."""
        if self._subject is None:
            self._subject = SUBJECTS[self.name](self.build / "data", self.progress)
        return self._subject

    def pairs(self, wanted: Sequence[str]) -> Iterator[DeltaPair]:
        """Yield the pairs of this model."""
        for kind in UPDATES[self.name]:
            for form in FORMS:
                name = f"{self.name}-{form}-{kind}"
                if name in wanted:
                    old, new = self.form(STARTS[kind], form, base=True), self.form(kind, form)
                    yield DeltaPair(name, form, kind, old, new)

    def checkpoint(self, version: str) -> Path:
        """Return the weights of a version: trained, or published."""
        path = self.folder / version / _CHECKPOINT
        if not path.exists():
            state = (
                self.subject.model.state_dict()
                if version == PUBLISHED
                else update(self.subject, version, load_file(self.checkpoint(STARTS[version])), self.progress)
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"part-{path.name}")
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, part)
            part.replace(path)
        return path

    def form(self, version: str, form: str, *, base: bool = False) -> Path:
        """Return the file of a version in a form; a base is what another version starts from.

        A base has scales of its own, for devices may run any version.
        """
        target_name, precision, keeps = FORMS[form]
        if not target_name:
            return self.checkpoint(version)
        keeps = keeps and not base
        folder = self.folder / version / f"{precision}-{target_name}{'-kept' if keeps else ''}"
        if not folder.exists():
            target, model = load_target(target_name, role="light"), self._captured(version)
            start = STARTS.get(version, PUBLISHED)
            previous = PreviousGrid(self.form(start, form, base=True).parent / _ENTRIES[target_name]) if keeps else None
            options = BuildOptions(
                precision=precision, samples=dict(self.subject.quantization.inputs), previous=previous, name=self.name
            )
            task = self.progress.add_task(f"{self.name}: {version} as {form}", total=None)
            with _whole_folder(folder) as part:
                built = target.build(model, part, options)
            if keeps and built.grid == "new":
                raise RuntimeError(f"{self.name} {version} {form}: the grid was not kept: {built.note}")
            self.progress.update(task, total=1, completed=1)
        return folder / _WEIGHTS[target_name]

    def _captured(self, version: str) -> CapturedModel:
        folder = self.folder / version / "captured"
        if not folder.exists():
            self.subject.model.load_state_dict(load_file(self.checkpoint(version)))
            exported = self.folder / version / "exported.onnx"
            export_onnx(self.subject.model, self.subject.quantization.inputs, exported)
            with _whole_folder(folder) as part:
                model = capture(exported, part / MODEL)
                (part / CAPTURE).write_bytes(CAPTURED.dump_json(model))
            exported.unlink()
        return read_captured(folder)
