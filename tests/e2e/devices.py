"""A device made of the agent's own parts, on a real cloud, with a clock of its own; and bundles that both can run."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from edge.access import AccessToken
from edge.conditions import Conditions
from edge.config import UpdateSettings
from edge.fetcher import RegistryFetcher, SignedManifests
from edge.fleet import Desired, FleetLink
from edge.identity import DeviceHome, enrol
from edge.model import ServedModels, open_model
from edge.outbox import Outbox
from edge.outcome import Outcome
from edge.plan import choose_variant
from edge.router import Router
from edge.state import Order
from edge.store import SlotStore
from edge.trial import Terms
from edge.updater import Updater
from isthmus.bundle import GOLDEN, MANIFEST, Heavy, Variant, index_files, parse_manifest
from isthmus.digests import tree_digest
from isthmus.tensors import Array, encode_request
from tests.edge import bundles
from tests.edge.test_soak import NoCloud

MODEL: Final = "triage"
VARIANT: Final = "openvino-fp32"
WEIGHTS: Final = f"variants/{VARIANT}/model.bin"
GRAPH: Final = f"variants/{VARIANT}/model.xml"
_WIDTH: Final = 256
_HEAVY_CONFIG: Final = """
backend: "python"
max_batch_size: 0
input { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] }
output [
  { name: "logits" data_type: TYPE_FP32 dims: [ -1, 3 ] },
  { name: "label" data_type: TYPE_INT64 dims: [ -1 ] }
]
instance_group { kind: KIND_CPU count: 1 }
"""
_HEAVY: Final = """
import numpy as np
import triton_python_backend_utils as utils


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = utils.get_input_tensor_by_name(request, "x").as_numpy()
            label = utils.Tensor("label", x.argmax(axis=1).astype(np.int64))
            answers.append(utils.InferenceResponse([utils.Tensor("logits", x), label]))
        return answers
