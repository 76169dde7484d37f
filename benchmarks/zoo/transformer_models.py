"""Transformer architectures by Hugging Face's library, as modules with plain tensors in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

GROUPS = 20  # of the newsgroups that the classifiers tell apart
VOCABULARY = 30522  # of the tokenizer that the samples come from
_SEGMENTS: Mapping[str, Any] = {"num_labels": 150}
_CLASSIFIER: Mapping[str, Any] = {"num_labels": GROUPS, "vocab_size": VOCABULARY}


class Logits(nn.Module):
    """Any model for tokens, down to its logits."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__()
        self.model = model
        self._options = options

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits of [batch, sequence] token ids and their mask."""
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, **self._options)
        return cast("Tensor", result.logits)


class SentenceEncoder(nn.Module):
    """all-MiniLM-L6-v2 whole: the encoder, the mean over tokens that are no padding, length 1."""

    def __init__(self, config: bytes, weights: bytes) -> None:
        super().__init__()
        self.encoder = BertModel(BertConfig(**json.loads(config)), add_pooling_layer=False)
        state = load_safetensors(weights)
        missing, _ = self.encoder.load_state_dict(state, strict=False)
        if set(missing) - {"embeddings.position_ids", "embeddings.token_type_ids"}:
            raise ValueError(f"weights of MiniLM are missing: {missing[:3]}")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return embeddings [batch, 384]."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(2).to(states.dtype)
        mean = (states * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return functional.normalize(mean, dim=1)


class Segmenter(nn.Module):
    """SegFormer-b0, with 150 classes for each pixel at a quarter of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [batch, 150, height / 4, width / 4]."""
        return cast("Tensor", self.model(pixel_values=image).logits)


class SpeechEncoder(nn.Module):
    """The encoder of Whisper-tiny for 10 seconds of sound."""

    def __init__(self) -> None:
        super().__init__()
        config = WhisperConfig(
            d_model=384,
            encoder_layers=4,
            encoder_attention_heads=6,
            encoder_ffn_dim=1536,
            num_mel_bins=80,
            max_source_positions=500,
        )
        self.model = WhisperEncoder(config)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Return states [batch, 500, 384] of spectrograms [batch, 80, 1000]."""
        return cast("Tensor", self.model(spectrogram).last_hidden_state)


def bert_base() -> Logits:
    """Return BERT-base that tells 20 groups apart."""
    return Logits(BertForSequenceClassification(BertConfig(**_CLASSIFIER)))


def distilbert() -> Logits:
    """Return DistilBERT that tells 20 groups apart."""
    config = DistilBertConfig(**_CLASSIFIER)
    return Logits(DistilBertForSequenceClassification(config))


def llama() -> Logits:
    """Return a Llama of 4 layers."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    return Logits(LlamaForCausalLM(config), use_cache=False)


def qwen() -> Logits:
    """Return a Qwen2 of 4 layers, whose queries share keys."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return Logits(Qwen2ForCausalLM(config), use_cache=False)


def head_of(model: Logits) -> nn.Linear:
    """Return the classifier's last layer."""
    return cast("nn.Linear", model.model.classifier)
