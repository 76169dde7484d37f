"""The bundle: what breaks the format or the digests is refused, and says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from isthmus.bundle import (
    Calibration,
    CalibrationData,
    CurvePoint,
    Heavy,
    Manifest,
    OperatingPoint,
    Provenance,
    TensorSpec,
    Variant,
    VariantCalibration,
    index_files,
    open_bundle,
    parse_calibration,
    parse_manifest,
)
from isthmus.digests import tree_digest
from isthmus.errors import BundleError, DigestMismatchError

FILES = {
    "variants/onnxruntime-fp32/model.onnx": b"light",
    "heavy/config.pbtxt": b"name: 'm'",
    "heavy/1/model.onnx": b"heavy",
    "golden.safetensors": b"golden",
    "calibration.json": b"{}",
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    files = index_files(folder)
    heavy = tree_digest({path: entry.sha256 for path, entry in files.items() if path.startswith("heavy/")})
    manifest = Manifest(
        name="m",
        version=1,
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),),
        outputs=(TensorSpec(name="logits", datatype="FP32", shape=(-1, 2)),),
        variants=(
            Variant(
                id="onnxruntime-fp32",
                runtime="onnxruntime",
                precision="fp32",
                entry="variants/onnxruntime-fp32/model.onnx",
                tolerance=1e-3,
            ),
        ),
        heavy=Heavy(platform="python", digest=heavy),
        provenance=Provenance(sources={"light": "0" * 64}, recipe="0" * 64, tools={"x": "1"}),
        files=files,
    )
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return folder


def test_a_whole_bundle_opens(bundle: Path) -> None:
    manifest = open_bundle(bundle)
    assert manifest.version == 1
    assert parse_manifest(manifest.to_json()) == manifest
    assert set(manifest.device_files("onnxruntime-fp32")) == {
        "variants/onnxruntime-fp32/model.onnx",
        "calibration.json",
        "golden.safetensors",
    }


@pytest.mark.parametrize("path", FILES)
def test_one_changed_byte_is_found_in_every_file(bundle: Path, path: str) -> None:
    data = bytearray((bundle / path).read_bytes())
    data[0] ^= 1
    (bundle / path).write_bytes(bytes(data))
    with pytest.raises(DigestMismatchError, match=path):
        open_bundle(bundle)


def test_missing_and_surplus_files_are_named(bundle: Path) -> None:
    (bundle / "golden.safetensors").rename(bundle / "other.safetensors")
    with pytest.raises(BundleError, match=r"missing: \['golden.safetensors'\].*manifest: \['other.safetensors'\]"):
        open_bundle(bundle)


def test_a_folder_without_manifest_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(tmp_path)
    assert "isthmus compile" in caught.value.hint


def edit(bundle: Path, **changes: Any) -> bytes:
    return json.dumps(json.loads((bundle / "manifest.json").read_text()) | changes).encode()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "../m"}, "name"),
        ({"version": 0}, "version"),
        ({"version": "1; drop"}, "version"),
        ({"surprise": 1}, "surprise"),
        ({"files": {"../../etc/passwd": {"sha256": "0" * 64, "length": 1}}}, "files"),
        ({"files": {"/abs": {"sha256": "0" * 64, "length": 1}}}, "files"),
        ({"files": {"a/./b": {"sha256": "0" * 64, "length": 1}}}, "files"),
        ({"files": {"a": {"sha256": "zz", "length": 1}}}, "files"),
        ({"files": {}}, "files"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [4, -2]}]}, "inputs"),
        ({"inputs": [{"name": "x", "datatype": "FLOAT", "shape": [4]}]}, "inputs"),
        ({"heavy": {"platform": "python", "digest": "0" * 64}}, "heavy.digest"),
        ({"schema_version": 2}, "schema_version"),
    ],
)
def test_a_manifest_that_breaks_the_schema_is_refused_by_field(bundle: Path, changes: Any, says: str) -> None:
    with pytest.raises(BundleError, match=says):
        parse_manifest(edit(bundle, **changes))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"name": 1}'])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        parse_manifest(data)


def test_a_huge_manifest_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(BundleError, match="at most"):
        parse_manifest(b" " * (5 << 20))


def record(version: int = 1) -> Calibration:
    point = CurvePoint(threshold=0.5, escalation_rate=0.3, accuracy=0.9)
    variant = VariantCalibration(
        temperature=1.0,
        threshold=0.5,
        escalation_rate=0.3,
        accuracy=0.9,
        edge_accuracy=0.8,
        agreement=0.8,
        ece_before=0.1,
        ece_after=0.1,
        curve=(point,),
    )
    return Calibration(
        model="m",
        version=version,
        operating_point=OperatingPoint(value=0.3, delta=0.1),
        data=CalibrationData(sha256="0" * 64, samples=100),
        heavy_accuracy=0.95,
        variants={"onnxruntime-fp32": variant},
    )


def test_a_calibration_record_is_known_by_its_content() -> None:
    assert parse_calibration(record().to_json()) == record()
    assert b"decoding" not in record().to_json()  # records of classes have the ids that they had before there was one
    sequence = record().model_copy(update={"score": "sequence", "decoding": "ctc"})
    assert parse_calibration(sequence.to_json()) == sequence
    assert record(1).id != record(2).id
    with pytest.raises(BundleError, match=r"calibration\.json"):
        parse_calibration(b'{"model": "m"}')


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_limits_that_every_number_passes_are_refused(bundle: Path, value: str) -> None:
    data = (bundle / "manifest.json").read_bytes()
    changed = re.sub(rb'"tolerance": [0-9.e-]+', f'"tolerance": {value}'.encode(), data)
    assert changed != data
    with pytest.raises(BundleError, match="tolerance"):
        parse_manifest(changed)
    data = record().to_json()
    changed = data.replace(b'"threshold": 0.5', f'"threshold": {value}'.encode())
    assert changed != data
    with pytest.raises(BundleError, match="threshold"):
        parse_calibration(changed)