"""


def servable(folder: Path, heavy: str = _HEAVY) -> Path:
    """Give a bundle of tests/edge a heavy model that Triton serves, and a manifest of what lies there now."""
    shutil.rmtree(folder / "heavy")
    (folder / "heavy" / "1").mkdir(parents=True)
    (folder / "heavy" / "config.pbtxt").write_text(_HEAVY_CONFIG)
    (folder / "heavy" / "1" / "model.py").write_text(heavy)
    manifest = parse_manifest((folder / MANIFEST).read_bytes())
    files = index_files(folder)
    digest = tree_digest({path: entry.sha256 for path, entry in files.items() if path.startswith("heavy/")})
    signed = manifest.model_copy(update={"files": files, "heavy": Heavy(platform="python", digest=digest)})
    (folder / MANIFEST).write_bytes(signed.to_json())
    return folder


def fine_tuned(version: int) -> tuple[Array, Array, Array]:
    """Return the weights of a version: each differs from the one before it a little in every single weight."""
    rng = np.random.default_rng(1)
    shapes = ((bundles.CLASSES, _WIDTH), (_WIDTH, _WIDTH), (_WIDTH, bundles.CLASSES))
    weights = [rng.normal(0.0, shape[0] ** -0.5, shape) for shape in shapes]
    for step in range(2, version + 1):
        moves = np.random.default_rng(step)
        weights = [values + moves.normal(0.0, 1e-3 * values.std(), values.shape) for values in weights]
    first, second, third = (values.astype(np.float32) for values in weights)
    return first, second, third


def right_logits(version: int, x: Array) -> Array:
    """Return what a version answers."""
    first, second, third = fine_tuned(version)
    logits: Array = np.maximum(np.maximum(x @ first, 0) @ second, 0) @ third
    return logits


def fine_tuned_bundle(folder: Path, version: int) -> Path:
    """Make a bundle whose OpenVINO variant has weights of some size, all of which move from version to version."""
    bundles.build_bundle(folder, version)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h1"]),
            helper.make_node("Relu", ["h1"], ["r1"]),
            helper.make_node("MatMul", ["r1", "w2"], ["h2"]),
            helper.make_node("Relu", ["h2"], ["r2"]),
            helper.make_node("MatMul", ["r2", "w3"], ["logits"]),
            helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0),
        ],
        "light",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", bundles.CLASSES])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", bundles.CLASSES]),
            helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]),
        ],
        [numpy_helper.from_array(values, f"w{place}") for place, values in enumerate(fine_tuned(version), 1)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "source.onnx")
    openvino.save_model(openvino.convert_model(folder / "source.onnx"), folder / GRAPH, compress_to_fp16=False)
    (folder / "source.onnx").unlink()
    # OpenVINO numbers the nodes of all models of a process; those of operators are compiled in a process each.
    text = (folder / GRAPH).read_text()
    (folder / GRAPH).write_text(re.sub(r'id="(\d+)" name="([A-Za-z]+)_\d+"', r'id="\1" name="\2_\1"', text))
    golden = load_file(folder / GOLDEN)
    logits = right_logits(version, golden["input.x"])
    golden |= {f"output.{VARIANT}.logits": logits, f"output.{VARIANT}.label": logits.argmax(axis=1)}
    save_file(golden, folder / GOLDEN)
    return servable(folder)


class CloudDevice:
    """An enrolled device; `online` runs what an agent runs, and nothing of it is left afterwards but the disk.

    Args:
        folder: Its folder.
        clock: The time that signed metadata is checked against. TLS and tokens go by the real one.
        variant: Which variant it runs.
    """

    def __init__(
        self, folder: Path, clock: Callable[[], datetime] = lambda: datetime.now(UTC), variant: str = VARIANT
    ) -> None:
        self.home = DeviceHome(folder)
        self.clock = clock
        self._variant = variant
        self._models = ServedModels((MODEL,))

    async def enrol(self, cloud: str, code: str, trust: Path) -> None:
        """Exchange a one-time code for an identity."""
        await enrol(self.home, cloud=cloud, code=code, trust=trust)

    @asynccontextmanager
    async def online(self) -> AsyncIterator[None]:
        """Start with what is on the disk, and be connected."""
        enrolment = self.home.enrolment()
        async with self.home.connect() as channel:
            token = AccessToken(self.home, enrolment, channel)
            self._desired = Desired((MODEL,))
            link = FleetLink(channel, token.wait, (MODEL,), self._desired, outbox=Outbox(self.home.reports))
            self.updater = self._open_updater(RegistryFetcher(channel, token.wait), link.report)
            await self.updater.start()
            loops = [asyncio.create_task(loop()) for loop in (token.keep, link.watch, link.send_reports)]
            try:
                yield
            finally:
                for task in loops:
                    task.cancel()
                await asyncio.gather(*loops, return_exceptions=True)
                await self.updater.probation.stop()
                self._models.swap(MODEL, None)

    def _open_updater(self, fetcher: RegistryFetcher, report: Callable[[Outcome], None]) -> Updater:
        loop = asyncio.get_running_loop()
        self.manifests = SignedManifests(
            self.home.path / "tuf", self.home.root.read_bytes(), fetcher, loop, clock=lambda: self.clock()
        )
        choose: Callable[[Any], Variant] = partial(
            choose_variant, configured=self._variant, machine="x86_64", bfloat16=True, installed=lambda _name: True
        )
        return Updater(
            MODEL,
            SlotStore(self.home.models(MODEL)),
            self._models,
            manifests=self.manifests,
            fetcher=fetcher,
            choose=choose,
            open_slot=open_model,
            report=report,
            conditions=Conditions(UpdateSettings(trial=Terms()), self.home.path.name, MODEL),
        )

    async def follow(self, version: int) -> Outcome:
        """Wait until the cloud asks for a version, and do as an agent does then."""
        return await self.updater.update(await self.order(version))

    async def order(self, version: int) -> Order:
        """Wait until the cloud asks for a version."""
        async with asyncio.timeout(30):
            while self._desired.version(MODEL) != version:
                await self._desired.change(MODEL)
        return self._desired.order(MODEL)

    async def answer(self, x: Array) -> tuple[int, Array]:
        """Return the version that answers, and its logits."""
        request = encode_request(MODEL, {"x": x})
        told = await Router(self._models, NoCloud()).answer(request.SerializeToString(), request, 10.0)
        return int(told.model_version), np.frombuffer(told.raw_output_contents[0], np.float32).reshape(len(x), -1)
