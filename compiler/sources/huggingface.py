"""Hugging Face model folders: config.json and safetensors, with or without a LoRA adapter to merge.

Inputs are those that the folder's tokenizer or image processor gives (token_type_ids only where its tokenizer says so).
Attention is exported as plain matrix products and softmax, which every target knows. Nothing is downloaded, no code of
the folder is run, and a weight that the folder does not hold is an error, not a random number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compiler.sources import Exported, SourceOptions
from compiler.sources.axes import BATCH
from compiler.sources.onnx_file import refuse
from isthmus.errors import InputError

if TYPE_CHECKING:
    import torch

    from compiler.sources.huggingface_module import TextModule

SEQUENCE: Final = "sequence"
LONGEST: Final = 2048  # tokens, unless lengths says otherwise: what models of long contexts are measured with
_MAX_JSON_BYTES: Final = 64 << 20
_FACTS: Final = ("config.json", "modules.json", "tokenizer_config.json", "preprocessor_config.json",
                 "sentence_bert_config.json", "1_Pooling/config.json")  # fmt: skip
_EXAMPLES: Final = ({BATCH: 3, SEQUENCE: 11}, {BATCH: 2, SEQUENCE: 7})  # what is traced, and what is compared
_IMAGE_SIZE: Final = 224  # pixels, where no file says


@dataclass(frozen=True, slots=True)
class Task:
    """What a model is for: the class that loads it, and the outputs that are kept."""

    auto_class: str
    outputs: tuple[str, ...]
    suffix: str  # of the class that config.json names


TASKS: Final[Mapping[str, Task]] = {
    "image-classification": Task("AutoModelForImageClassification", ("logits",), "ForImageClassification"),
    "text-classification": Task("AutoModelForSequenceClassification", ("logits",), "ForSequenceClassification"),
    "token-classification": Task("AutoModelForTokenClassification", ("logits",), "ForTokenClassification"),
    "question-answering": Task("AutoModelForQuestionAnswering", ("start_logits", "end_logits"), "ForQuestionAnswering"),
    "fill-mask": Task("AutoModelForMaskedLM", ("logits",), "ForMaskedLM"),
    "causal-lm": Task("AutoModelForCausalLM", ("logits",), "ForCausalLM"),
    "sentence-embedding": Task("AutoModel", ("embedding",), ""),
    "feature-extraction": Task("AutoModel", ("last_hidden_state",), "Model"),
}
_ALSO: Final = {"LMHeadModel": "causal-lm"}


class HuggingFace:
    """A folder that save_pretrained wrote."""

    def files(self, source: str, options: SourceOptions) -> Mapping[str, Path]:
        """Return the configuration and the weights, and the adapter's."""
        refuse(source, options, "a Hugging Face folder", ("factory",))
        folder = Path(source)
        names = [name for name in _FACTS if (folder / name).is_file()]
        names += _weights(folder, "model.safetensors", "pytorch_model.bin", options)
        files = {name: folder / name for name in names}
        if options.adapter is not None:
            if not (options.adapter / "adapter_config.json").is_file():
                raise InputError(f"adapter: expected a folder with adapter_config.json, got {options.adapter}")
            parts = _weights(options.adapter, "adapter_model.safetensors", "adapter_model.bin", options)
            files |= {f"adapter/{name}": options.adapter / name for name in ("adapter_config.json", *parts)}
        return files

    def to_onnx(self, source: str, options: SourceOptions, folder: Path) -> Exported:
        """Return the model as ONNX, with the adapter merged."""
        from compiler.sources.torch_module import export_module

        self.files(source, options)
        path = Path(source)
        config = read_json(path / "config.json")
        task = _task(path, config, options)
        with _silent():
            model = _load(path, config, task, options)
            inputs = _inputs(path, model)
            module = _wrapped(model, path, task, inputs)
        constants = {name for name in inputs if name in options.constants and name in _ZERO}
        _check_constants(constants, options)
        inputs = [name for name in inputs if name not in constants]
        fixed = {name: size for name, size in options.lengths.items() if isinstance(size, int)}
        lengths = {SEQUENCE: (1, _longest(path, model.config))} if inputs != ["pixel_values"] else {}
        _check_lengths(source, options, lengths)
        examples = [_example(inputs, path, model, {**sizes, **fixed}) for sizes in _EXAMPLES]
        varying = [axis for axis in (BATCH, *lengths) if axis not in fixed]
        axes = {name: {(BATCH, SEQUENCE).index(axis): axis for axis in varying} for name in inputs}
        exported = export_module(
            module, examples[0], axes, options=options, path=folder / "model.onnx", what=source, other=examples[1]
        )
        return Exported(exported, lengths, used=frozenset({*fixed, *constants}))


_ZERO: Final = ("token_type_ids",)  # inputs that are zero when nobody gives them


