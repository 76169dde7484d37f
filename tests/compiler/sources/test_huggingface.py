"""Hugging Face folders: each task's tensors, adapters, and answers equal to those of transformers itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from compiler.capture import CapturedModel, capture
from compiler.sources import SourceOptions, digest
from compiler.sources.huggingface_module import Pooling
from isthmus.errors import InputError
from tests.compiler.sources.conftest import CLASSES, LONGEST, SMALL, WORDS, bert_config, quiet, saved


def run(model: CapturedModel, **inputs: Any) -> list[Any]:
    return list(onnxruntime.InferenceSession(str(model.path)).run(None, inputs))


def texts(batch: int, length: int, seed: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    mask = np.ones((batch, length), np.int64)
    mask[0, length // 2 + 1 :] = 0
    return {"input_ids": generator.integers(0, WORDS, (batch, length), dtype=np.int64), "attention_mask": mask}


def answers(model: Any, inputs: dict[str, Any], output: str = "logits") -> Any:
    with torch.no_grad(), quiet():
        return model.eval()(**{name: torch.from_numpy(array) for name, array in inputs.items()})[output].numpy()


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, LONGEST), (5, 9)])
def test_a_text_classifier_answers_as_transformers_does(
    classifier: Path, tmp_path_factory: pytest.TempPathFactory, batch: int, length: int
) -> None:
    model = _captured_classifier(classifier, tmp_path_factory)

    inputs = texts(batch, length)
    original = transformers.BertForSequenceClassification.from_pretrained(classifier)
    np.testing.assert_allclose(run(model, **inputs)[0], answers(original, inputs), atol=1e-5)


_made: dict[Path, CapturedModel] = {}


def _captured_classifier(folder: Path, factory: pytest.TempPathFactory) -> CapturedModel:
    if folder not in _made:
        _made[folder] = capture(folder, factory.mktemp("captured") / "out.onnx")
    return _made[folder]


@pytest.mark.slow
def test_a_text_classifier_has_named_tensors_and_axes(
    classifier: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = _captured_classifier(classifier, tmp_path_factory)

    assert model.axes == {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "sequence"),
        "logits": ("batch", ""),
    }
    assert [(spec.name, spec.datatype, spec.shape) for spec in model.outputs] == [("logits", "FP32", (-1, CLASSES))]
    assert model.lengths == {"batch": (1, 64), "sequence": (1, LONGEST)}
    assert model.attention
    assert model.sha256 == digest(classifier)
    data = model.path.read_bytes()
    assert b"site-packages" not in data
    operators = {node.op_type for node in onnx.load(model.path).graph.node}
    assert not operators & {"GatherND", "GatherElements", "Range", "Where"}  # the plain mask


@pytest.mark.slow
def test_the_same_folder_gives_the_same_bytes(
    classifier: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    first = _captured_classifier(classifier, tmp_path_factory).path.read_bytes()
    shutil.copytree(classifier, tmp_path / "elsewhere")

    assert capture(tmp_path / "elsewhere", tmp_path / "out.onnx").path.read_bytes() == first


@pytest.mark.slow
def test_lengths_can_be_fixed(classifier: Path, tmp_path: Path) -> None:
    options = SourceOptions(lengths={"sequence": 12, "batch": (1, 8)})

    model = capture(classifier, tmp_path / "out.onnx", options)

    assert [spec.shape for spec in model.inputs] == [(-1, 12), (-1, 12)]
    assert model.lengths == {"batch": (1, 8)}
    inputs = texts(3, 12)
    original = transformers.BertForSequenceClassification.from_pretrained(classifier)
    np.testing.assert_allclose(run(model, **inputs)[0], answers(original, inputs), atol=1e-5)


@pytest.mark.slow
def test_a_tokenizer_that_gives_types_makes_them_an_input(classifier: Path, tmp_path: Path) -> None:
    folder = tmp_path / "typed"
    shutil.copytree(classifier, folder)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_input_names": names, "model_max_length": 24}))

    model = capture(folder, tmp_path / "out.onnx")

    assert [spec.name for spec in model.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert model.lengths["sequence"] == (1, 24)
    inputs = {**texts(2, 7), "token_type_ids": np.array([[0, 0, 1, 1, 1, 0, 0]] * 2)}
    original = transformers.BertForSequenceClassification.from_pretrained(folder)
    np.testing.assert_allclose(run(model, **inputs)[0], answers(original, inputs), atol=1e-5)


def _sentence_folder(folder: Path, kinds: list[str], pooling: dict[str, Any]) -> Path:
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": "1_Pooling"} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.slow
def test_sentences_become_vectors_of_length_one(tmp_path: Path) -> None:
    torch.manual_seed(1)
    encoder = transformers.BertModel(bert_config())
    folder = saved(encoder, tmp_path / "encoder")
    _sentence_folder(folder, ["Transformer", "Pooling", "Normalize"], {"pooling_mode_mean_tokens": True})

    model = capture(folder, tmp_path / "out.onnx")

    inputs = texts(3, 8)
    kept = inputs["attention_mask"][:, :, None].astype(bool)
    expected = np.where(kept, answers(encoder, inputs, "last_hidden_state"), 0).sum(1) / kept.sum(1)
    assert [spec.name for spec in model.outputs] == ["embedding"]
    np.testing.assert_allclose(
        run(model, **inputs)[0], expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5
    )


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True}, [1.0, 5.0]),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, [3.0, 5.0]),
        ({"pooling_mode_mean_tokens": True}, [2.0, 4.5]),
        ({"pooling_mode": "mean"}, [2.0, 4.5]),
    ],
)
def test_pooling_leaves_padding_out(tmp_path: Path, pooling: dict[str, Any], expected: list[float]) -> None:
    read = Pooling.read(_sentence_folder(tmp_path, ["Transformer", "Pooling"], pooling))

    hidden = torch.tensor([[[1.0, 5.0], [3.0, 4.0], [9.0, 9.0]]])
    assert read(hidden, torch.tensor([[1, 1, 0]])).tolist() == [expected]


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (["Transformer", "Pooling", "Dense"], {}, "expected Transformer, Pooling and perhaps Normalize, got .*Dense"),
        (["Transformer", "Pooling"], {"pooling_mode_lasttoken": True}, "one of the poolings mean, cls and max, got"),
        (["Transformer", "Pooling"], {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "one of the"),
    ],
)
def test_another_pooling_is_refused(tmp_path: Path, kinds: list[str], pooling: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pooling.read(_sentence_folder(tmp_path, kinds, pooling))


def _image_model() -> Any:
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=CLASSES)
    return transformers.ViTForImageClassification(config)


def _convolutional() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )
    return transformers.ResNetForImageClassification(config)


@pytest.mark.slow
@pytest.mark.parametrize("make", [_image_model, _convolutional])
def test_images_are_classified(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(2)
    original = make()
    folder = saved(original, tmp_path / "images")
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))

    model = capture(folder, tmp_path / "out.onnx")

    assert [(spec.name, spec.shape) for spec in model.inputs] == [("pixel_values", (-1, 3, 16, 16))]
    inputs = {"pixel_values": np.random.default_rng(0).random((5, 3, 16, 16), np.float32)}
    np.testing.assert_allclose(run(model, **inputs)[0], answers(original, inputs), atol=1e-5)


def _distil() -> Any:
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "num_labels": CLASSES}
    config = transformers.DistilBertConfig(**sizes, vocab_size=WORDS, max_position_embeddings=LONGEST)
    return transformers.DistilBertForTokenClassification(config)


def _qwen() -> Any:
    config = transformers.Qwen2Config(**SMALL, vocab_size=WORDS, max_position_embeddings=LONGEST, num_key_value_heads=1)
    return transformers.Qwen2ForCausalLM(config)


def _roberta() -> Any:
    config = transformers.RobertaConfig(**SMALL, vocab_size=WORDS, max_position_embeddings=LONGEST, type_vocab_size=1)
    return transformers.RobertaForMaskedLM(config)


@pytest.mark.slow
@pytest.mark.parametrize("make", [_distil, _qwen, _roberta])
def test_every_token_gets_its_answer(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(3)
    original = make()
    folder = saved(original, tmp_path / "tokens")

    model = capture(folder, tmp_path / "out.onnx")

    assert [model.axes[spec.name][:2] for spec in (*model.inputs, *model.outputs)] == [("batch", "sequence")] * 3
    inputs = texts(3, 10)
    expected, got = answers(original, inputs), run(model, **inputs)[0]
    counted = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(got[counted], expected[counted], atol=1e-4)


@pytest.mark.slow
def test_an_adapter_is_merged_with_its_classifier(tmp_path: Path) -> None:
    import peft

    torch.manual_seed(4)
    base = saved(transformers.BertModel(bert_config()), tmp_path / "base")
    with quiet():
        untuned = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=5)
        tuned = peft.get_peft_model(untuned, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "classifier" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        tuned.save_pretrained(tmp_path / "adapter")
    options = SourceOptions(task="text-classification", adapter=tmp_path / "adapter")

    model = capture(base, tmp_path / "out.onnx", options)

    inputs = texts(3, 6)
    assert model.outputs[0].shape == (-1, 5)
    np.testing.assert_allclose(run(model, **inputs)[0], answers(tuned, inputs), atol=1e-5)
    assert model.sha256 != digest(base)
    with pytest.raises(InputError, match=r"holds no weights for classifier\.bias, classifier\.weight"):
        capture(base, tmp_path / "none.onnx", SourceOptions(task="text-classification"))


@pytest.fixture
def folder(classifier: Path, tmp_path: Path) -> Path:
    """A copy of the classifier, to be broken."""
    return Path(shutil.copytree(classifier, tmp_path / "broken"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SourceOptions(task="text-clasification"), "task: expected one of image-classification, text-classification"),
        (SourceOptions(adapter=Path("/nowhere")), r"adapter: expected a folder with adapter_config\.json"),
        (SourceOptions(factory="a:b"), "takes no 'factory'"),
        (SourceOptions(lengths={"sequence": 4096}), r"lengths\.sequence: expected 1 to 40, got 4096"),
        (SourceOptions(lengths={"width": 64}), r"lengths\.width: the model has no such axis; it has batch, sequence"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, options: SourceOptions, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        capture(folder, tmp_path / "out.onnx", options)


def test_an_architecture_of_no_task_is_refused(folder: Path, tmp_path: Path) -> None:
    edit(folder, architectures=["BertForNextSentencePrediction"])

    with pytest.raises(InputError, match="cannot tell the task from the architecture 'BertForNextSentencePrediction'"):
        capture(folder, tmp_path / "out.onnx")


def test_a_head_that_the_folder_does_not_hold_is_not_made_up(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no weights for qa_outputs"):
        capture(folder, tmp_path / "out.onnx", SourceOptions(task="question-answering"))


def test_a_folder_without_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()

    with pytest.raises(InputError, match=r"expected weights in model\.safetensors"):
        capture(folder, tmp_path / "out.onnx")


def test_weights_that_are_cut_short_are_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(InputError, match="transformers cannot load it as text-classification"):
        capture(folder, tmp_path / "out.onnx")


@pytest.mark.parametrize("text", ["", "[", "3", "[" * 100_000])
def test_a_configuration_that_is_none_is_refused(folder: Path, tmp_path: Path, text: str) -> None:
    (folder / "config.json").write_text(text)

    with pytest.raises(InputError, match=r"config\.json"):
        capture(folder, tmp_path / "out.onnx")
