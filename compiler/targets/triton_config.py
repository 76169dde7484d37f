"""config.pbtxt: what Triton must know of a heavy model, the same for every form of its folder.

Two ways to say how a model is batched:
* every input and output counts samples along its first axis and has another one: Triton puts requests together
  ("dynamic batching") up to `max_batch_size`, and the dims of a tensor leave the batch out;
* any other model has `max_batch_size: 0` and says all of its axes; a request is run as it comes.

A tensor without any axis cannot be said at all (dims must not be empty, and a `reshape` changes what clients send), so
it is refused here. Equal models with equal settings give equal folders whatever the bundle's version is, so that two
bundles share one Triton version. Which versions Triton serves is the cloud's business, unless `Serving.keep_versions`
says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from google.protobuf import text_format

from compiler.capture import CapturedModel
from compiler.data import BATCH_AXIS, is_batchable
from compiler.targets import BuildOptions, Serving, UnsupportedModelError
from isthmus.bundle import TensorSpec
from isthmus.errors import InputError
from isthmus.oip import model_config_pb2

CONFIG: Final = "config.pbtxt"
VERSION: Final = "1"  # the folder of the one version that a heavy model has
_BYTE_WIDE: Final = ("INT8", "UINT8")


def configuration(
    model: CapturedModel, options: BuildOptions, *, backend: str, platform: str = "", batched: bool = True
) -> Any:
    """Return the model configuration that all forms share.

    Args:
        model: The model.
        options: Its name and how it is served.
        backend: Triton's name of the backend.
        platform: Triton's older name of the form, where it has one.
        batched: False: the backend cannot take batches of different sizes from Triton, only from the request.

    Raises:
        InputError: The settings contradict each other or the model.
        UnsupportedModelError: A tensor has no axis.
    """
    serving, specs = options.serving, (*model.inputs, *model.outputs)
    _check(serving, options, specs)
    batched = batched and is_batchable(model) and all(len(spec.shape) > 1 for spec in specs)
    config = model_config_pb2.ModelConfig(
        name=options.name, backend=backend, platform=platform, max_batch_size=options.max_batch if batched else 0
    )
    config.input.extend(model_config_pb2.ModelInput(**_tensor(spec, batched)) for spec in model.inputs)
    config.output.extend(model_config_pb2.ModelOutput(**_tensor(spec, batched)) for spec in model.outputs)
    if batched:
        config.dynamic_batching.max_queue_delay_microseconds = serving.max_queue_delay_us
        config.dynamic_batching.preferred_batch_size.extend(sorted(set(serving.preferred_batch)))
    if serving.warm_up:
        config.model_warmup.extend(_warm_up(model, options, batched))
    if serving.response_cache:
        config.response_cache.enable = True
    if serving.keep_versions:
        config.version_policy.latest.num_versions = serving.keep_versions
    return config


def on_cpu(config: Any, serving: Serving, target: str) -> None:
    """Give the model its instances on the processor.

    Raises:
        InputError: The settings name GPUs, which this form cannot use.
    """
    if serving.gpus:
        raise InputError(
            f"target {target!r} runs on the processor, gpus {list(serving.gpus)} cannot be used",
            hint="leave gpus out, or use target triton-onnxruntime or triton-tensorrt",
        )
    config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU, count=serving.instances)


def on_gpus(config: Any, serving: Serving) -> None:
    """Give the model its instances on each of the GPUs that the settings name, or on all there are."""
    config.instance_group.add(
        kind=model_config_pb2.ModelInstanceGroup.KIND_GPU, count=serving.instances, gpus=sorted(set(serving.gpus))
    )


def write_configuration(config: Any, folder: Path) -> None:
    """Write config.pbtxt."""
    (folder / CONFIG).write_text(text_format.MessageToString(config), encoding="utf-8")


def _check(serving: Serving, options: BuildOptions, specs: Sequence[TensorSpec]) -> None:
    above = [size for size in serving.preferred_batch if not 1 <= size <= options.max_batch]
    if above:
        raise InputError(
            f"heavy.preferred_batch: expected sizes of 1 to max_batch ({options.max_batch}), got {above[0]}",
            hint="mend the recipe",
        )
    scalars = [spec.name for spec in specs if not spec.shape]
    if scalars:
        raise UnsupportedModelError(
            f"Triton has no tensors without an axis, and {scalars[0]!r} is one",
            hint="give an input its value under `constants`, or export the model with an axis of length 1",
        )


def _tensor(spec: TensorSpec, batched: bool) -> dict[str, Any]:
    """Return name, datatype and shape, without the batch axis where Triton adds it itself."""
    datatype = model_config_pb2.DataType.Value(f"TYPE_{spec.datatype}")
    return {"name": spec.name, "data_type": datatype, "dims": spec.shape[1:] if batched else spec.shape}


def _warm_up(model: CapturedModel, options: BuildOptions, batched: bool) -> list[Any]:
    """Return requests for Triton to run before it says that the model is ready: the smallest and the largest.

    Their values are zeros, which any model takes (they are valid indices, too); only where every bit pattern is a
    usual value, in bytes of pictures, they are random.
    """
    requests = []
    for name, largest in (("smallest", False), ("largest", True)):
        batch = (options.max_batch if largest else 1) if batched else 0
        request = model_config_pb2.ModelWarmup(name=name, batch_size=batch, count=1)
        for spec in model.inputs:
            entry = request.inputs[spec.name]
            entry.data_type = model_config_pb2.DataType.Value(f"TYPE_{spec.datatype}")
            entry.dims.extend(axis_range(model, spec, options, largest=largest)[1 if batched else 0 :])
            if spec.datatype in _BYTE_WIDE:
                entry.random_data = True
            else:
                entry.zero_data = True
        requests.append(request)
    return requests


def axis_range(model: CapturedModel, spec: TensorSpec, options: BuildOptions, *, largest: bool) -> list[int]:
    """Return the smallest or the largest shape that an input can have, as far as that is known; else 1 for an axis."""
    names = model.axes.get(spec.name, (BATCH_AXIS, *[""] * (len(spec.shape) - 1)))
    limits = {BATCH_AXIS: (1, options.max_batch)}
    ranges = {name: model.lengths[name] for name in names if name in model.lengths and name != BATCH_AXIS} | limits
    return [
        size if size != -1 else ranges.get(name, (1, 1))[1 if largest else 0]
        for name, size in zip(names, spec.shape, strict=True)
    ]