def read_json(path: Path) -> Any:
    """Return the JSON object in the file.

    Raises:
        InputError: It cannot be read or holds something else.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise InputError(f"{path}: expected at most {_MAX_JSON_BYTES} bytes")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON document: {str(error)[:200]}") from error
    if not isinstance(document, dict | list):
        raise InputError(f"{path}: expected a JSON object")
    return document


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from printing bars and advice, and from looking for anything outside this machine."""
    import logging

    from huggingface_hub import constants
    from transformers.utils import logging as transformers_logging

    from compiler.sources.torch_module import quiet

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _weights(folder: Path, safe: str, pickled: str, options: SourceOptions) -> list[str]:
    """Return the names of the files of weights: one, or an index and its parts."""
    if (folder / safe).is_file():
        return [safe]
    index = f"{safe}.index.json"
    if (folder / index).is_file():
        document = read_json(folder / index)
        parts = document.get("weight_map", {}) if isinstance(document, dict) else {}
        names = sorted({str(name) for name in parts.values()}) if isinstance(parts, dict) else []
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
                raise InputError(f"{folder / index}: expected safetensors files of the same folder, got {name[:200]!r}")
        if names:
            return [index, *names]
    if (folder / pickled).is_file():
        if not options.allow_pickle:
            raise InputError(
                f"{folder / pickled}: a pickle, which can run code when it is read",
                hint="save the model anew with save_pretrained (safetensors), or set allow_pickle = true",
            )
        return [pickled]
    raise InputError(f"{folder}: expected weights in {safe}", hint="save_pretrained writes it")


def _task(folder: Path, config: Any, options: SourceOptions) -> str:
    if options.task:
        if options.task not in TASKS:
            from difflib import get_close_matches

            close = get_close_matches(options.task, TASKS, n=1)
            hint = f"did you mean {close[0]}?" if close else "mend the recipe"
            raise InputError(f"task: expected one of {', '.join(TASKS)}, got {options.task[:80]!r}", hint=hint)
        return options.task
    names = config.get("architectures") or [""] if isinstance(config, dict) else [""]
    name = str(names[0])
    for suffix, task in _ALSO.items():
        if name.endswith(suffix):
            return task
    for task, what in TASKS.items():
        if what.suffix and name.endswith(what.suffix):
            sentences = task == "feature-extraction" and (folder / "modules.json").is_file()
            return "sentence-embedding" if sentences else task
    raise InputError(
        f"{folder / 'config.json'}: cannot tell the task from the architecture {name[:80]!r}",
        hint=f"task = one of {', '.join(TASKS)}",
    )


def _load(folder: Path, config: Any, task: str, options: SourceOptions) -> Any:
    """Return the model with all its weights, in float32, the adapter merged."""
    import torch
    import transformers

    if isinstance(config, dict) and config.get("auto_map"):
        raise InputError(
            f"{folder}: the model's code is in the folder, and is not run from there",
            hint="export the model with torch.export.save or torch.onnx.export",
        )
    changes: dict[str, Any] = {}
    heads: tuple[str, ...] = ()
    if options.adapter is not None:
        heads, classes = _adapter_heads(options.adapter)
        changes = {"num_labels": classes} if classes else {}
    auto_class = getattr(transformers, TASKS[task].auto_class)
    safe = (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file()
    try:
        model, loading = auto_class.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=safe, weights_only=True,
            dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **changes,
        )  # fmt: skip
    except Exception as error:  # transformers raises whatever a broken folder leads it to
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(f"{folder}: transformers cannot load it as {task}: {reason}") from error
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith(heads) or not heads)
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading["mismatched_keys"])
    if missing or mismatched:
        raise InputError(
            f"{folder}: holds no weights for {', '.join([*missing, *mismatched][:3])} of a model for {task}",
            hint="name the task that it was trained for",
        )
    if options.adapter is not None:
        model = _merged(model, options.adapter)
    model.config.use_cache = False
    return model.eval()


def _adapter_heads(adapter: Path) -> tuple[tuple[str, ...], int]:
    """Return the modules that the adapter brings whole (heads, mostly) and how many classes its classifier has."""
    from safetensors import SafetensorError, safe_open

    path = adapter / "adapter_model.safetensors"
    config = read_json(adapter / "adapter_config.json")
    modules = config.get("modules_to_save") if isinstance(config, dict) else None
    heads = {str(name) for name in modules or ()}
    classes = 0
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    parts = name.removeprefix("base_model.model.").split(".")
                    if ".lora_" not in name:
                        heads.add(parts[0])
                    if parts[0] in ("classifier", "score") and parts[-1] == "weight" and ".lora_" not in name:
                        classes = int(file.get_slice(name).get_shape()[0])
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a safetensors file: {str(error)[:200]}") from error
    return tuple(sorted(heads)), classes


def _merged(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter), local_files_only=True).merge_and_unload(safe_merge=True)
    except Exception as error:  # peft raises whatever does not fit
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{adapter}: peft cannot merge it: {type(error).__name__}: {reason}") from error


