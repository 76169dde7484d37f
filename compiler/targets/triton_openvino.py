"""Triton in the cloud, with its OpenVINO backend: config.pbtxt, and a version folder with model.xml and model.bin.

Triton's OpenVINO backend fixes a model that Triton batches at the largest batch, and pads or refuses all smaller ones.
So the folder says `max_batch_size: 0`: each request is run as the batch that it is, and OpenVINO's streams run several
requests at a time. The Triton of the Python package index does not have this backend; NVIDIA's container images do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Final, Literal

from compiler.capture import CapturedModel
from compiler.targets import BuildOptions, Built, Runner
from compiler.targets.openvino import OpenVinoTarget
from compiler.targets.triton_config import VERSION, configuration, on_cpu, write_configuration
from isthmus.errors import InputError

NAME: Final = "triton-openvino"
# It has no parameter for the hint.
_NOTE: Final = "Triton's OpenVINO backend computes in bfloat16 where the processor can; it was verified in float32"


class TritonOpenVinoTarget:
    """The heavy model for Triton's OpenVINO backend."""

    role: ClassVar[Literal["light", "heavy"]] = "heavy"
    precisions: ClassVar[tuple[str, ...]] = OpenVinoTarget.precisions
    platforms: ClassVar[tuple[str, ...]] = ("any",)
    tools: ClassVar[tuple[str, ...]] = OpenVinoTarget.tools
    runs_here: ClassVar[bool] = True

    def settings(self, precision: str) -> tuple[str, ...]:
        """Return the ways of the OpenVINO target."""
        return OpenVinoTarget().settings(precision)

    def build(self, model: CapturedModel, folder: Path, options: BuildOptions) -> Built:
        """Write the model folder.

        Raises:
            InputError: The serving settings contradict each other, or int8 has no samples.
            UnsupportedModelError: OpenVINO cannot take the model.
        """
        serving = options.serving
        if serving.preferred_batch:
            raise InputError(
                f"target {NAME!r} cannot batch requests, heavy.preferred_batch has no use",
                hint="leave it out, or use target triton-python with runtime openvino, which can",
            )
        config = configuration(model, options, backend="openvino", batched=False)
        on_cpu(config, serving, NAME)
        config.parameters["INFERENCE_NUM_THREADS"].string_value = str(serving.threads * serving.instances)
        config.parameters["NUM_STREAMS"].string_value = str(serving.instances)
        version = folder / VERSION
        version.mkdir()
        built = OpenVinoTarget().build(model, version, options)
        write_configuration(config, folder)
        notes = [built.note, "" if built.inference_precision == "bf16" else _NOTE]
        return replace(built, entry=f"{VERSION}/{built.entry}", note="; ".join(note for note in notes if note))

    def open(self, entry: Path, *, threads: int) -> Runner:
        """Load the IR on this machine's processor."""
        return OpenVinoTarget().open(entry, threads=threads)
