"""Models in a real MLflow store."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from compiler.capture import capture
from compiler.sources import SourceOptions, digest
from isthmus.digests import sha256_file
from isthmus.errors import InputError
from tests.compiler import models
from tests.compiler.sources.conftest import quiet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with a database and artifacts, in a folder of the test."""
    folder = tmp_path_factory.mktemp("mlflow")
    before = dict(os.environ)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    with quiet():
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
        mlflow.create_experiment("tests", artifact_location=(folder / "artifacts").as_uri())
        mlflow.set_experiment("tests")
    yield folder
    os.environ.clear()
    os.environ.update(before)


def log(source: Path, *, name: str = "") -> str:
    """Log an ONNX model, and register it as the next version of `name`; return the run's id."""
    import mlflow.onnx

    with quiet(), mlflow.start_run() as run:
        mlflow.onnx.log_model(
            onnx.load(source), name="model", registered_model_name=name or None, pip_requirements=["onnx"]
        )
    return str(run.info.run_id)


def test_a_version_of_a_registered_model_is_its_onnx_file(store: Path, tmp_path: Path) -> None:
    first = models.write_cnn(tmp_path / "first.onnx")
    second = models.write_cnn(tmp_path / "second.onnx", seed=1)
    log(first, name="cnn")
    run = log(second, name="cnn")

    captured = [capture(f"models:/cnn/{version}", tmp_path / f"{version}.onnx") for version in (1, 2)]

    assert captured[0].axes == {"image": ("batch", "", "", ""), "logits": ("batch", "")}
    for model, source in zip(captured, (first, second), strict=True):
        weights = {tensor.name: tensor.raw_data for tensor in onnx.load(model.path).graph.initializer}
        assert weights == {tensor.name: tensor.raw_data for tensor in onnx.load(source).graph.initializer}
    assert captured[1].sha256 == digest("models:/cnn/2") != captured[0].sha256
    assert digest(f"runs:/{run}/model") == captured[1].sha256


def test_an_alias_names_a_version(store: Path, tmp_path: Path) -> None:
    import mlflow

    log(models.write_cnn(tmp_path / "cnn.onnx"), name="aliased")
    with quiet():
        mlflow.MlflowClient().set_registered_model_alias("aliased", "champion", "1")

    assert digest("models:/aliased@champion") == digest("models:/aliased/1")


def test_a_folder_of_a_run_is_what_it_holds(store: Path, tmp_path: Path, classifier: Path) -> None:
    import mlflow

    with quiet(), mlflow.start_run() as run:
        mlflow.log_artifacts(str(classifier), "tuned")
        mlflow.log_artifact(str(models.write_cnn(tmp_path / "cnn.onnx")), "plain")

    assert digest(f"runs:/{run.info.run_id}/tuned") == digest(classifier)
    assert digest(f"runs:/{run.info.run_id}/plain") == sha256_file(tmp_path / "cnn.onnx")
    assert digest(f"runs:/{run.info.run_id}/plain/cnn.onnx") == sha256_file(tmp_path / "cnn.onnx")


def flavoured(folder: Path, text: str) -> Path:
    """Write the description that MLflow writes beside a model of this flavour."""
    folder.mkdir(exist_ok=True)
    (folder / "MLmodel").write_text(text)
    return folder


def test_a_transformers_flavour_is_a_hugging_face_folder(tmp_path: Path, classifier: Path) -> None:
    flavour = "flavors:\n  transformers:\n    model_binary: model\n    task: text-classification\n"
    folder = flavoured(tmp_path / "logged", flavour)
    shutil.copytree(classifier, folder / "model")

    assert digest(folder) == digest(classifier)


def test_a_pytorch_flavour_is_its_exported_program(store: Path, tmp_path: Path) -> None:
    import mlflow.pytorch
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(4, 2))
    logged = {"pytorch_model": module, "pip_requirements": ["torch"]}
    with quiet(), mlflow.start_run() as run:
        example = np.ones((2, 4), np.float32)
        mlflow.pytorch.log_model(name="net", input_example=example, serialization_format="pt2", **logged)
        mlflow.pytorch.log_model(name="pickled", serialization_format="pickle", **logged)

    model = capture(f"runs:/{run.info.run_id}/net", tmp_path / "out.onnx")

    assert [spec.shape[1:] for spec in (*model.inputs, *model.outputs)] == [(4,), (2,)]
    with pytest.raises(InputError, match="holds a pickled module, which is code"):
        capture(f"runs:/{run.info.run_id}/pickled", tmp_path / "none.onnx", SourceOptions(allow_pickle=True))


@pytest.mark.parametrize("source", ["models:/nothing/1", "models:/cnn/99", "runs:/0123456789abcdef/model", "models:/"])
def test_what_mlflow_does_not_have_is_refused(store: Path, source: str) -> None:
    with pytest.raises(InputError, match=f"{source}: MLflow cannot find it") as caught:
        digest(source)

    assert "MLFLOW_TRACKING_URI" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flavors:\n  sklearn: {}\n", "expected one of the flavours onnx, transformers and pytorch, got sklearn"),
        ("flavors: 3\n", "expected a description"),
        ("flavors: [\n", "not a description of a model"),
        ("x: !!python/object/apply:os.getcwd []\n", "not a description of a model"),
        ("flavors:\n  onnx:\n    data: ../../secret.onnx\n", "expected a path in the model's folder"),
        ("#" * (1 << 21), "expected a description of at most"),
    ],
)
def test_a_folder_that_mlflow_did_not_write_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        digest(flavoured(tmp_path / "logged", text))


def test_a_run_without_a_model_is_refused(store: Path, tmp_path: Path) -> None:
    import mlflow

    (tmp_path / "notes.txt").write_text("nothing here")
    with quiet(), mlflow.start_run() as run:
        mlflow.log_artifact(str(tmp_path / "notes.txt"), "notes")

    with pytest.raises(InputError, match="expected one model in the folder, got 0"):
        digest(f"runs:/{run.info.run_id}/notes")
