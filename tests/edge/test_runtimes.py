"""One contract over every runtime of the table, on real models."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edge.runtimes import RUNTIMES, Worker, open_runtime
from isthmus.errors import BundleError, ConfigError, InputError, MissingExtraError, OverloadedError
from isthmus.tensors import Array
from tests.edge import bundles

EVERY_RUNTIME = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "tvm" else []) for name in RUNTIMES],
)
SOME = np.array([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], dtype=np.float32)


@EVERY_RUNTIME
def test_answers_are_the_models(name: str, tmp_path: Path) -> None:
    runtime = open_runtime(name, tmp_path / "m" / bundles.save_variant(name, tmp_path / "m", 5))
    outputs = runtime.infer({"x": SOME})
    np.testing.assert_allclose(outputs["logits"], SOME @ bundles.weights(5), atol=1e-5)
    assert outputs["label"].tolist() == [1, 2]
    assert [outputs[key].dtype.str for key in ("logits", "label")] == ["<f4", "<i8"]
    runtime.close()


@EVERY_RUNTIME
def test_batch_size_may_change_from_call_to_call(name: str, tmp_path: Path) -> None:
    runtime = open_runtime(name, tmp_path / "m" / bundles.save_variant(name, tmp_path / "m"))
    for rows in (1, 7, 2):
        assert runtime.infer({"x": np.ones((rows, 3), np.float32)})["logits"].shape == (rows, 3)
    runtime.close()


@EVERY_RUNTIME
def test_inputs_may_be_read_only_and_outputs_stay_as_they_are(name: str, tmp_path: Path) -> None:
    runtime = open_runtime(name, tmp_path / "m" / bundles.save_variant(name, tmp_path / "m"))
    read_only = np.frombuffer(SOME.tobytes(), np.float32).reshape(SOME.shape)
    first = runtime.infer({"x": read_only})["logits"]
    kept = first.copy()
    runtime.infer({"x": SOME * 100})
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(read_only, SOME)
    runtime.close()
    np.testing.assert_array_equal(first, kept)


@EVERY_RUNTIME
def test_inputs_that_cannot_be_computed_are_the_callers_error(name: str, tmp_path: Path) -> None:
    runtime = open_runtime(name, tmp_path / "m" / bundles.save_variant(name, tmp_path / "m"))
    wrong: tuple[dict[str, Array], ...] = (
        {},
        {"nothere": SOME},
        {"x": SOME, "nothere": SOME},
        {"x": np.ones((2, 5), np.float32)},
        {"x": np.ones((3,), np.float32)},
        {"x": SOME.astype(np.float64)},
        {"x": SOME.astype(np.int64)},
    )
    for inputs in wrong:
        with pytest.raises(InputError) as caught:
            runtime.infer(inputs)
        assert caught.value.reason == "cannot-infer"
    assert runtime.infer({"x": SOME})["label"].tolist() == [1, 2]
    runtime.close()


@EVERY_RUNTIME
@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 4096])
def test_file_that_is_no_model_is_refused(name: str, tmp_path: Path, content: bytes) -> None:
    entry = bundles.save_variant(name, tmp_path)
    (tmp_path / entry).write_bytes(content)
    with pytest.raises(BundleError, match="cannot open") as caught:
        open_runtime(name, tmp_path / entry)
    assert caught.value.reason == "cannot-open"


@EVERY_RUNTIME
def test_missing_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no model file"):
        open_runtime(name, tmp_path / "model.none")


def test_openvino_computes_in_the_precision_asked_for(tmp_path: Path) -> None:
    # One third is not a bf16 number: a runtime that silently used bf16 would be off by 1e-3.
    runtime = open_runtime("openvino", tmp_path / "m" / bundles.save_variant("openvino", tmp_path / "m"))
    x = np.full((1, 3), 1 / 3, np.float32)
    assert abs(float(runtime.infer({"x": x})["logits"][0, 2]) - 1 / 3) < 1e-6
    runtime.close()


def test_onnxruntime_refuses_a_precision_that_it_lacks(tmp_path: Path) -> None:
    entry = bundles.save_variant("onnxruntime", tmp_path)
    with pytest.raises(ConfigError, match="computes in f32"):
        open_runtime("onnxruntime", tmp_path / entry, inference_precision="bf16")


def test_unknown_runtime_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="openvino, onnxruntime"):
        open_runtime("tensorflow", tmp_path)


def test_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        open_runtime("openvino", tmp_path / "model.xml")
    assert caught.value.hint == "pip install 'isthmus[edge-openvino]'"


class Gate:
    """A runtime that answers when it is let."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.threads: set[int] = set()
        self.running = self.closed = 0

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.threads.add(threading.get_ident())
        self.running += 1
        assert self.running == 1
        assert self.open.wait(10)
        self.running -= 1
        return dict(inputs)

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed += 1


