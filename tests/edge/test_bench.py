from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge.bench import Choice, measure_variants, read_choice, write_choice
from edge.bootstrap import _choose
from edge.cli import app
from edge.config import EdgeSettings
from edge.identity import DeviceHome
from isthmus.bundle import Ceilings, open_bundle
from isthmus.errors import BundleError
from isthmus.settings import load_settings
from tests.edge import bundles


def settings(**given: object) -> EdgeSettings:
    return load_settings(EdgeSettings, None, given).value


def test_variants_are_ranked_by_their_time_here(tmp_path: Path) -> None:
    bundles.build_bundle(tmp_path / "bundle")
    manifest, timings = measure_variants(tmp_path / "bundle", rounds=2)
    assert manifest.name == "triage"
    assert {timing.variant for timing in timings} == set(bundles.VARIANTS)
    latencies = [timing.latency_ms for timing in timings]
    assert all(latency is not None and 0 < latency < 1000 for latency in latencies)
    assert latencies == sorted(latencies, key=lambda latency: latency or 0)


def test_a_variant_that_fails_its_self_test_takes_no_part(tmp_path: Path) -> None:
    golden = bundles.golden_tensors(1)
    golden["output.openvino-fp32.logits"] = golden["output.openvino-fp32.logits"] + 1
    bundles.build_bundle(tmp_path / "bundle", golden=golden)
    _, timings = measure_variants(tmp_path / "bundle", rounds=1)
    assert [timing.variant for timing in timings] == ["onnxruntime-fp32", "openvino-fp32"]
    assert timings[1].latency_ms is None
    assert "expected to be within" in timings[1].note


def test_a_variant_that_would_be_refused_for_its_ceilings_takes_no_part(tmp_path: Path) -> None:
    bundles.build_bundle(tmp_path / "bundle", ceilings=Ceilings(latency_ms=1e-6))
    _, timings = measure_variants(tmp_path / "bundle", rounds=1)
    assert [timing.latency_ms for timing in timings] == [None, None]
    assert all("expected one row to take at most" in timing.note for timing in timings)


def test_an_installed_version_has_one_variant(tmp_path: Path) -> None:
    bundles.build_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "variants" / "openvino-fp32" / "model.bin").unlink()
    _, timings = measure_variants(tmp_path / "bundle", rounds=1)
    assert [timing.latency_ms is not None for timing in timings] == [True, False]
    assert "model.bin" in timings[1].note


def test_a_broken_bundle_has_no_variant_that_takes_part(tmp_path: Path) -> None:
    bundles.build_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "golden.safetensors").write_bytes(b"not tensors")
    _, timings = measure_variants(tmp_path / "bundle", rounds=1)
    assert [timing.latency_ms for timing in timings] == [None, None]
    assert all("golden.safetensors" in timing.note for timing in timings)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        measure_variants(tmp_path)


def test_updates_prefer_what_was_measured_unless_they_are_told_otherwise(tmp_path: Path) -> None:
    bundles.build_bundle(tmp_path / "bundle")
    manifest, home = open_bundle(tmp_path / "bundle"), DeviceHome(tmp_path)

    assert _choose(settings(), home, manifest).id == "onnxruntime-fp32"
    write_choice(tmp_path, "other", Choice(variant="onnxruntime-fp32", latency_ms=1.0, version=1))
    write_choice(tmp_path, "triage", Choice(variant="openvino-fp32", latency_ms=1.0, version=1))
    assert _choose(settings(), home, manifest).id == "openvino-fp32"
    assert _choose(settings(choose_by="order"), home, manifest).id == "onnxruntime-fp32"
    assert _choose(settings(variant="onnxruntime-fp32"), home, manifest).id == "onnxruntime-fp32"

    write_choice(tmp_path, "triage", Choice(variant="gone", latency_ms=1.0, version=1))
    assert _choose(settings(), home, manifest).id == "onnxruntime-fp32"
    (tmp_path / "variant.json").write_text("{ not JSON")
    assert _choose(settings(), home, manifest).id == "onnxruntime-fp32"
    assert read_choice(tmp_path, "triage") is None


def test_the_command_prints_the_ranking_and_keeps_the_choice(tmp_path: Path) -> None:
    bundles.build_bundle(tmp_path / "bundle")
    home = tmp_path / "device"
    home.mkdir()
    told = {"device_id": "d", "cloud": "localhost:1", "token_issuer": "i", "token_audience": "a"}
    (home / "enrolment.json").write_text(json.dumps(told))
    words = ["bench", str(tmp_path / "bundle"), "--home", str(home), "--rounds", "1", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    first = json.loads(result.stdout)["variants"][0]
    choice = read_choice(home, "triage")
    assert choice is not None
    assert (choice.variant, choice.latency_ms, choice.version) == (first["variant"], first["latency_ms"], 1)


def test_the_command_refuses_a_folder_that_is_no_device(tmp_path: Path) -> None:
    bundles.build_bundle(tmp_path / "bundle")
    result = CliRunner().invoke(app, ["bench", str(tmp_path / "bundle"), "--home", str(tmp_path)])
    assert result.exit_code != 0
