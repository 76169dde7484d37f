from __future__ import annotations

from pathlib import Path

import pytest

from compiler.recipe import MAX_RECIPE_BYTES, load_recipe
from isthmus.digests import sha256_file
from isthmus.errors import InputError
from tests.compiler.conftest import INT8, write_recipe


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, rest='[update]\ndelta_from = "../v1/bundle"')

    recipe, digest = load_recipe(path)

    assert recipe.light.source == str(tmp_path / "light-v1.onnx")
    assert recipe.data.calibration == tmp_path / "calibration.safetensors"
    assert recipe.update.delta_from == tmp_path / "../v1/bundle"
    assert digest == sha256_file(path)
    assert [variant.id for variant in recipe.variants] == ["openvino-int8", "openvino-fp32", "onnxruntime-fp32"]


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ('name = "tiny"', 'nmae = "tiny"', "model.nmae: there is no such field", "did you mean name?"),
        ("[guard]", "[gaurd]", "gaurd: there is no such field", "did you mean guard?"),
        ('target = "onnxruntime"', 'targte = "onnxruntime"', "variants.2.targte", "did you mean target?"),
        ("threads = 1", "zzz = 1", "heavy.zzz", "known here: source, task, adapter, lengths"),
        ('name = "tiny"', "", "model.name is missing", "model.version"),
        ("threads = 1", 'threads = "many"', "got 'many'", "recipe"),
    ],
)
def test_a_typing_error_gets_a_hint(tmp_path: Path, old: str, new: str, message: str, hint: str) -> None:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError) as raised:
        load_recipe(path)
    assert message in raised.value.message
    assert hint in raised.value.hint


def test_a_source_has_its_options_and_an_address_stays_as_it_is(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    more = 'adapter = "lora"\ntask = "text-classification"\nlengths = { sequence = 64, batch = [1, 8] }\n'
    text = path.read_text().replace('[heavy]\nsource = "heavy.onnx"', f'{more}[heavy]\nsource = "models:/big/3"')
    path.write_text(text)

    recipe, _ = load_recipe(path)

    assert recipe.heavy.source == "models:/big/3"
    assert recipe.light.options.adapter == tmp_path / "lora"
    assert recipe.light.options.lengths == {"sequence": 64, "batch": (1, 8)}


def test_triton_is_told_what_the_recipe_says(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    path.write_text(
        path.read_text().replace(
            "threads = 1", 'threads = 3\nruntime = "openvino"\npreferred_batch = [4, 8]\ngpus = [0]'
        )
    )

    serving = load_recipe(path)[0].heavy.serving

    assert (serving.threads, serving.runtime, serving.preferred_batch, serving.gpus) == (3, "openvino", (4, 8), (0,))


def test_labels_come_from_a_file(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace('labels = ["a", "b", "c"]', 'labels_file = "labels.txt"'))
    (tmp_path / "labels.txt").write_text("x\ny y\nz\n")

    assert load_recipe(path)[0].model.labels == ("x", "y y", "z")

    (tmp_path / "labels.txt").write_text("x\n\nz\n")
    with pytest.raises(InputError, match=r"labels\.txt: .*none empty"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version = 1", "version = 0", "model.version"),
        ("version = 1", "version = 'one'", "model.version"),
        ('name = "tiny"', 'name = "../tiny"', "model.name"),
        ('name = "tiny"', "", "model.name"),
        ("[heavy]", "[heavy]\nsurprise = 1", "heavy.surprise"),
        ("threads = 1", "threads = 0", "heavy.threads"),
        ('precision = "int8"', 'precision = "int3"', "variants.0.precision"),
        ("max_accuracy_drop = 0.1", "max_accuracy_drop = nan", "guard.max_accuracy_drop"),
        ("max_difference = 0.001", "max_difference = inf", "guard.max_difference"),
        ("[data]", "[calibration]\nmax_escalation = 1.5\n[data]", "calibration.max_escalation"),
        ("[data]", "[calibration]\ndelta = 0.0\n[data]", "calibration.delta"),
        ('quantization = "quantization.safetensors"', "", "data.quantization is needed"),
        ('labels = ["a", "b", "c"]', 'labels = ["a"]\nlabels_file = "l"', "not both"),
        ("[model]", "[model", "not a TOML document"),
        (INT8, INT8 + INT8, "variants must differ"),
        ('target = "onnxruntime"', 'target = "triton-python"', "name it as heavy.target"),
        ('target = "onnxruntime"', 'target = "tvm"\nplatform = "riscv"', "variants.2.platform"),
        ('target = "onnxruntime"', 'target = "tvm"\ncpu = "; rm -rf /"', "variants.2.cpu"),
        (
            "[guard]",
            '[guard]\nmetric = "beauty"',
            "expected one of accuracy, balanced-accuracy, macro-f1, got 'beauty'",
        ),
        ("threads = 1", 'runtime = "abacus"', "heavy.runtime"),
        ("threads = 1", "preferred_batch = [0]", "heavy.preferred_batch.0"),
        ("enabled = false", "seconds = 0", "measure.seconds"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace(old, new))

    with pytest.raises(InputError) as caught:
        load_recipe(path)

    assert message in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "not a TOML document"),
        (b"#" * (MAX_RECIPE_BYTES + 1), "at most"),
        (b"a = " + b"[" * 100_000, "not a TOML document|nested too deeply"),
        (b"", "model"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)

    with pytest.raises(InputError, match=message):
        load_recipe(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.toml"):
        load_recipe(tmp_path / "nowhere.toml")
