from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import BundleError
from isthmus.tvm_artifact import (
    MAX_ENTRY_BYTES,
    Artifact,
    Port,
    Tensor,
    check_machine,
    read_artifact,
    release_of,
)


def artifact(**changes: Any) -> Artifact:
    content: dict[str, Any] = {
        "tvm": "0.27.0",
        "platform": "x86_64",
        "cpu": "x86-64-v3",
        "features": ("avx2", "fma"),
        "inputs": (Port(name="x", datatype="FP32", shape=(1, 3), batch_axis=0),),
        "outputs": (Port(name="y", datatype="FP32", shape=(1, 2), batch_axis=0),),
        "weights": (Tensor(name="w00000", datatype="FP32", shape=(3, 2)),),
    }
    return Artifact(**content | changes)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(artifact().to_json())

    assert read_artifact(path) == artifact()
    assert read_artifact(path).to_json() == artifact().to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: Input should be 1"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"platform": "riscv64"}, "platform: Input should be 'x86_64' or 'aarch64'"),
        ({"tvm": "0.27"}, "tvm: String should match"),
        ({"features": ["rm -rf /"]}, "features.0: String should match"),
        ({"inputs": []}, "inputs: Tuple should have at least 1 item"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [0]}]}, "inputs.0.shape.0: Input should be greater"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [65536, 65536]}]}, "expected at most 2147483648"),
        ({"inputs": [{"name": "x", "datatype": "BF16", "shape": [1]}]}, "inputs.0.datatype: Input should be"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [4], "batch_axis": 0}]}, "1 along batch axis 0"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "batch_axis": 1}]}, "1 along batch axis 1"),
        ({"outputs": [{"name": "y", "datatype": "FP32", "shape": [1]}] * 2}, "names of the outputs must differ"),
    ],
)
def test_an_entry_that_breaks_the_schema_names_the_field(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(json.loads(artifact().to_json()) | change))

    with pytest.raises(BundleError, match=message) as caught:
        read_artifact(path)

    assert caught.value.reason == "cannot-open"


def test_an_entry_is_not_read_beyond_its_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(artifact().to_json() + b" " * MAX_ENTRY_BYTES)

    with pytest.raises(BundleError, match=f"more than {MAX_ENTRY_BYTES} bytes"):
        read_artifact(path)


def test_an_entry_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot open model\.json: No such file"):
        read_artifact(tmp_path / "model.json")


def test_a_processor_with_all_features_may_run_the_code() -> None:
    check_machine(artifact(), machine="x86_64", features=frozenset({"avx2", "fma", "more"}))


def test_a_processor_that_lacks_a_feature_is_told_which() -> None:
    with pytest.raises(BundleError, match=r"compiled for x86-64-v3; this processor lacks fma$") as caught:
        check_machine(artifact(), machine="x86_64", features=frozenset({"avx2"}))

    assert caught.value.reason == "processor-lacks-features"


def test_another_platform_is_refused() -> None:
    with pytest.raises(BundleError, match="compiled for x86_64, this is aarch64") as caught:
        check_machine(artifact(), machine="aarch64", features=frozenset({"avx2", "fma"}))

    assert caught.value.reason == "wrong-platform"


@pytest.mark.parametrize(("version", "release"), [("0.27.0.post1", "0.27.0"), ("1.2.3", "1.2.3"), ("4.0", "")])
def test_a_release_is_three_numbers(version: str, release: str) -> None:
    assert release_of(version) == release
