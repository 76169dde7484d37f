"""Transformers models as modules that take and return named tensors, and the pooling of sentence encoders."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from compiler.sources.huggingface import read_json
from isthmus.errors import InputError

_TINY: Final = 1e-9  # keeps an empty text from dividing by zero, as sentence-transformers does
_MODES: Final = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the vectors of a text's tokens become one: as sentence-transformers does it."""

    mode: str = "mean"  # or "cls", or "max"
    normalise: bool = True  # to length 1

    @classmethod
    def read(cls, folder: Path) -> Pooling:
        """Return what modules.json and 1_Pooling/config.json say; without them, the normalised mean.

        Raises:
            InputError: They ask for something else than a mean, the first token or a maximum.
        """
        if not (folder / "modules.json").is_file():
            return cls()
        modules = read_json(folder / "modules.json")
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules if isinstance(module, dict)]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise InputError(
                f"{folder / 'modules.json'}: expected Transformer, Pooling and perhaps Normalize, got "
                f"{', '.join(kinds)[:200]}",
                hint="export the model with torch.export.save or torch.onnx.export",
            )
        path = folder / (str(modules[1].get("path", "")) or "1_Pooling") / "config.json"
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{folder / 'modules.json'}: expected a path in the folder, got {path}")
        config = read_json(path)
        chosen = [mode for key, mode in _MODES.items() if config.get(key)]
        known = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        mode = config.get("pooling_mode") or (chosen[0] if len(chosen) == len(known) == 1 else "")
        if mode not in _MODES.values():
            raise InputError(f"{path}: expected one of the poolings mean, cls and max, got {', '.join(known)[:200]}")
        return cls(mode, "Normalize" in kinds)

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return one vector for each text; `hidden` is [batch, sequence, width], `mask` [batch, sequence]."""
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        if self.mode == "cls":
            pooled = hidden[:, 0]
        elif self.mode == "max":
            pooled = hidden.masked_fill(weights == 0, torch.finfo(hidden.dtype).min).amax(1)
        else:
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=_TINY)
        return torch.nn.functional.normalize(pooled, p=2.0, dim=1) if self.normalise else pooled


class TextModule(torch.nn.Module):
    """A model of token ids.

    Args:
        model: The transformers model, with eager attention.
        outputs: What to return of its answer.
        pooling: How to make one vector of each text, or nothing.
        plain: Build the attention mask here, as one addition. Transformers' own becomes gathers over index grids, which
            some targets cannot take and none needs.
    """

    def __init__(self, model: Any, outputs: tuple[str, ...], pooling: Pooling | None, *, plain: bool) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs
        self.pooling = pooling
        self.plain = plain
        self.causal = outputs == ("logits",) and hasattr(model, "generate") and model.can_generate()
        taken = inspect.signature(model.forward).parameters
        self.has_types = "token_type_ids" in taken and getattr(model.config, "type_vocab_size", 0) > 0

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the outputs by name; all inputs are int64 [batch, sequence], tokens that count are 1 in the mask."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if token_type_ids is None and self.has_types and self.plain:
            # One type for all: a vector that is folded, where the model's own default is a gather.
            token_type_ids = torch.zeros((1, 1), dtype=torch.int64)
        more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        given = self._additive(mask) if self.plain else attention_mask
        result = self.model(input_ids=input_ids, attention_mask=given, return_dict=True, **more)
        if self.pooling is None:
            return {name: result[name] for name in self.outputs}
        return {self.outputs[0]: self.pooling(result.last_hidden_state, mask)}

    def _additive(self, mask: torch.Tensor) -> torch.Tensor:
        """Return what is added to the scores of attention: float32 [batch, 1, 1 or sequence, sequence]."""
        hidden = torch.finfo(torch.float32).min
        seen = mask[:, None, None, :]
        if self.causal:
            position = torch.arange(mask.shape[1])
            seen = seen * (position[None, :] <= position[:, None]).to(mask.dtype)
        return (1.0 - seen.to(torch.float32)) * hidden


class ImageModule(torch.nn.Module):
    """A model of images."""

    def __init__(self, model: Any, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the outputs by name."""
        result = self.model(pixel_values=pixel_values, return_dict=True)
        return {name: result[name] for name in self.outputs}
