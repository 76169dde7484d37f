"""A small BERT encoder with a classification head, in plain torch, for the weights of all-MiniLM-L6-v2.

The heavy model is the whole encoder. The light model is a slice of it: the embeddings, the first layers and only
the first tokens. Both take the same inputs, because the slice is taken inside the graph: a device and the cloud
can be sent the very same request.

Padding is masked twice, in the attention and in the mean over tokens, so an answer does not depend on how far a
text was padded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional

# Added to the attention score of padding. Finite, so that a row of padding alone gives no NaN, and small enough
# for half precision.
MASKED_SCORE = -1e4

# Names in the published checkpoint -> names of the modules below.
_RENAMED = (
    ("encoder.layer.", "layers."),
    ("attention.self.", "attention."),
    ("attention.output.dense.", "attention.output."),
    ("attention.output.LayerNorm.", "attention.norm."),
    ("intermediate.dense.", "expand."),
    ("output.dense.", "contract."),
    ("output.LayerNorm.", "norm."),
    ("embeddings.LayerNorm.", "embeddings.norm."),
    ("embeddings.word_embeddings.", "embeddings.word."),
    ("embeddings.position_embeddings.", "embeddings.position."),
    ("embeddings.token_type_embeddings.", "embeddings.kind."),
)


class WeightsError(Exception):
    """A checkpoint is unreadable or does not fit the model that it is to be loaded into."""


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """The sizes of an encoder."""

    vocabulary: int
    positions: int
    hidden: int
    intermediate: int
    heads: int
    layers: int
    norm_epsilon: float = 1e-12

    def __post_init__(self) -> None:
        """Refuse sizes of which no encoder can be built."""
        sizes = (self.vocabulary, self.positions, self.hidden, self.intermediate, self.heads, self.layers)
        if min(sizes) < 1 or self.hidden % self.heads:
            raise WeightsError(f"expected positive sizes and hidden divisible by heads, got {self}")

    @classmethod
    def parse(cls, config: bytes) -> EncoderShape:
        """Read the ``config.json`` of a published checkpoint.

        Raises:
            WeightsError: not JSON, a size is missing, or it is not a BERT.
        """
        try:
            found = json.loads(config)
            if found["model_type"] != "bert" or found["hidden_act"] != "gelu":
                raise WeightsError(
                    f"expected a bert with gelu, got {found['model_type']!r} with {found['hidden_act']!r}"
                )
            return cls(
                vocabulary=int(found["vocab_size"]),
                positions=int(found["max_position_embeddings"]),
                hidden=int(found["hidden_size"]),
                intermediate=int(found["intermediate_size"]),
                heads=int(found["num_attention_heads"]),
                layers=int(found["num_hidden_layers"]),
                norm_epsilon=float(found["layer_norm_eps"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"the encoder's config.json is unusable: {error!r}") from error

    def slice(self, *, layers: int, positions: int) -> EncoderShape:
        """Return the shape of the first ``layers`` layers over the first ``positions`` tokens."""
        if not (0 < layers <= self.layers and 0 < positions <= self.positions):
            raise WeightsError(f"cannot slice {layers} layers and {positions} positions out of {self}")
        return replace(self, layers=layers, positions=positions)


class Embeddings(nn.Module):
    """Word, position and kind-of-text embeddings, summed and normalised."""

    def __init__(self, shape: EncoderShape, dropout: float) -> None:
        """Build the tables; a text is always of kind 0, the second row is kept for the checkpoint's sake."""
        super().__init__()
        self.word = nn.Embedding(shape.vocabulary, shape.hidden)
        self.position = nn.Embedding(shape.positions, shape.hidden)
        self.kind = nn.Embedding(2, shape.hidden)
        self.norm = nn.LayerNorm(shape.hidden, eps=shape.norm_epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed INT64 ``[batch, tokens]`` as ``[batch, tokens, hidden]``."""
        place = self.position.weight[: ids.shape[1]] + self.kind.weight[0]
        embedded: Tensor = self.dropout(self.norm(self.word(ids) + place))
        return embedded


class Attention(nn.Module):
    """Multi-head self-attention with its residual."""

    def __init__(self, shape: EncoderShape, dropout: float) -> None:
        """Build the four projections."""
        super().__init__()
        self.heads = shape.heads
        self.query = nn.Linear(shape.hidden, shape.hidden)
        self.key = nn.Linear(shape.hidden, shape.hidden)
        self.value = nn.Linear(shape.hidden, shape.hidden)
        self.output = nn.Linear(shape.hidden, shape.hidden)
        self.norm = nn.LayerNorm(shape.hidden, eps=shape.norm_epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """Attend; ``bias`` is added to the scores, ``[batch, 1, 1, tokens]``."""
        query, key, value = (
            project(hidden).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5) + bias
        mixed = (self.dropout(scores.softmax(dim=3)) @ value).transpose(1, 2).flatten(2)
        attended: Tensor = self.norm(hidden + self.dropout(self.output(mixed)))
        return attended


class Layer(nn.Module):
    """One encoder layer."""

    def __init__(self, shape: EncoderShape, dropout: float) -> None:
        """Build the attention and the feed-forward part."""
        super().__init__()
        self.attention = Attention(shape, dropout)
        self.expand = nn.Linear(shape.hidden, shape.intermediate)
        self.contract = nn.Linear(shape.intermediate, shape.hidden)
        self.norm = nn.LayerNorm(shape.hidden, eps=shape.norm_epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """Transform ``[batch, tokens, hidden]``."""
        hidden = self.attention(hidden, bias)
        fed: Tensor = self.norm(hidden + self.dropout(self.contract(functional.gelu(self.expand(hidden)))))
        return fed


class MiniLmClassifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head."""

    def __init__(self, shape: EncoderShape, classes: int, dropout: float = 0.1) -> None:
        """Build a model with fresh weights; :meth:`load_encoder` brings the published ones."""
        super().__init__()
        self.shape = shape
        self.embeddings = Embeddings(shape, dropout)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.layers))
        self.head = nn.Linear(shape.hidden, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Classify token ids; tokens beyond the model's positions are not looked at."""
        ids = input_ids[:, : self.shape.positions]
        mask = attention_mask[:, : self.shape.positions].to(self.head.weight.dtype)
        bias = (1.0 - mask)[:, None, None, :] * MASKED_SCORE
        hidden = self.embeddings(ids)
        for layer in self.layers:
            hidden = layer(hidden, bias)
        weights = mask[:, :, None]
        mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
        logits: Tensor = self.head(self.dropout(mean))
        return logits

    def load_encoder(self, checkpoint: Mapping[str, Tensor]) -> None:
        """Take the weights of the encoder, or of as much of it as this model has, from a published checkpoint.

        Raises:
            WeightsError: a weight is missing or has another shape.
        """
        renamed = {_rename(name): tensor for name, tensor in checkpoint.items()}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if not name.startswith("head."):
                    parameter.copy_(_fit(name, renamed.get(name), parameter))

    def freeze_bottom(self, layers: int) -> None:
        """Keep the embeddings and the first ``layers`` layers as they are."""
        for part in (self.embeddings, *list(self.layers)[:layers]):
            part.requires_grad_(False)


def read_checkpoint(content: bytes) -> dict[str, Tensor]:
    """Read a safetensors file held in memory.

    Raises:
        WeightsError: it is not one.
    """
    try:
        return load_safetensors(content)
    except SafetensorError as error:
        raise WeightsError(f"the encoder's weights are not a safetensors file: {error}") from error


def _rename(name: str) -> str:
    for published, ours in _RENAMED:
        name = name.replace(published, ours)
    return name


def _fit(name: str, found: Tensor | None, wanted: Tensor) -> Tensor:
    """Check one weight; a position table may be longer than needed."""
    if found is not None and name == "embeddings.position.weight":
        found = found[: len(wanted)]
    if found is None or found.shape != wanted.shape:
        came = "nothing" if found is None else list(found.shape)
        raise WeightsError(f"weight {name}: expected shape {list(wanted.shape)}, got {came}")
    return found
