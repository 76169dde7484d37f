"""The self-test refuses every way in which a variant can differ from what was accepted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edge.model import open_model
from edge.runtimes import Runtime, open_runtime
from edge.selftest import run_selftest
from isthmus.bundle import Manifest, TensorSpec
from isthmus.errors import BundleError, InputError, VerificationError
from isthmus.tensors import Array
from tests.edge import bundles

VARIANT = "onnxruntime-fp32"


class Recorded:
    """A runtime that answers as it is told; the golden file and the checks are real."""

    def __init__(self, outputs: dict[str, Array] | Exception) -> None:
        self.outputs = outputs

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if isinstance(self.outputs, Exception):
            raise self.outputs
        return self.outputs

    def close(self) -> None:
        return None


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("selftest") / "bundle"
    return folder, bundles.build_bundle(folder)


def right_outputs() -> dict[str, Array]:
    golden = bundles.golden_tensors(1)
    return {name: golden[f"output.{VARIANT}.{name}"].copy() for name in ("logits", "label")}


def run(bundle: tuple[Path, Manifest], outputs: dict[str, Array] | Exception) -> Mapping[str, Array]:
    folder, manifest = bundle
    return run_selftest(Recorded(outputs), manifest, manifest.variant(VARIANT), folder / "golden.safetensors")


@pytest.mark.parametrize("runtime", bundles.VARIANTS.values())
def test_real_runtime_passes_on_its_own_bundle(bundle: tuple[Path, Manifest], runtime: str) -> None:
    live = open_model(bundle[0], f"{runtime}-fp32")
    assert live.operating_point.threshold == bundles.THRESHOLD
    live.retire()


@pytest.mark.parametrize("runtime", bundles.VARIANTS.values())
def test_version_that_is_opened_has_computed_single_rows(
    bundle: tuple[Path, Manifest], runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    class Counting:
        def __init__(self, opened: Runtime) -> None:
            self.close = opened.close
            self._infer = opened.infer

        def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            rows.append(len(inputs["x"]))
            return self._infer(inputs)

    monkeypatch.setattr("edge.model.open_runtime", lambda *args, **kwargs: Counting(open_runtime(*args, **kwargs)))
    open_model(bundle[0], f"{runtime}-fp32").retire()
    assert rows == [4, 1, 1, 1, 1]


def test_difference_up_to_the_tolerance_passes(bundle: tuple[Path, Manifest]) -> None:
    outputs = right_outputs()
    outputs["logits"][2, 1] += 0.9e-3
    assert run(bundle, outputs)["logits"] is outputs["logits"]


def test_features_that_are_missing_or_not_finite_fail(bundle: tuple[Path, Manifest]) -> None:
    folder, manifest = bundle
    pooled = TensorSpec(name="pooled", datatype="FP32", shape=(-1, 2))
    asked = manifest.model_copy(update={"features": (pooled,)})
    for features in ({}, {"pooled": np.full((4, 2), np.nan, np.float32)}, {"pooled": np.zeros((4, 2), np.float64)}):
        outputs = Recorded(right_outputs() | features)
        with pytest.raises(VerificationError, match="features 'pooled'"):
            run_selftest(outputs, asked, asked.variant(VARIANT), folder / "golden.safetensors")


def _changed(name: str, change: object) -> dict[str, Array]:
    outputs = right_outputs()
    if isinstance(change, float):
        outputs[name].reshape(-1)[0] = change
    elif change is None:
        del outputs[name]
    elif isinstance(change, np.dtype):
        outputs[name] = outputs[name].astype(change)
    else:
        outputs[name] = outputs[name][:-1]
    return outputs


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        (_changed("logits", 5.0), "golden-mismatch"),
        (_changed("label", 7.0), "golden-mismatch"),
        (_changed("logits", float("nan")), "golden-not-finite"),
        (_changed("logits", float("inf")), "golden-not-finite"),
        (_changed("logits", None), "golden-shape"),
        (_changed("logits", np.dtype(np.float64)), "golden-shape"),
        (_changed("logits", "shorter"), "golden-shape"),
        (InputError("no such operator"), "cannot-infer"),
    ],
)
def test_wrong_answers_are_refused(
    bundle: tuple[Path, Manifest], outputs: dict[str, Array] | Exception, reason: str
) -> None:
    with pytest.raises(VerificationError) as caught:
        run(bundle, outputs)
    assert caught.value.reason == reason


@pytest.mark.parametrize("missing", ["input.x", f"output.{VARIANT}.logits"])
def test_golden_file_that_lacks_something_is_refused(tmp_path: Path, missing: str) -> None:
    golden = bundles.golden_tensors(1)
    del golden[missing]
    bundles.build_bundle(tmp_path / "b", golden=golden)
    with pytest.raises(VerificationError, match=missing) as caught:
        open_model(tmp_path / "b", VARIANT)
    assert caught.value.reason == "bad-golden"


def test_golden_file_that_is_none_is_refused(tmp_path: Path, bundle: tuple[Path, Manifest]) -> None:
    (tmp_path / "golden.safetensors").write_bytes(b"\xff" * 100)
    manifest = bundle[1]
    with pytest.raises(VerificationError) as caught:
        run_selftest(Recorded(right_outputs()), manifest, manifest.variant(VARIANT), tmp_path / "golden.safetensors")
    assert caught.value.reason == "bad-golden"


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_golden_outputs_that_every_answer_is_near_are_refused(tmp_path: Path, broken: float) -> None:
    golden = bundles.golden_tensors(1)
    golden[f"output.{VARIANT}.logits"] = np.full_like(golden[f"output.{VARIANT}.logits"], broken)
    bundles.build_bundle(tmp_path / "b", golden=golden)
    with pytest.raises(VerificationError, match="finite") as caught:
        open_model(tmp_path / "b", VARIANT)
    assert caught.value.reason == "bad-golden"


def test_golden_outputs_of_another_model_are_refused(tmp_path: Path) -> None:
    bundles.build_bundle(tmp_path / "b", golden=bundles.golden_tensors(500))
    with pytest.raises(VerificationError) as caught:
        open_model(tmp_path / "b", VARIANT)
    assert caught.value.reason == "golden-mismatch"


@pytest.mark.parametrize(
    "record",
    [
        bundles.calibration(2),
        bundles.calibration(1, model="other"),
        bundles.calibration(1).model_copy(update={"variants": {"x": bundles.calibration(1).variants[VARIANT]}}),
        bundles.calibration(1).model_copy(update={"output": "nothere"}),
        bundles.calibration(1).model_copy(update={"features": "nothere", "score": "learned"}),
        bundles.calibration(1).model_copy(update={"costs": (1.0, 2.0)}),
    ],
)
def test_calibration_record_of_something_else_is_refused(tmp_path: Path, record: object) -> None:
    bundles.build_bundle(tmp_path / "b", record=record)  # type: ignore[arg-type]
    with pytest.raises(VerificationError) as caught:
        open_model(tmp_path / "b", VARIANT)
    assert caught.value.reason == "calibration-mismatch"


def test_missing_model_file_is_refused(tmp_path: Path) -> None:
    bundles.build_bundle(tmp_path / "b")
    (tmp_path / "b" / "variants" / VARIANT / "model.onnx").unlink()
    with pytest.raises(BundleError, match="no model file"):
        open_model(tmp_path / "b", VARIANT)


def test_empty_golden_tensor_is_refused(tmp_path: Path, bundle: tuple[Path, Manifest]) -> None:
    tensors = {name: array[:0] for name, array in bundles.golden_tensors(1).items()}
    save_file(tensors, tmp_path / "golden.safetensors")
    manifest = bundle[1]
    with pytest.raises(VerificationError, match="expected input"):
        run_selftest(Recorded(right_outputs()), manifest, manifest.variant(VARIANT), tmp_path / "golden.safetensors")
