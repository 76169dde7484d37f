"""Sources: what the compiler can read, one file each.

A source is a string, as recipes write it, with options. `SOURCES` names the kinds by import string, so that torch,
transformers or MLflow are imported only for a model that needs them. To add one: a file that fulfils `Source`, a line
here, and a rule in `kind_of`. Nothing is ever downloaded, and nothing is unpickled unless the options say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Final, Protocol, cast

from isthmus.digests import sha256_bytes, sha256_file, tree_digest
from isthmus.errors import InputError, MissingExtraError

OPSET: Final = 18  # of what is exported here: every target takes it
NEWEST_OPSET: Final = 26  # of what ONNX Runtime runs
OLDEST_OPSET: Final = 11


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How a source is to be read; what a kind has no use for is refused where the source is read.

    A length is fixed by one number or bounded by a shortest and a longest; the axis is named as in the captured model.
    """

    task: str = ""  # Hugging Face: one of huggingface.TASKS; empty: as the folder's config.json says
    adapter: Path | None = None  # Hugging Face: a folder with a LoRA adapter (peft) to merge
    lengths: Mapping[str, int | tuple[int, int]] = field(default_factory=dict)  # axis -> size, or shortest and longest
    constants: Mapping[str, float | int] = field(default_factory=dict)  # input -> the value baked into the graph
    outputs: tuple[str, ...] = ()  # those to keep, in this order; empty: all
    factory: str = ""  # weights without a graph: "module:function" or "file.py:function" that makes the torch module
    allow_pickle: bool = False  # read .pt, .pth and pytorch_model.bin, with torch's weights_only loader
    opset: int = OPSET  # what torch models are exported as


@dataclass(frozen=True, slots=True)
class Exported:
    """One ONNX file, and what the source knows about its axes."""

    path: Path
    lengths: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # axis -> shortest and longest that it takes
    used: frozenset[str] = frozenset()  # axes with one length, and constants, that the export has taken care of


class Source(Protocol):
    """One kind of model that can be read."""

    def files(self, source: str, options: SourceOptions) -> Mapping[str, Path]:
        """Return the files that decide what is read, by the name that they have in the digest.

        Imports no library that takes long.

        Raises:
            InputError: There is no such source, or one of its files cannot be used.
        """

    def to_onnx(self, source: str, options: SourceOptions, folder: Path) -> Exported:
        """Return the model as an ONNX file, written into `folder` unless it is one already.

        Raises:
            InputError: The source is broken, unsafe, or cannot become ONNX.
        """


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """Where a kind lives and which extra brings its library."""

    location: str  # "module:class"
    extra: str = "compiler"


SOURCES: Final[Mapping[str, SourceEntry]] = {
    "onnx": SourceEntry("compiler.sources.onnx_file:OnnxFile"),
    "torch-export": SourceEntry("compiler.sources.torch_export:TorchExport", "torch"),
    "huggingface": SourceEntry("compiler.sources.huggingface:HuggingFace", "torch"),
    "safetensors": SourceEntry("compiler.sources.safetensors_file:SafetensorsFile", "torch"),
    "pickle": SourceEntry("compiler.sources.pickle_file:PickleFile", "torch"),
    "mlflow": SourceEntry("compiler.sources.mlflow_model:MlflowModel", "mlflow"),
    "timm": SourceEntry("compiler.sources.timm_model:TimmModel", "timm"),
    "torchvision": SourceEntry("compiler.sources.torchvision_model:TorchvisionModel", "timm"),
}

_SCHEMES: Final[Mapping[str, str]] = {
    "models:/": "mlflow",
    "runs:/": "mlflow",
    "timm:": "timm",
    "torchvision:": "torchvision",
}
_SUFFIXES: Final[Mapping[str, str]] = {
    ".onnx": "onnx",
    ".pt2": "torch-export",
    ".safetensors": "safetensors",
    ".pt": "pickle",
    ".pth": "pickle",
}
_KINDS: Final = (
    "a file .onnx, .pt2, .safetensors, .pt or .pth; a Hugging Face folder; models:/NAME/VERSION or runs:/ID/PATH of "
    "MLflow; timm:NAME or torchvision:NAME"
)


def kind_of(source: str | Path) -> str:
    """Return the kind of this source, a key of `SOURCES`; files are told by their suffix, folders by what they hold.

    Raises:
        InputError: It is none of them.
    """
    text = str(source)
    for scheme, kind in _SCHEMES.items():
        if text.startswith(scheme):
            return kind
    path = Path(text)
    if path.suffix.lower() in _SUFFIXES and not path.is_dir():
        return _SUFFIXES[path.suffix.lower()]
    if (path / "MLmodel").is_file():
        return "mlflow"
    if (path / "config.json").is_file():
        return "huggingface"
    if path.is_dir():
        raise InputError(
            f"{text}: expected a folder with config.json (Hugging Face) or MLmodel (MLflow)",
            hint="name the model's file, or the folder that holds its config.json",
        )
    raise InputError(f"{text}: expected {_KINDS}", hint="nothing is downloaded: save the model here first")


def resolve(source: str, folder: Path) -> str:
    """Return the source with a relative path in it taken from `folder`; names and addresses stay as they are."""
    if not source.startswith(tuple(_SCHEMES)):
        return str(folder / source)
    name, at, weights = source.partition("@")
    named = source.startswith(("timm:", "torchvision:"))
    return f"{name}@{folder / weights}" if named and at else source


def load_source(kind: str) -> Source:
    """Return the reader of this kind, a key of `SOURCES`.

    Raises:
        MissingExtraError: Its library is not installed.
    """
    entry = SOURCES[kind]
    module, _, attribute = entry.location.partition(":")
    try:
        return cast("Source", getattr(import_module(module), attribute)())
    except ImportError as error:
        raise MissingExtraError(f"what sources of kind {kind!r} need ({error.name})", entry.extra) from error


def digest(source: str | Path, options: SourceOptions | None = None) -> str:
    """Return the SHA-256 of everything that is read: the source's files, the adapter's, the factory's.

    It covers files alone, not the options' values. A model in one file has the digest of that file. It is cheap: files
    are read once and no library that takes long is imported, but for MLflow's, to look up where a version is kept.

    Raises:
        InputError: There is no such source, or a file is missing.
        MissingExtraError: MLflow is not installed.
    """
    options = SourceOptions() if options is None else options
    files = load_source(kind_of(source)).files(str(source), options)
    try:
        digests = {name: sha256_file(path) for name, path in files.items()}
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}", hint="mend the source's path") from error
    if not digests:  # a name alone
        return sha256_bytes(str(source).encode())
    return next(iter(digests.values())) if len(digests) == 1 else tree_digest(digests)


def to_onnx(source: str | Path, options: SourceOptions, folder: Path) -> Exported:
    """Return the source as one ONNX file, in `folder` unless it is one already.

    Raises:
        InputError: The source is broken, unsafe, or cannot become ONNX.
        MissingExtraError: What it needs is not installed.
    """
    return load_source(kind_of(source)).to_onnx(str(source), options, folder)
