"""`isthmus bundle` and `isthmus targets`, as commands, on a real bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compiler.pipeline import compile_bundle
from tests.compiler import models
from tests.compiler.conftest import fill_workspace, write_recipe

pytestmark = pytest.mark.slow
VARIANTS = '[[variants]]\ntarget = "onnxruntime"\n[[variants]]\ntarget = "openvino"\n'


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isthmus", *map(str, arguments)]
    environment = {"PYTHONPATH": ":".join(sys.path), "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    fill_workspace(folder)
    cache = folder / "cache"
    compile_bundle(write_recipe(folder, variants=VARIANTS), folder / "v1", cache=cache)
    second = write_recipe(folder, "v2.toml", version=2, light="light-v2.onnx", variants=VARIANTS)
    compile_bundle(second, folder / "v2", cache=cache)
    return folder


def test_inspect_shows_variants_and_tools(bundles: Path, tmp_path: Path) -> None:
    done = run("bundle", "inspect", bundles / "v1", "--json", "--picture", tmp_path / "p.png")

    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["name"], record["version"], record["heavy"]) == ("tiny", 1, "python")
    assert [row["variant"] for row in record["variants"]] == ["onnxruntime-fp32", "openvino-fp32"]
    assert all(row["verified_by"] == "compiler" for row in record["variants"])
    assert any(tool.startswith("openvino ") for tool in record["tools"])
    assert (tmp_path / "p.png").is_file()


def test_verify_runs_every_variant_here(bundles: Path) -> None:
    done = run("bundle", "verify", bundles / "v1", "--json")

    assert done.returncode == 0, done.stderr
    assert {row["variant"]: row["verdict"] for row in json.loads(done.stdout)["variants"]} == {
        "onnxruntime-fp32": "right", "openvino-fp32": "right",
    }  # fmt: skip


def test_verify_finds_a_byte_that_moved(bundles: Path, tmp_path: Path) -> None:
    shutil.copytree(bundles / "v1", tmp_path / "b")
    path = tmp_path / "b" / "variants" / "onnxruntime-fp32" / "model.onnx"
    whole = bytearray(path.read_bytes())
    whole[-20] ^= 1
    path.write_bytes(whole)

    done = run("bundle", "verify", tmp_path / "b")

    assert done.returncode == 5
    assert "variants/onnxruntime-fp32/model.onnx: expected SHA-256" in done.stderr


def test_verify_finds_answers_of_another_model(bundles: Path, tmp_path: Path) -> None:
    """All digests are right, but the variant's file is that of version 2."""
    shutil.copytree(bundles / "v1", tmp_path / "b")
    name = "variants/onnxruntime-fp32/model.onnx"
    shutil.copy(bundles / "v2" / name, tmp_path / "b" / name)
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    manifest["files"][name] = json.loads((bundles / "v2" / "manifest.json").read_text())["files"][name]
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))

    done = run("bundle", "verify", tmp_path / "b", "--json")

    assert done.returncode == 6
    assert "golden answers of onnxruntime-fp32 are not those of the manifest" in done.stderr
    assert {row["variant"]: row["verdict"] for row in json.loads(done.stdout)["variants"]}["openvino-fp32"] == "right"


def test_diff_names_files_and_figures(bundles: Path) -> None:
    done = run("bundle", "diff", bundles / "v1", bundles / "v2", "--json")

    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    changed = {row["file"]: row["change"] for row in record["files"]}
    assert changed["variants/openvino-fp32/model.bin"] == "changed"
    assert "variants/openvino-fp32/model.xml" not in changed
    assert not any(path.startswith("heavy/") for path in changed)
    assert {"version", "provenance"} == {field["field"] for field in record["fields"]}


def test_equal_bundles_have_no_difference(bundles: Path) -> None:
    done = run("bundle", "diff", bundles / "v1", bundles / "v1")

    assert (done.returncode, done.stdout) == (0, "")
    assert "equal, byte for byte" in done.stderr


def test_what_is_no_bundle_is_said(tmp_path: Path) -> None:
    for command in (("inspect", tmp_path), ("verify", tmp_path), ("diff", tmp_path, tmp_path)):
        done = run("bundle", *command)
        assert done.returncode == 5
        assert "is not a bundle" in done.stderr
        assert "Traceback" not in done.stderr


def test_every_target_is_listed() -> None:
    rows = {row["target"]: row for row in json.loads(run("targets", "list", "--json").stdout)}

    assert rows["openvino"]["for"] == "light"
    assert "aarch64" in rows["tvm"]["platforms"]
    assert rows["triton-python"]["for"] == "heavy"


def test_targets_are_tried_side_by_side(tmp_path: Path) -> None:
    models.write_cnn(tmp_path / "m.onnx")

    done = run(
        "targets", "try", tmp_path / "m.onnx", "--target", "onnxruntime", "--target", "openvino", "--precision", "fp32",
        "--cache", tmp_path / "cache", "--output", tmp_path / "out", "--picture", tmp_path / "p.png", "--json",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["invented"]
    assert [row["id"] for row in record["variants"]] == ["onnxruntime-fp32", "openvino-fp32"] or [
        row["id"] for row in record["variants"]
    ] == ["openvino-fp32", "onnxruntime-fp32"]
    for row in record["variants"]:
        assert row["accuracy"] == 1.0
        assert row["parity"]["max_relative"] < 1e-5
        assert row["timing"]["p50_ms"] > 0
        assert list((tmp_path / "out" / row["id"]).iterdir())
    assert (tmp_path / "p.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("m.onnx", "--length", "sequence"), "--length: expected AXIS=SIZE"),
        (("m.onnx", "--length", "sequence=0"), "--length: expected AXIS=SIZE"),
        (("m.onnx", "--constant", "rate=fast"), "--constant: expected INPUT=NUMBER"),
        (("m.onnx", "--target", "abacus"), "unknown target 'abacus'"),
        (("m.onnx", "--target", "triton-python"), "is for the heavy model"),
        (("m.onnx", "--precision", "int7"), "no target has precision int7"),
        (("m.xyz",), "m.xyz: expected a file .onnx"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    models.write_cnn(tmp_path / "m.onnx")
    source, *rest = arguments

    done = run("targets", "try", tmp_path / source, *rest, "--cache", tmp_path / "cache")

    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
