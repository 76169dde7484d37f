"""Tiny models with random weights, as people save them; each is made once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WORDS, LONGEST, CLASSES = 50, 40, 3
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries warn of what tests do with them on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def bert_config() -> Any:
    from transformers import BertConfig

    return BertConfig(**SMALL, vocab_size=WORDS, max_position_embeddings=LONGEST, num_labels=CLASSES)


def saved(model: Any, folder: Path) -> Path:
    from transformers.utils import logging

    logging.disable_progress_bar()
    with quiet():
        model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT that tells three classes of text apart; read only."""
    import torch
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    return saved(BertForSequenceClassification(bert_config()), tmp_path_factory.mktemp("hf") / "classifier")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pt2 file: y = x W + b, with a batch of 1 to 32, named "logits"; read only."""
    import torch

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 4)

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.linear(images)}

    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=32)
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    with quiet():
        exported = torch.export.export(Linear(), (torch.rand(3, 8),), dynamic_shapes={"images": {0: batch}})
        torch.export.save(exported, path)
    return path
