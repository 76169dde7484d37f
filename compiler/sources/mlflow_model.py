"""Models that MLflow keeps: models:/NAME/VERSION, models:/NAME@ALIAS, runs:/ID/PATH, or a model's folder.

MLflow finds the folder (its tracking URI is what MLFLOW_TRACKING_URI says); what is in it is read as what it is:
- flavour onnx: the ONNX file;
- flavour transformers: the Hugging Face folder inside;
- flavour pytorch: the exported program (serialization_format="pt2"); a pickled module is refused;
- no flavour: the one model in the folder, or the file itself.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compiler.sources import Exported, SourceOptions, kind_of, load_source
from isthmus.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_DESCRIPTION: Final = 1 << 20  # bytes of the file MLmodel


class MlflowModel:
    """A model that MLflow can find."""

    def files(self, source: str, options: SourceOptions) -> Mapping[str, Path]:
        """Return the files of the model in the folder."""
        inner, options = _resolved(source, options)
        return load_source(kind_of(inner)).files(inner, options)

    def to_onnx(self, source: str, options: SourceOptions, folder: Path) -> Exported:
        """Return the model in the folder as ONNX."""
        inner, options = _resolved(source, options)
        return load_source(kind_of(inner)).to_onnx(inner, options, folder)


def _resolved(source: str, options: SourceOptions) -> tuple[str, SourceOptions]:
    """Return the source in the folder, and the options with the task that MLflow noted."""
    path = Path(source) if (Path(source) / "MLmodel").is_file() else _artifacts(source)
    if not (path / "MLmodel").is_file():
        return str(_only_model(path, source)), options
    flavours = _description(path / "MLmodel")
    if "onnx" in flavours:
        return str(_inside(path, flavours["onnx"].get("data", "model.onnx"), source)), options
    if "transformers" in flavours:
        from compiler.sources.huggingface import TASKS

        task = str(flavours["transformers"].get("task", ""))
        inner = _inside(path, flavours["transformers"].get("model_binary", "model"), source)
        return str(inner), replace(options, task=options.task or (task if task in TASKS else ""))
    if "pytorch" in flavours:
        data = _inside(path, flavours["pytorch"].get("model_data", "data"), source)
        program = data / "model.pt2"
        if program.is_file():
            return str(program), options
        raise InputError(
            f"{source}: MLflow holds a pickled module, which is code and is not run",
            hint='log it with mlflow.onnx, or with mlflow.pytorch and serialization_format="pt2"',
        )
    raise InputError(
        f"{source}: expected one of the flavours onnx, transformers and pytorch, got {', '.join(flavours)[:200]}",
        hint="log the model with mlflow.onnx",
    )


def _description(path: Path) -> dict[str, dict[str, Any]]:
    """Return the flavours in the file MLmodel."""
    import yaml

    try:
        with path.open("rb") as file:
            data = file.read(_MAX_DESCRIPTION + 1)
        document = yaml.safe_load(data) if len(data) <= _MAX_DESCRIPTION else None
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not a description of a model: {str(error)[:200]}") from error
    flavours = document.get("flavors") if isinstance(document, dict) else None
    if not isinstance(flavours, dict) or not all(isinstance(value, dict) for value in flavours.values()):
        raise InputError(f"{path}: expected a description of at most {_MAX_DESCRIPTION} bytes with flavors")
    return flavours


def _inside(folder: Path, name: Any, source: str) -> Path:
    path = folder / str(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{source}: expected a path in the model's folder, got {str(name)[:200]!r}")
    return path


def _only_model(path: Path, source: str) -> Path:
    """Return the model in a folder that MLflow has no flavour for; the path itself when it is one."""
    if path.is_file() or (path / "config.json").is_file():
        return path
    found = sorted(one for one in path.iterdir() if one.suffix in (".onnx", ".pt2")) if path.is_dir() else []
    if len(found) != 1:
        raise InputError(
            f"{source}: expected one model in the folder, got {len(found)}",
            hint="name the file: runs:/ID/PATH/model.onnx",
        )
    return found[0]


def _artifacts(source: str) -> Path:
    """Return the folder or file that MLflow keeps under this address; a copy, where it is on another machine."""
    with _silent():
        try:
            from mlflow.artifacts import download_artifacts
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise MissingExtraError("MLflow", "mlflow") from error
        try:
            return Path(download_artifacts(artifact_uri=source))
        except (MlflowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{source}: MLflow cannot find it: {reason}", hint="is MLFLOW_TRACKING_URI the store that holds it?"
            ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keep MLflow from reporting what it is used for, and from printing progress."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    level = logging.getLogger("mlflow").level
    with warnings.catch_warnings():
        for category in (FutureWarning, UserWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.getLogger("mlflow").setLevel(level)