def _inputs(folder: Path, model: Any) -> list[str]:
    """Return the names of the inputs: those that the folder's tokenizer gives, or the image."""
    import inspect

    if model.main_input_name == "pixel_values":
        return ["pixel_values"]
    if model.main_input_name != "input_ids":
        raise InputError(
            f"{folder}: expected a model of text or images, got one of {model.main_input_name}",
            hint="export the model with torch.export.save or torch.onnx.export",
        )
    taken = inspect.signature(model.forward).parameters
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    given = config.get("model_input_names") if isinstance(config, dict) else None
    names = given if isinstance(given, list) else ["input_ids", "attention_mask"]
    return [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in taken and name in names]


def _longest(folder: Path, config: Any) -> int:
    """Return the longest text that the model takes, in tokens."""
    longest = getattr(config, "max_position_embeddings", None) or LONGEST
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):  # positions start after the padding
        longest -= (config.pad_token_id or 0) + 1
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        document = read_json(folder / name) if (folder / name).is_file() else {}
        limit = document.get(key) if isinstance(document, dict) else None
        if isinstance(limit, int) and limit > 0:
            longest = min(longest, limit)
    return max(1, min(int(longest), LONGEST))


def _check_lengths(source: str, options: SourceOptions, lengths: Mapping[str, tuple[int, int]]) -> None:
    known = (BATCH, *lengths)
    for name, length in options.lengths.items():
        longest = length if isinstance(length, int) else length[1]
        if name not in known:
            raise InputError(f"{source}: lengths.{name}: the model has no such axis; it has {', '.join(known)}")
        if longest < 1 or (name == SEQUENCE and longest > max(lengths[SEQUENCE][1], LONGEST)):
            raise InputError(f"{source}: lengths.{name}: expected 1 to {lengths.get(name, (1, 1))[1]}, got {longest}")


def _check_constants(constants: set[str], options: SourceOptions) -> None:
    for name in constants:
        if options.constants[name] != 0:
            raise InputError(f"constants.{name}: expected 0, got {options.constants[name]}")


def _example(inputs: list[str], folder: Path, model: Any, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(0)
    batch, sequence = sizes[BATCH], sizes[SEQUENCE]
    if inputs == ["pixel_values"]:
        channels, height, width = _image(folder, model.config)
        return {"pixel_values": torch.rand((batch, channels, height, width), generator=generator)}
    words = model.config.vocab_size
    example = {"input_ids": torch.randint(0, words, (batch, sequence), generator=generator)}
    if "attention_mask" in inputs:
        mask = torch.ones((batch, sequence), dtype=torch.int64)
        mask[0, sequence - sequence // 3 :] = 0  # a text that is shorter than the others
        example["attention_mask"] = mask
    if "token_type_ids" in inputs:
        example["token_type_ids"] = torch.zeros((batch, sequence), dtype=torch.int64)
    return example


def _image(folder: Path, config: Any) -> tuple[int, int, int]:
    """Return channels, height and width of the images, as the processor gives them, or else the configuration."""
    path = folder / "preprocessor_config.json"
    processor = read_json(path) if path.is_file() else {}
    size: Any = getattr(config, "image_size", None)
    if isinstance(processor, dict) and size is None:
        size = processor.get("crop_size") or processor.get("size")
    if isinstance(size, dict):
        size = (size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge")))
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(config, "num_channels", 3)
    return int(channels), int(height or _IMAGE_SIZE), int(width or _IMAGE_SIZE)


def _wrapped(model: Any, folder: Path, task: str, inputs: list[str]) -> torch.nn.Module:
    """Return a module that takes the inputs by name and returns the task's outputs by name."""
    from compiler.sources.huggingface_module import ImageModule, Pooling, TextModule

    outputs = TASKS[task].outputs
    if inputs == ["pixel_values"]:
        if task == "sentence-embedding":
            raise InputError(f"{folder}: a model of images has no sentences", hint='task = "feature-extraction"')
        return ImageModule(model, outputs)
    pooling = Pooling.read(folder) if task == "sentence-embedding" else None
    plain = TextModule(model, outputs, pooling, plain=True)
    usual = TextModule(model, outputs, pooling, plain=False)
    return plain if _same(plain, usual, _example(inputs, folder, model, _EXAMPLES[0])) else usual


def _same(plain: TextModule, usual: TextModule, example: Mapping[str, torch.Tensor]) -> bool:
    """Return whether the plain mask gives what transformers' own gives, where nothing but its sizes matters."""
    import torch

    kinds = set(getattr(usual.model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:  # a window is not seen in a short example
        return False
    with torch.no_grad():
        wanted = usual(**example)
        try:
            got = plain(**example)
        except Exception:  # the model's code wants its own mask
            return False
    counted = example.get("attention_mask", torch.ones_like(example["input_ids"])).bool()
    for name, expected in wanted.items():
        ours = got[name]
        if expected.shape[:2] == counted.shape:  # what comes out at padding is nobody's business
            expected, ours = expected[counted], ours[counted]
        if not torch.allclose(expected, ours, rtol=1e-4, atol=1e-5):
            return False
    return True