def test_worker_queue_is_bounded_and_uses_one_thread() -> None:
    async def scenario() -> None:
        gate = Gate()
        worker = Worker(gate, queue=2)
        calls = [asyncio.ensure_future(worker.infer({"x": SOME})) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="busy") as caught:
            await worker.infer({"x": SOME})
        assert caught.value.reason == "overloaded"
        gate.open.set()
        assert len(await asyncio.gather(*calls)) == 3
        worker.close()
        await asyncio.to_thread(worker._executor.shutdown)
        assert gate.closed == 1
        assert len(gate.threads) == 1
        assert threading.get_ident() not in gate.threads

    asyncio.run(scenario())


def test_quick_calls_run_where_they_are_made_and_large_ones_do_not() -> None:
    async def scenario() -> None:
        gate = Gate()
        gate.open.set()
        worker = Worker(gate)
        while threading.get_ident() not in gate.threads:  # a few calls, until it is known how long one takes
            assert (await worker.infer({"x": SOME})).keys() == {"x"}
        gate.threads.clear()
        await worker.infer({"x": np.zeros((100_000, 1000), np.float32)})
        assert threading.get_ident() not in gate.threads
        worker.close()

    asyncio.run(scenario())


def test_no_call_joins_one_whose_caller_went_away() -> None:
    async def scenario() -> None:
        gate = Gate()
        gate.open.set()
        worker = Worker(gate)
        while threading.get_ident() not in gate.threads:
            await worker.infer({"x": SOME})
        gate.open.clear()
        large = asyncio.ensure_future(worker.infer({"x": np.zeros((100_000, 1000), np.float32)}))
        await asyncio.sleep(0)
        while not gate.running:
            await asyncio.sleep(0)
        large.cancel()
        with pytest.raises(asyncio.CancelledError):
            await large
        small = asyncio.ensure_future(worker.infer({"x": SOME}))
        await asyncio.sleep(0)
        assert not small.done()
        gate.open.set()
        assert (await small).keys() == {"x"}
        worker.close()

    asyncio.run(scenario())


def test_cancelled_call_frees_its_place_in_the_queue() -> None:
    async def scenario() -> None:
        gate = Gate()
        worker = Worker(gate, queue=1)
        running = asyncio.ensure_future(worker.infer({"x": SOME}))
        waiting = asyncio.ensure_future(worker.infer({"x": SOME}))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        again = asyncio.ensure_future(worker.infer({"x": SOME}))
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(running, again)
        worker.close()

    asyncio.run(scenario())


@pytest.mark.slow
def test_openvino_reports_to_nobody(tmp_path: Path) -> None:
    script = (
        "import sys, threading; from pathlib import Path; from edge.runtimes import open_runtime\n"
        f"open_runtime('openvino', Path({str(tmp_path / bundles.save_variant('openvino', tmp_path))!r}))\n"
        "assert not any(name.startswith('openvino_telemetry.') for name in sys.modules)\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": ".:proto", "HOME": str(tmp_path)})
    assert not list(tmp_path.glob("intel/*"))
