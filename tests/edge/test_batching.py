"""Batched answers are the unbatched ones, whatever came together, and nobody pays for another one's request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.batching import Batcher, takes_batches
from edge.model import LiveModel, open_model
from edge.runtimes import Runtime, Worker, open_runtime
from isthmus.bundle import Manifest, TensorSpec
from isthmus.errors import InputError, OverloadedError
from isthmus.tensors import Array
from tests.edge import bundles
from tests.edge.serving import MODEL, explanation, serving

SOME = np.array([[1.0, 2.0, 3.0]], np.float32)


class Sums:
    """Adds up each row; refuses rows that hold a 13; remembers how many rows came, and waits where it is told."""

    def __init__(self, *, held: bool = False) -> None:
        self.rows: list[int] = []
        self.open = threading.Event()
        self.entered = threading.Event()
        if not held:
            self.open.set()

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.entered.set()
        assert self.open.wait(20)
        x = inputs["x"]
        self.rows.append(len(x))
        if (x == 13).any():
            raise InputError("13")
        return {"sum": x.reshape(len(x), -1).sum(axis=1)}

    def close(self) -> None:
        return None


class OneRow(Sums):
    """Answers for the first row only: what a model does whose batch axis is none."""

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"sum": super().infer(inputs)["sum"][:1]}


def batcher(runtime: Runtime, *, delay_s: float = 0.05, max_rows: int = 8, queue: int = 64) -> Batcher:
    return Batcher(Worker(runtime), delay_s=delay_s, max_rows=max_rows, queue=queue)


async def ask(batches: Batcher, *requests: Array) -> list[Array]:
    answers = await asyncio.gather(*(batches.infer({"x": x}) for x in requests))
    return [answer["sum"] for answer in answers]


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def runtime(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder = tmp_path_factory.mktemp(request.param)
    return open_runtime(request.param, folder / bundles.save_variant(request.param, folder))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    max_rows=st.integers(2, 8),
    seed=st.integers(0, 2**16),
)
def test_answers_are_the_unbatched_ones(runtime: Runtime, sizes: list[int], max_rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests = [rng.normal(size=(rows, bundles.CLASSES)).astype(np.float32) for rows in sizes]

    async def scenario() -> list[dict[str, Array]]:
        batches = batcher(runtime, delay_s=0.001, max_rows=max_rows)
        return await asyncio.gather(*(batches.infer({"x": x}) for x in requests))

    for x, answer in zip(requests, asyncio.run(scenario()), strict=True):
        alone = runtime.infer({"x": x})
        assert answer.keys() == alone.keys()
        for name, want in alone.items():
            assert (answer[name].dtype, answer[name].shape) == (want.dtype, want.shape)
            np.testing.assert_allclose(answer[name], want, rtol=1e-6, atol=1e-6)


def test_requests_that_come_together_share_a_batch() -> None:
    async def scenario() -> None:
        sums = Sums()
        answers = await ask(batcher(sums), SOME, SOME + 1, np.concatenate([SOME, SOME]))
        assert [answer.tolist() for answer in answers] == [[6.0], [9.0], [6.0, 6.0]]
        assert sums.rows == [4]

    asyncio.run(scenario())


def test_full_batch_does_not_wait() -> None:
    async def scenario() -> None:
        sums = Sums()
        async with asyncio.timeout(20):
            await ask(batcher(sums, delay_s=3600.0, max_rows=2), SOME, SOME, SOME, SOME)
            await ask(batcher(sums, delay_s=3600.0, max_rows=2), np.concatenate([SOME] * 3))
        assert sums.rows == [2, 2, 3]

    asyncio.run(scenario())


def test_busy_model_gathers_meanwhile() -> None:
    async def scenario() -> None:
        sums = Sums(held=True)
        batches = batcher(sums, delay_s=0.001)
        first = asyncio.create_task(ask(batches, SOME))
        await asyncio.to_thread(sums.entered.wait, 20)
        others = [asyncio.create_task(ask(batches, SOME + i)) for i in range(5)]
        await asyncio.sleep(0.02)  # many delays: each of them alone would have begun
        sums.open.set()
        await asyncio.gather(first, *others)
        assert sums.rows == [1, 5]

    asyncio.run(scenario())


def test_unlike_requests_do_not_share() -> None:
    async def scenario() -> None:
        sums = Sums()
        wide, double = np.ones((1, 4), np.float32), SOME.astype(np.float64)
        answers = await ask(batcher(sums), SOME, wide, double, SOME)
        assert [answer.tolist() for answer in answers] == [[6.0], [4.0], [6.0], [6.0]]
        assert sums.rows == [2, 1, 1]

    asyncio.run(scenario())


def test_bad_request_spoils_no_other() -> None:
    async def scenario() -> None:
        sums = Sums()
        batches = batcher(sums)
        bad = np.full((1, 3), 13, np.float32)
        answers = await asyncio.gather(*(batches.infer({"x": x}) for x in (SOME, bad, SOME)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [dict, InputError, dict]
        assert sums.rows == [3, 1, 1, 1]
        assert batches.pending == 0

    asyncio.run(scenario())


def test_outputs_without_the_batch_axis_are_not_split() -> None:
    async def scenario() -> None:
        sums = OneRow()
        answers = await ask(batcher(sums), SOME, SOME + 1)
        assert [answer.tolist() for answer in answers] == [[6.0], [9.0]]
        assert sums.rows == [2, 1, 1]

    asyncio.run(scenario())


def test_callers_that_went_away_are_left_out() -> None:
    async def scenario() -> None:
        sums = Sums(held=True)
        batches = batcher(sums, delay_s=0.001)
        first = asyncio.create_task(ask(batches, SOME))
        await asyncio.to_thread(sums.entered.wait, 20)
        gone, stays, all_gone = (asyncio.create_task(ask(batches, x)) for x in (SOME, SOME + 1, np.ones((1, 4))))
        await asyncio.sleep(0)
        gone.cancel()
        all_gone.cancel()
        await asyncio.sleep(0)
        sums.open.set()
        assert [answer.tolist() for answer in await stays] == [[9.0]]
        await first
        await asyncio.gather(*batches._tasks)
        assert sums.rows == [1, 1]
        assert batches.pending == 0

    asyncio.run(scenario())


def test_queue_is_bounded() -> None:
    async def scenario() -> None:
        sums = Sums(held=True)
        batches = batcher(sums, queue=2, delay_s=0.001)
        first = asyncio.create_task(ask(batches, SOME))
        await asyncio.to_thread(sums.entered.wait, 20)
        waiting = [asyncio.create_task(batches.infer({"x": SOME})) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="3 requests are waiting"):
            await batches.infer({"x": SOME})
        sums.open.set()
        await asyncio.gather(first, *waiting)
        await ask(batches, SOME)

    asyncio.run(scenario())


def test_agent_that_batches_answers_as_one_that_does_not(tmp_path: Path) -> None:
    requests = [bundles.SURE + np.float32(i) * np.array([[1, 0, 0]], np.float32) for i in range(12)]

    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            plain = [(await agent.infer(x)).as_numpy("logits") for x in requests]
            agent.models.swap(MODEL, open_batching(tmp_path / "bundle"))
            batched = await asyncio.gather(*(agent.infer(x, request_id=str(i)) for i, x in enumerate(requests)))
            for i, (want, got) in enumerate(zip(plain, batched, strict=True)):
                np.testing.assert_array_equal(got.as_numpy("logits"), want)
                assert got.get_response().id == str(i)
                assert explanation(got)["isthmus.route"] == "edge"
            hard, sure = await asyncio.gather(agent.infer(bundles.HARD), agent.infer(bundles.SURE))
            routes = [explanation(answer)["isthmus.route"] for answer in (hard, sure)]
            assert routes == ["cloud", "edge"]  # each by its own score
            assert agent.models.counters[MODEL].light_inferences == 26

    asyncio.run(scenario())


def open_batching(bundle: Path) -> LiveModel:
    live = open_model(bundle, "onnxruntime-fp32", batch_delay_s=0.005, batch_rows=64)
    assert isinstance(live._worker, Batcher)
    assert live._worker._max_rows == live.manifest.max_batch == 8
    return live


def test_a_model_whose_rows_depend_on_each_other_is_not_batched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles.build_bundle(tmp_path / "bundle")
    monkeypatch.setattr("edge.model.open_runtime", lambda *args, **kwargs: Entangled(open_runtime(*args, **kwargs)))
    live = open_model(tmp_path / "bundle", "onnxruntime-fp32", batch_delay_s=0.005)
    assert isinstance(live._worker, Worker)
    live.retire()


class Entangled:
    """Right for the golden batch of 4, and otherwise wrong."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self._runtime.infer(inputs)
        if len(inputs["x"]) != 4:
            outputs["logits"] = outputs["logits"] + 1
        return outputs

    def close(self) -> None:
        self._runtime.close()


def test_every_tensor_must_have_the_batch_axis(tmp_path: Path) -> None:
    manifest = bundles.build_bundle(tmp_path)
    assert takes_batches(manifest)
    assert not takes_batches(with_output(manifest, (bundles.CLASSES,)))
    assert not takes_batches(with_output(manifest, ()))


def with_output(manifest: Manifest, shape: tuple[int, ...]) -> Manifest:
    return manifest.model_copy(update={"outputs": (TensorSpec(name="y", datatype="FP32", shape=shape),)})
