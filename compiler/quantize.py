"""Fewer bits by NNCF: 8-bit weights and activations with ranges from samples, or packed weights alone.

Rules:
* The same graph and samples give the same weights: no randomness, samples in their order.
* The setting "default" has no bias correction. It would mix the rounding errors of this version into the biases, and
  the next version could not be put on the same grid (compiler.grid) without knowing them. On the encoders measured it
  changed nothing: 63.84 % right with it and without it, logits 0.0275 from the source (root mean square) either way.
  Convolutional networks do gain from it, and have it from the second setting on.
* Smoothing stays on: it halves the largest error of a transformer's logits (0.17 instead of 0.35) and can be undone.

The settings of `quantize`, from the fastest to the gentlest; on EfficientNet-Lite0 with its published weights each step
brings the logits nearer to the source (mean cosine 0.968, 0.977, 0.983 for the first three) and none of them makes it
faster:
    default         symmetric activations (a transformer: NNCF's mode for those)
    corrected       biases corrected, ranges of activations from histograms
    ends-kept       and the first convolution (without one: the last product) in float32
    depthwise-kept  and the depthwise convolutions in float32
`control` goes on from there: it measures the accuracy itself and takes operators back until it is high enough.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from compiler.capture import CapturedModel
from compiler.data import request
from compiler.targets import Labels
from isthmus.errors import InputError
from isthmus.privacy import forbid_usage_reports
from isthmus.tensors import Array

forbid_usage_reports()
import nncf  # noqa: E402  # after usage reports are off
from nncf.quantization.advanced_parameters import GroupSizeFallbackMode, QuantizationParameters  # noqa: E402
from nncf.quantization.range_estimator import RangeEstimatorParametersSet  # noqa: E402

MAX_SAMPLES: Final = 300
MAX_VALIDATED: Final = 1000  # samples that `control` measures the accuracy on, again and again
_RANKED: Final = 100  # of them, those that it ranks operators by
SETTINGS: Final = ("default", "corrected", "ends-kept", "depthwise-kept")
_INT4_GROUP: Final = 64  # weights that share a scale; fewer where the axis is shorter
_ERRORS: Final = (nncf.errors.InternalError, nncf.errors.ValidationError, RuntimeError, ValueError)


@dataclass(frozen=True, slots=True)
class Weighted:
    """An operator with weights, by its name in the graph."""

    name: str
    kind: Literal["convolution", "depthwise", "product"]


def quantize(
    graph: Any,
    model: CapturedModel,
    samples: Mapping[str, Array],
    *,
    weighted: Sequence[Weighted],
    setting: str = "default",
    per_tensor: bool = False,
) -> Any:
    """Return an INT8 version of the graph, of OpenVINO or ONNX; the argument is not to be used again.

    Args:
        graph: The model as OpenVINO or ONNX has it.
        model: The same as it was captured.
        samples: Typical inputs, one sample per row.
        weighted: The graph's operators with weights, in their order.
        setting: One of `SETTINGS`.
        per_tensor: One range for all channels of an activation, before depthwise convolutions too.

    Raises:
        InputError: NNCF cannot quantize it, or the setting would be the same as the one before.
    """
    requests = as_requests(model, samples)
    kept = _kept(weighted, setting)
    with _quiet():
        return nncf.quantize(
            graph,
            nncf.Dataset(requests),
            subset_size=len(requests),
            model_type=_model_type(model),
            ignored_scope=nncf.IgnoredScope(names=kept) if kept else None,
            advanced_parameters=_advanced(setting, per_tensor=per_tensor),
        )


def control(
    graph: Any, model: CapturedModel, samples: Mapping[str, Array], labelled: Labels, *, max_drop: float
) -> Any:
    """Return an INT8 version whose accuracy on labelled data falls by at most `max_drop`; operators that stand in the
    way stay in full precision.

    Args:
        graph: The model as OpenVINO has it; not to be used again.
        model: The same as it was captured.
        samples: Typical inputs, one sample per row.
        labelled: What the accuracy is measured on.
        max_drop: Share of answers, for example 0.01.

    Raises:
        InputError: NNCF cannot quantize it.
    """
    rows = spread(len(labelled.labels), MAX_VALIDATED)
    validation = [(request(model, labelled.inputs, row, row + 1), int(labelled.labels[row])) for row in rows]

    def right(compiled: Any, items: Iterable[tuple[Mapping[str, Array], int]]) -> tuple[float, list[float]]:
        hits = [float(int(compiled(inputs)[labelled.output].argmax()) == label) for inputs, label in items]
        return float(np.mean(hits)), hits

    requests = as_requests(model, samples)
    with _quiet():
        return nncf.quantize_with_accuracy_control(
            graph,
            nncf.Dataset(requests),
            nncf.Dataset(validation, transform_func=lambda item: item[0]),
            right,
            max_drop=max_drop,
            subset_size=len(requests),
            model_type=_model_type(model),
            advanced_quantization_parameters=_advanced("corrected"),
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=min(_RANKED, len(rows))
            ),
        )


def pack_weights(graph: Any, precision: str, *, ratio: float = 1.0) -> Any:
    """Return the graph with weights of 8 or 4 bits that are unpacked as they are used; activations stay as they are.

    Args:
        graph: The model as OpenVINO has it; not to be used again.
        precision: "int8w", or "int4w": 4 bits, and 8 for embeddings and the last product.
        ratio: int4w: share of the other weights that get 4 bits; the most sensitive ones get 8.

    Raises:
        InputError: NNCF cannot pack them.
    """
    if precision == "int8w":
        with _quiet():
            return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
    with _quiet():
        return nncf.compress_weights(
            graph,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            ratio=ratio,
            group_size=_INT4_GROUP,
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=GroupSizeFallbackMode.ADJUST
            ),
        )


def _model_type(model: CapturedModel) -> Any:
    return nncf.ModelType.TRANSFORMER if model.attention else None


def _advanced(setting: str, *, per_tensor: bool = False) -> Any:
    plain = setting == "default"
    ranges = {} if plain else {"activations_range_estimator_params": RangeEstimatorParametersSet.HISTOGRAM}
    parameters = {"activations_quantization_params": QuantizationParameters(per_channel=False)} if per_tensor else {}
    return nncf.AdvancedQuantizationParameters(disable_bias_correction=plain, **ranges, **parameters)


def _kept(weighted: Sequence[Weighted], setting: str) -> list[str]:
    """Return the names of what stays in float32.

    Raises:
        InputError: Nothing more than with the setting before.
    """
    if setting in ("default", "corrected"):
        return []
    if not weighted:
        raise InputError(f"setting {setting!r} has nothing to keep: the model has no convolutions or matrix products")
    end = next((entry for entry in weighted if entry.kind != "product"), weighted[-1])
    if setting == "ends-kept":
        return [end.name]
    depthwise = [entry.name for entry in weighted if entry.kind == "depthwise"]
    if not set(depthwise) - {end.name}:
        raise InputError(f"setting {setting!r} has nothing more to keep: the model has no depthwise convolutions")
    return list(dict.fromkeys([end.name, *depthwise]))


def weighted_operators(graph: Any) -> list[Weighted]:
    """Return the operators with weights of an OpenVINO graph."""
    kinds: dict[str, Literal["convolution", "depthwise", "product"]] = {
        "Convolution": "convolution", "GroupConvolution": "depthwise", "MatMul": "product",
    }  # fmt: skip
    return [
        Weighted(op.get_friendly_name(), kinds[op.get_type_name()])
        for op in graph.get_ordered_ops()
        if op.get_type_name() in kinds
    ]


def as_requests(model: CapturedModel, samples: Mapping[str, Array], limit: int = MAX_SAMPLES) -> list[dict[str, Array]]:
    """Return up to `limit` of the samples, evenly spread, as one request each."""
    rows = spread(len(next(iter(samples.values()))), limit)
    return [request(model, samples, row, row + 1) for row in rows]


def spread(count: int, limit: int = MAX_SAMPLES) -> list[int]:
    """Return up to `limit` row numbers below `count`, evenly spread.

    Raises:
        InputError: There are no rows.
    """
    if count < 1:
        raise InputError("quantization needs at least one sample")
    return [int(row) for row in np.linspace(0, count - 1, min(count, limit)).round()]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's progress bars off standard output, which belongs to results, and make its errors ours."""
    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except _ERRORS as error:
            raise InputError(f"NNCF cannot quantize the model: {str(error).strip()[:300]}") from error
