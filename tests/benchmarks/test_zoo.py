from __future__ import annotations

import numpy as np
import pytest

from benchmarks.zoo import MODELS, pictures, texts

NAMED = {
    "minilm", "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "silero-vad", "magika",
    "rapidocr-detector", "rapidocr-recogniser", "ddddocr", "nudenet", "basic-pitch", "resnet18", "resnet50",
    "mobilenetv3-small", "vit-tiny", "convnext-atto", "bert-base", "distilbert", "llama-4-layers", "qwen2-4-layers",
}  # fmt: skip


def test_every_model_that_must_be_there_is_there_and_states_source_and_licence() -> None:
    assert set(MODELS) >= NAMED
    assert all(name == model.name and model.source and model.licence for name, model in MODELS.items())


def test_rendered_words_are_legible_and_the_same_for_the_same_seed() -> None:
    first = pictures.words(2, 5, 48, 160, channels=3)
    assert first.shape == (2, 3, 48, 160)
    assert np.array_equal(first, pictures.words(2, 5, 48, 160, channels=3))
    assert not np.array_equal(first, pictures.words(2, 6, 48, 160, channels=3))
    assert all(picture.max() - picture.min() > 0.3 for picture in first)  # ink on paper


@pytest.mark.parametrize("make", [texts.notes, texts.speech])
def test_sounds_stay_within_full_scale_and_differ(make: object) -> None:
    sounds = make(3, 1, 576, 16000)  # type: ignore[operator]
    assert sounds.shape == (3, 576)
    assert sounds.dtype == np.float32
    assert np.abs(sounds).max() <= 1
    assert len({sound.tobytes() for sound in sounds}) == 3


def test_requests_put_the_batch_axis_where_the_model_has_it_and_add_constants() -> None:
    silero = MODELS["silero-vad"]
    samples = {"input": np.zeros((3, 576), np.float32), "state": np.arange(768, dtype=np.float32).reshape(3, 2, 1, 128)}
    request = silero.feed(samples, 1, 2)
    assert request["input"].shape == (2, 576)
    assert request["state"].shape == (2, 2, 128)
    assert np.array_equal(request["state"][:, 1], samples["state"][2, :, 0])
    assert request["sr"] == 16000
