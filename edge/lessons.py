"""What the agent learns from requests that both models have answered: whether they agree, and captures for training.

Live answers, those that came too late for their callers (edge.stragglers), and those of deferred requests all count,
each once; what is captured is what the cloud itself said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edge.agreement import count_agreement
from edge.answers import fuse_with_light
from edge.model import LiveModel, ServedModels
from isthmus.errors import InputError
from isthmus.oip import read_parameters, service_pb2
from isthmus.tensors import Array, decode_inputs, decode_outputs

Capture = Callable[[str, Mapping[str, Array], Mapping[str, Array]], None]


class Lessons:
    """Counts agreement and hands out captures.

    Args:
        models: What is served, and where it is counted.
        capture: Takes model, inputs and outputs of every cloud answer; None for no captures.
    """

    def __init__(self, models: ServedModels, capture: Capture | None = None) -> None:
        self._models = models
        self._capture = capture

    def learn(
        self, live: LiveModel, inputs: Mapping[str, Array], light: Mapping[str, Array], heavy: Mapping[str, Array]
    ) -> None:
        """Learn from one request.

        Args:
            live: The version that computed the light answer.
            inputs: Of the request.
            light: The light answer.
            heavy: The outputs of the cloud's answer, checked.
        """
        output = live.calibration.output
        if output in heavy and output in light:  # the caller wanted it
            counters = self._models.counters[live.manifest.name]
            agreed, rows = count_agreement(light[output], heavy[output], live.calibration.decoding)
            counters.agreed_rows += agreed
            counters.compared_rows += rows
        if self._capture is not None and len(heavy) == len(live.manifest.outputs):
            self._capture(live.manifest.name, inputs, heavy)

    def fuse_deferred(self, template: Any, answer: Any) -> None:
        """Make the late answer to a deferred request one of both models, as a live one would be.

        Args:
            template: What was kept of the light answer.
            answer: The cloud's, checked.
        """
        live = self._version_of(template)
        light = _kept_outputs(template)
        # Who asks for the cloud gets the cloud's own answer, live or late.
        if live is not None and light and read_parameters(template.parameters).get("isthmus.reason") != "requested":
            fuse_with_light(answer, light, live)

    def learn_deferred(self, template: Any, request: bytes, heavy: Mapping[str, Array]) -> None:
        """Learn from a deferred request that the cloud has answered.

        Nothing is learnt from one whose inputs only the gateway can read, or which fits no version that serves now.

        Args:
            template: What was kept of the light answer.
            request: As it was sent to the cloud.
            heavy: The outputs of the cloud's answer, checked.
        """
        live = self._version_of(template)
        if live is None:
            return
        manifest = live.manifest
        try:
            inputs = decode_inputs(
                service_pb2.ModelInferRequest.FromString(request),
                manifest.inputs,
                max_batch=manifest.max_batch,
                max_length=manifest.max_length,
            )
        except InputError:
            return
        self.learn(live, inputs, _kept_outputs(template), heavy)

    def _version_of(self, template: Any) -> LiveModel | None:
        """Return the version that made the template, when it still serves as it did then."""
        name, kept = template.model_name, read_parameters(template.parameters)
        live = self._models.live(name) if name in self._models.counters else None
        return live if live is not None and kept.get("isthmus.calibration") == live.calibration_id else None


def _kept_outputs(template: Any) -> dict[str, Array]:
    """Return the light answer in a template; empty where it was too large to be kept."""
    return decode_outputs(template) if template.raw_output_contents else {}
