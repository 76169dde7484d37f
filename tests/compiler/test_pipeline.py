"""The whole pipeline on tiny models, with the real OpenVINO, NNCF and ONNX Runtime."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file

from compiler.package import write_archive
from compiler.pipeline import GuardError, Outcome, compile_bundle
from compiler.report import Report
from compiler.targets import TARGETS, load_target
from edge.model import open_model
from isthmus.bundle import BFLOAT16, Ceilings, open_bundle, parse_calibration
from isthmus.digests import sha256_file
from isthmus.errors import ConflictError, InputError, VerificationError
from tests.compiler import models
from tests.compiler.conftest import ALL, INT8, WriteRecipe, fill_workspace, light_weights, write_recipe

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Pair:
    """Version 1, and version 2 on the grid of version 1."""

    folder: Path
    first: Outcome
    second: Outcome


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pipeline")
    fill_workspace(folder)
    first = compile_bundle(write_recipe(folder), folder / "v1")
    rest = '[update]\ndelta_from = "v1"'
    second = compile_bundle(write_recipe(folder, "v2.toml", version=2, light="light-v2.onnx", rest=rest), folder / "v2")
    return Pair(folder, first, second)


def digests(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


def test_the_bundle_opens_and_describes_itself(pair: Pair) -> None:
    manifest = open_bundle(pair.folder / "v1")

    assert (manifest.name, manifest.version, manifest.labels, manifest.max_batch) == ("tiny", 1, ("a", "b", "c"), 16)
    assert [variant.id for variant in manifest.variants] == ["openvino-int8", "openvino-fp32", "onnxruntime-fp32"]
    assert {variant.inference_precision for variant in manifest.variants} == {"f32"}
    assert manifest.heavy.accuracy == 1.0
    assert manifest.provenance.sources["light"] == sha256_file(pair.folder / "light-v1.onnx")
    assert manifest.provenance.recipe == sha256_file(pair.folder / "recipe.toml")
    assert manifest.provenance.tools["openvino"]
    assert pair.first.manifest == manifest


def test_ceilings_of_the_recipe_are_in_the_manifest(tmp_path: Path) -> None:
    fill_workspace(tmp_path)
    lines = 'target = "onnxruntime"\nmax_latency_ms = 12.5\nmax_memory_mb = 64'
    compile_bundle(write_recipe(tmp_path, variants=f"[[variants]]\n{lines}\n"), tmp_path / "v1")

    (variant,) = open_bundle(tmp_path / "v1").variants
    assert variant.ceilings == Ceilings(latency_ms=12.5, memory_bytes=64_000_000)


def test_a_second_build_finds_nothing_to_do(pair: Pair) -> None:
    again = compile_bundle(pair.folder / "recipe.toml", pair.folder / "v1")

    assert again.reused
    assert again.manifest == pair.first.manifest
    assert again.report == pair.first.report
    assert again.calibration == pair.first.calibration


def test_a_bundle_that_somebody_changed_is_made_again(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.folder / "v1", tmp_path / "copy")
    whole = digests(tmp_path / "copy")
    (tmp_path / "copy" / "report.json").write_text("{}")

    again = compile_bundle(pair.folder / "recipe.toml", tmp_path / "copy", cache=pair.folder / ".compile-cache")

    assert not again.reused
    assert digests(tmp_path / "copy") == whole


def test_changing_one_variant_builds_that_one_alone(pair: Pair, tmp_path: Path) -> None:
    stages: list[str] = []
    variants = ALL.replace('target = "onnxruntime"', 'target = "onnxruntime"\nprecision = "int8"')
    recipe = write_recipe(pair.folder, "other.toml", variants=variants)

    compile_bundle(
        recipe, tmp_path / "out", cache=pair.folder / ".compile-cache", progress=lambda stage, *_: stages.append(stage)
    )

    assert {stage for stage in stages if stage.startswith("verify ")} == {"verify onnxruntime-int8"}


def test_nothing_is_left_beside_the_bundles(pair: Pair) -> None:
    hidden = [path.name for path in pair.folder.iterdir() if path.name.startswith(".")]

    assert hidden == [".compile-cache"]


def test_same_input_same_bytes(pair: Pair) -> None:
    compile_bundle(pair.folder / "recipe.toml", pair.folder / "again", cache=pair.folder / "other-cache")

    assert digests(pair.folder / "again") == digests(pair.folder / "v1")


def test_a_target_that_spoils_rows_in_a_batch_is_refused(tmp_path: Path) -> None:
    """The mean before the head, in INT8, with OpenVINO 2026.4: all rows but the first come out wrong."""
    fill_workspace(tmp_path)
    models.write_encoder(tmp_path / "light-mean.onnx", light_weights(), mean=True)
    # However much accuracy may be lost: answers that depend on their neighbours are never good.
    variants = INT8 + 'setting = "default"\n'
    path = write_recipe(tmp_path, variants=variants, light="light-mean.onnx", drop=1.0)
    with pytest.raises(GuardError, match="of a row alone differs by") as raised:
        compile_bundle(path, tmp_path / "out")
    assert [entry.id for entry in raised.value.outcome.report.left_out] == ["openvino-int8"]
    assert not (tmp_path / "out").exists()


def test_a_wrong_target_or_precision_is_found_before_any_work(tmp_path: Path) -> None:
    fill_workspace(tmp_path)
    (tmp_path / "heavy.onnx").write_bytes(b"nobody looks at it")
    for variant, message, hint in (
        ('target = "openvin"', "unknown target", "did you mean openvino?"),
        ('target = "onnxruntime"\nprecision = "int4"', "has no precision", "recipe"),
        ('target = "onnxruntime"\nplatform = "aarch64"', "has no platform", "recipe"),
        ('target = "onnxruntime"\nsetting = "fastest"', "has no setting 'fastest' for fp32", "leave the setting"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            compile_bundle(write_recipe(tmp_path, variants=f"[[variants]]\n{variant}\n"), tmp_path / "out")
        assert hint in raised.value.hint


def test_the_calibration_is_of_this_version_and_data(pair: Pair) -> None:
    calibration = parse_calibration((pair.folder / "v2" / "calibration.json").read_bytes())

    assert (calibration.model, calibration.version, calibration.output) == ("tiny", 2, "logits")
    assert calibration.data.samples == 400
    assert calibration.data.sha256 == sha256_file(pair.folder / "calibration.safetensors")
    for record in calibration.variants.values():
        assert record.escalation_rate <= 0.33
        assert record.accuracy > record.edge_accuracy
        assert record.curve[-1].accuracy == calibration.heavy_accuracy == 1.0


def test_golden_outputs_are_those_of_each_variant(pair: Pair) -> None:
    golden = load_file(pair.folder / "v1" / "golden.safetensors")
    manifest = open_bundle(pair.folder / "v1")

    assert sorted(golden) == sorted(["input.tokens", *(f"output.{v.id}.logits" for v in manifest.variants)])
    session = onnxruntime.InferenceSession(str(pair.folder / "v1" / manifest.variant("onnxruntime-fp32").entry))
    again = session.run(None, {"tokens": golden["input.tokens"]})[0]
    for variant in manifest.variants:
        difference = np.abs(golden[f"output.{variant.id}.logits"] - again)
        assert difference.max() < 1e-4 if variant.precision == "fp32" else difference.mean() < 0.03 * np.ptp(again)
    assert golden["input.tokens"].shape == (16, models.TOKENS)


def test_the_report_says_what_was_tried_and_how_near_it_came(pair: Pair) -> None:
    report = Report.model_validate_json((pair.folder / "v2" / "report.json").read_bytes())

    assert report == pair.second.report
    assert report.heavy_accuracy == 1.0
    assert report.variants[0].grid in ("kept", "part")
    assert [entry.grid for entry in report.variants[1:]] == ["", ""]
    kept = report.variants[0].grids
    assert {tensor.reason for tensor in kept} == {""}
    assert max(tensor.clipped for tensor in kept) <= 0.01
    assert all(0 < tensor.kept + tensor.moved <= tensor.channels for tensor in kept)
    for entry in report.variants:
        assert entry.timing is None
        assert entry.parity is not None
        assert entry.parity.cosine > 0.95
        assert {edge.name for edge in entry.edges} >= {"batch 1", "batch 2", "batch 16", "smallest values"}
        assert entry.interval[0] <= entry.accuracy <= entry.interval[1]
        assert entry.attempts[-1].setting == entry.setting
    assert pair.second.manifest is not None
    assert pair.second.manifest.varies == {}


def test_times_are_measured_and_the_manifest_says_that_they_vary(recipe: WriteRecipe, tmp_path: Path) -> None:
    path = recipe(variants='[[variants]]\ntarget = "onnxruntime"\n', measure="true\nseconds = 0.05")

    outcome = compile_bundle(path, tmp_path / "out")

    assert outcome.manifest is not None
    timing = outcome.report.variants[0].timing
    assert timing is not None
    assert 0 < timing.least_ms <= timing.p50_ms <= timing.p99_ms
    assert timing.samples_per_s > 0
    assert 20 < timing.peak_rss_mib < 1000
    assert outcome.manifest.variants[0].latency_ms == timing.p50_ms
    assert set(outcome.manifest.varies) == {"report.json"}
    assert outcome.report.pareto == ("onnxruntime-fp32",)
    assert set(outcome.report.recommended.values()) == {"onnxruntime-fp32"}


def test_both_versions_share_the_heavy_model(pair: Pair) -> None:
    def heavy(outcome: Outcome) -> str:
        assert outcome.manifest is not None
        return outcome.manifest.heavy.digest

    assert heavy(pair.first) == heavy(pair.second)


def test_the_new_version_differs_where_weights_moved_only(pair: Pair) -> None:
    old, new = (pair.folder / version / "variants" / "openvino-int8" for version in ("v1", "v2"))

    assert (old / "model.xml").read_bytes() == (new / "model.xml").read_bytes()
    before, after = (np.fromfile(folder / "model.bin", np.uint8) for folder in (old, new))
    assert len(before) == len(after)
    assert 0 < (before != after).mean() < 0.4
    words = models.WORDS * models.WIDTH  # the table of words lies first, and did not move
    np.testing.assert_array_equal(before[:words], after[:words])


def test_a_damaged_cache_gives_the_same_bundle(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.folder / ".compile-cache", tmp_path / "cache")
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-7])

    compile_bundle(pair.folder / "recipe.toml", tmp_path / "out", cache=tmp_path / "cache")

    assert digests(tmp_path / "out") == digests(pair.folder / "v1")


def test_the_guard_refuses_and_nothing_is_written(recipe: WriteRecipe, tmp_path: Path) -> None:
    """A quantization set of one repeated word ruins the ranges of activations."""
    (tmp_path / "quantization.safetensors").unlink()
    tokens = np.zeros((8, models.TOKENS), np.int64)
    models.write_samples(tmp_path / "quantization.safetensors", {"tokens": tokens})
    before = sorted(tmp_path.iterdir())

    with pytest.raises(GuardError) as caught:
        compile_bundle(recipe(drop=0.001), tmp_path / "out", cache=tmp_path / "cache")

    assert caught.value.exit_code == 6
    assert "openvino-int8: default: its accuracy fell by" in caught.value.message
    report = caught.value.outcome.report
    assert [entry.id for entry in report.left_out] == ["openvino-int8"]
    assert [entry.id for entry in report.variants] == ["openvino-fp32", "onnxruntime-fp32"]
    tried = [attempt.setting for attempt in report.left_out[0].attempts]
    assert tried == list(load_target("openvino", role="light").settings("int8"))
    assert set(tmp_path.iterdir()) - set(before) == {tmp_path / "cache", tmp_path / "recipe.toml"}


def test_an_old_grid_moves_with_channels_that_grew(pair: Pair, recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "light-v2.onnx").unlink()
    grown = {name: array * 2 if name == "value" else array for name, array in light_weights().items()}
    models.write_encoder(tmp_path / "light-v2.onnx", grown)
    rest = f'[update]\ndelta_from = "{pair.folder / "v1"}"'

    outcome = compile_bundle(recipe(version=2, light="light-v2.onnx", variants=INT8, rest=rest), tmp_path / "out")

    report = outcome.report.variants[0]
    assert report.grid in ("kept", "part")
    assert [tensor.channels - tensor.kept for tensor in report.grids if tensor.channels != tensor.kept] == [
        models.WIDTH
    ]
    assert outcome.manifest is not None


def test_an_old_grid_that_costs_accuracy_is_replaced(pair: Pair, recipe: WriteRecipe, tmp_path: Path) -> None:
    """Activations fifty times larger, and weights behind them as much smaller: the same answers, on other ranges."""
    (tmp_path / "light-v2.onnx").unlink()
    weights = light_weights()
    for name, factor in (("norm_scale", 50), ("norm_bias", 50), ("head", 1 / 50)):
        weights[name] = weights[name] * np.float32(factor)
    models.write_encoder(tmp_path / "light-v2.onnx", weights)
    rest = f'[update]\ndelta_from = "{pair.folder / "v1"}"'

    outcome = compile_bundle(recipe(version=2, light="light-v2.onnx", variants=INT8, rest=rest), tmp_path / "out")

    report = outcome.report.variants[0]
    assert report.grid == "new"
    assert report.grid_note.startswith("on the old grid its accuracy fell")
    assert "; with half of the tensors on the old grid its accuracy fell" in report.grid_note
    assert [attempt.grid for attempt in report.attempts][-1] == "new"
    assert len(report.attempts) == 3
    assert report.accuracy_drop <= 0.1


def test_another_architecture_is_named_and_gets_a_new_grid(pair: Pair, recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "light-v2.onnx").unlink()
    models.write_encoder(tmp_path / "light-v2.onnx", light_weights(), mean=True)
    rest = f'[update]\ndelta_from = "{pair.folder / "v1"}"'
    variants = INT8.replace("openvino", "onnxruntime") + INT8 + "required = false\n"

    outcome = compile_bundle(
        recipe(version=2, light="light-v2.onnx", variants=variants, rest=rest, drop=1.0), tmp_path / "out"
    )

    by_id = {entry.id: entry for entry in outcome.report.variants}
    assert by_id["openvino-int8"].grid == "new"
    assert "has no operator like 'pool'" in by_id["openvino-int8"].grid_note
    assert "its architecture was another" in by_id["openvino-int8"].grid_note


def test_the_version_before_may_be_an_archive(pair: Pair, recipe: WriteRecipe, tmp_path: Path) -> None:
    write_archive(pair.folder / "v1", tmp_path / "v1.tar")

    path = recipe(version=2, light="light-v2.onnx", variants=INT8)
    outcome = compile_bundle(path, tmp_path / "out", delta_from=tmp_path / "v1.tar")

    assert outcome.report.variants[0].grid_note == ""
    weights = "variants/openvino-int8/model.bin"
    assert sha256_file(tmp_path / "out" / weights) == sha256_file(pair.folder / "v2" / weights)
    assert compile_bundle(path, tmp_path / "out", delta_from=tmp_path / "v1.tar").reused
    assert not compile_bundle(path, tmp_path / "out").reused


def test_few_samples_are_refused(recipe: WriteRecipe, tmp_path: Path) -> None:
    tensors = load_file(tmp_path / "calibration.safetensors")
    (tmp_path / "calibration.safetensors").unlink()
    models.write_samples(tmp_path / "calibration.safetensors", {name: array[:10] for name, array in tensors.items()})

    with pytest.raises(VerificationError, match=r"calibration samples cannot support.*are needed"):
        compile_bundle(recipe(variants='[[variants]]\ntarget = "onnxruntime"\n'), tmp_path / "out")

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('labels = ["a", "b", "c"]', 'labels = ["a"]', "has 3 classes, model.labels has 1"),
        ('target = "onnxruntime"', 'target = "abacus"', "unknown target 'abacus'"),
        ('target = "onnxruntime"', 'target = "triton-python"', "for the heavy model"),
        ("threads = 1", 'target = "onnxruntime"', "is for the light model"),
        ("threads = 1", 'precision = "int4"', "has no precision 'int4'"),
        ("[data]", '[calibration]\noutput = "none"\n[data]', "got 'none'; the model has logits"),
        ("heavy.onnx", "absent.onnx", "cannot read"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    recipe: WriteRecipe, tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = recipe(variants='[[variants]]\ntarget = "onnxruntime"\n')
    path.write_text(path.read_text().replace(old, new))

    with pytest.raises(InputError, match=message):
        compile_bundle(path, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_the_version_before_must_be_older_and_elsewhere(pair: Pair, recipe: WriteRecipe, tmp_path: Path) -> None:
    rest = f'[update]\ndelta_from = "{pair.folder / "v2"}"'

    with pytest.raises(InputError, match="expected an older version of 'tiny' than 2, got tiny@2"):
        compile_bundle(recipe(version=2, rest=rest), tmp_path / "out")
    with pytest.raises(InputError, match="is the output itself"):
        compile_bundle(recipe(version=3, rest=rest), pair.folder / "v2")


def test_other_folders_are_not_overwritten(recipe: WriteRecipe, tmp_path: Path) -> None:
    with pytest.raises(ConflictError):
        compile_bundle(recipe(), tmp_path)


def fill_with_cnns(folder: Path, *, outlier: float = 1.0) -> None:
    """Put a CNN in the place of each encoder, and images in the place of texts."""
    rng = np.random.default_rng(0)
    for name in ("heavy.onnx", "light-v1.onnx", "calibration.safetensors", "quantization.safetensors"):
        (folder / name).unlink()
    models.write_cnn(folder / "light-v1.onnx", outlier=outlier)
    heavy = onnxruntime.InferenceSession(str(models.write_cnn(folder / "heavy.onnx")))
    image = rng.normal(size=(300, 1, 8, 8)).astype(np.float32)
    labels = heavy.run(None, {"image": image})[0].argmax(axis=1)
    models.write_samples(folder / "calibration.safetensors", {"image": image, "labels": labels})
    models.write_samples(folder / "quantization.safetensors", {"image": image[:50], "labels": labels[:50]})


def test_a_convolution_compiles(recipe: WriteRecipe, tmp_path: Path) -> None:
    fill_with_cnns(tmp_path)

    outcome = compile_bundle(recipe(), tmp_path / "out")

    assert [entry.id for entry in outcome.report.variants] == ["openvino-int8", "openvino-fp32", "onnxruntime-fp32"]
    assert outcome.report.left_out == ()
    config = (tmp_path / "out" / "heavy" / "config.pbtxt").read_text()
    assert "KIND_CPU" in config


def test_a_ruined_quantization_is_stopped_and_a_gentler_one_taken(recipe: WriteRecipe, tmp_path: Path) -> None:
    """One channel is 2,000 times the others: eight bits for all of them together leave nothing of the others."""
    fill_with_cnns(tmp_path, outlier=2000.0)
    path = recipe(variants=INT8, drop=0.02)

    outcome = compile_bundle(path, tmp_path / "out")

    (variant,) = outcome.report.variants
    first, *_, last = variant.attempts
    assert first.setting == load_target("openvino", role="light").settings("int8")[0]
    assert "its accuracy fell by" in first.refused
    assert first.accuracy is not None
    assert first.accuracy < 0.9
    assert last.refused == ""
    assert variant.setting == last.setting != first.setting
    assert variant.accuracy >= 0.98


def test_a_variant_that_is_not_required_is_left_out_with_the_reason(recipe: WriteRecipe, tmp_path: Path) -> None:
    variants = '[[variants]]\ntarget = "onnxruntime"\n[[variants]]\ntarget = "openvino"\nrequired = false\n'

    outcome = compile_bundle(recipe(variants=variants, difference=1e-12), tmp_path / "out")

    assert outcome.manifest is not None
    assert [variant.id for variant in outcome.manifest.variants] == ["onnxruntime-fp32"]
    (left,) = outcome.report.left_out
    assert (left.id, left.required) == ("openvino-fp32", False)
    assert "differs from the source by" in left.reason
    assert not (tmp_path / "out" / "variants" / "openvino-fp32").exists()


@pytest.mark.timeout(400)
def test_all_takes_every_target_that_is_installed(recipe: WriteRecipe, tmp_path: Path) -> None:
    outcome = compile_bundle(recipe(variants='[[variants]]\ntarget = "all"\n'), tmp_path / "out")

    assert outcome.manifest is not None
    found = {variant.id for variant in outcome.manifest.variants} | {entry.id for entry in outcome.report.left_out}
    light = [name for name, entry in TARGETS.items() if entry.role == "light"]
    expected = {f"{name}-{kind}" for name in light for kind in load_target(name, role="light").precisions}
    assert found == expected
    assert {"openvino-fp32", "onnxruntime-fp32", "tvm-fp32"} <= {variant.id for variant in outcome.manifest.variants}
    for variant in outcome.manifest.variants:
        assert variant.inference_precision == ("bf16" if variant.precision in BFLOAT16 else "f32")
    open_bundle(tmp_path / "out")


def test_an_interrupted_compilation_leaves_nothing_half_done(recipe: WriteRecipe, tmp_path: Path) -> None:
    path = recipe()
    before = set(tmp_path.iterdir())
    command = [sys.executable, "-m", "isthmus", "compile", str(path), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env={"PYTHONPATH": ":".join(sys.path)},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )  # fmt: skip
    while not list(tmp_path.glob(".compile-cache/.new-*/entry/artefact")):
        assert process.poll() is None
        time.sleep(0.005)

    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)

    assert process.returncode == 130
    assert set(tmp_path.iterdir()) - before == {tmp_path / ".compile-cache"}
    assert not list(tmp_path.glob(".compile-cache/.new-*"))
    assert compile_bundle(path, tmp_path / "out").manifest is not None


LEARNED = """[calibration]
max_risk = 0.5
delta = 0.2
score = "learned"
features = "pooled"
class_costs = { b = 3.0 }
"""


def test_a_learned_score_is_trained_and_goes_with_each_variant(tmp_path: Path) -> None:
    fill_workspace(tmp_path)
    light = onnx.load(tmp_path / "light-v1.onnx")
    light.graph.output.append(
        onnx.helper.make_tensor_value_info("pooled", onnx.TensorProto.FLOAT, ["batch", models.WIDTH])
    )
    onnx.save(light, tmp_path / "light-v1.onnx")
    inputs = models.tokens(2000, seed=21)
    heavy = onnxruntime.InferenceSession(str(tmp_path / "heavy.onnx"))
    labels = heavy.run(None, {"tokens": inputs})[0].argmax(axis=1).astype(np.int64)
    models.write_samples(tmp_path / "deferral.safetensors", {"tokens": inputs, "labels": labels})
    recipe = write_recipe(tmp_path, rest=LEARNED)
    recipe.write_text(recipe.read_text().replace("[data]", '[data]\ndeferral = "deferral.safetensors"'))

    outcome = compile_bundle(recipe, tmp_path / "bundle")

    manifest = open_bundle(tmp_path / "bundle")
    calibration = parse_calibration((tmp_path / "bundle" / "calibration.json").read_bytes())
    assert outcome.calibration == calibration
    assert [spec.name for spec in manifest.outputs] == ["logits"]
    assert [spec.name for spec in manifest.features] == ["pooled"]
    assert (calibration.score, calibration.features, calibration.costs) == ("learned", "pooled", (1.0, 3.0, 1.0))
    assert "deferral" in manifest.provenance.sources
    for variant in manifest.variants:
        assert f"variants/{variant.id}/deferral.safetensors" in manifest.device_files(variant.id)
    live = open_model(tmp_path / "bundle", "openvino-fp32")
    answer = asyncio.run(live.infer({"tokens": inputs[:4]}))
    assert 0 <= live.score(answer) <= 1
    live.retire()


def test_a_learned_score_that_is_worse_is_refused(tmp_path: Path) -> None:
    fill_workspace(tmp_path)
    inputs, labels = models.tokens(300, seed=21), np.random.default_rng(0).integers(0, 3, 300)
    models.write_samples(tmp_path / "deferral.safetensors", {"tokens": inputs, "labels": labels})  # they say nothing
    recipe = write_recipe(tmp_path, variants='[[variants]]\ntarget = "onnxruntime"\n', rest=LEARNED)
    text = recipe.read_text().replace("[data]", '[data]\ndeferral = "deferral.safetensors"')
    recipe.write_text(text.replace('features = "pooled"\n', ""))

    with pytest.raises(VerificationError, match="worse than max_probability on the 400 calibration") as caught:
        compile_bundle(recipe, tmp_path / "bundle")

    assert (caught.value.reason, caught.value.exit_code) == ("score-worse", 6)
    assert not (tmp_path / "bundle").exists()
