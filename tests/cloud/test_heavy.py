"""The real Triton child: starts, serves, flips, heals and stops."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from cloud import triton
from cloud.heavy import HeavyId, HeavyPool
from cloud.supervisor import TritonServer, find_installation
from cloud.triton import NotAcceptedError, TritonClient, check_link, read_config
from isthmus.bundle import TensorSpec, open_bundle
from isthmus.errors import BundleError, ConfigError, InputError, IsthmusError, UnavailableError
from isthmus.oip import service_pb2
from isthmus.tensors import decode_outputs, encode_request
from tests.cloud.conftest import CONFIG, eventually, write_heavy
from tests.cloud.workspaces import make_bundle

pytestmark = pytest.mark.slow

ONE, TWO = HeavyId("triage", 1), HeavyId("triage", 2)
X = np.array([[1, 2, 3, 4]], dtype=np.float32)
REQUEST = encode_request("triage", {"x": X}).SerializeToString()


@asynccontextmanager
async def running(
    folder: Path, *, watched: bool = True, stop_s: float = 0.2
) -> AsyncIterator[tuple[TritonServer, HeavyPool]]:
    """Run a Triton; `watched` says whether dead processes are looked for without a request that complains."""
    repository = folder / "repository"
    for heavy in (ONE, TWO):
        write_heavy(repository / heavy.name, factor=10 * heavy.version)
    server = TritonServer(repository, log_file=folder / "triton.log", stop_s=stop_s)
    client = TritonClient(server.address)
    pool = HeavyPool(client, repository, count_stubs=server.count_stubs)
    await server.start(pool.restore)
    watch = asyncio.create_task(pool.watch() if watched else asyncio.sleep(0))
    try:
        yield server, pool
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await pool.close()
        await client.close()
        await server.stop()


async def answer(pool: HeavyPool, heavy: HeavyId, request: bytes = REQUEST) -> float:
    raw = await pool.infer(heavy, request, timeout_s=10.0)
    return float(decode_outputs(service_pb2.ModelInferResponse.FromString(raw))["logits"][0, 0])


def stubs_of(server: TritonServer) -> list[int]:
    pids = []
    for children in Path(f"/proc/{server.pid}/task").glob("*/children"):
        pids += [int(pid) for pid in children.read_text().split()]
    return pids


def test_serves_two_versions_and_refuses_what_it_has_not(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (server, pool):
            await pool.load(ONE)
            await pool.load(TWO)
            assert [await answer(pool, ONE), await answer(pool, TWO)] == [10.0, 20.0]
            assert pool.loaded == (ONE, TWO)
            counts = server.count_stubs()
            assert counts is not None
            assert (counts["triage@1"], counts["triage@2"]) == (1, 1)
            with pytest.raises(InputError, match=r"Expected \[-1,4\], got \[1,3\]"):
                await answer(pool, ONE, encode_request("triage", {"x": X[:, :3]}).SerializeToString())
            with pytest.raises(IsthmusError, match="failed on this request") as raised:
                await answer(pool, ONE, encode_request("triage", {"x": -X}).SerializeToString())
            assert "secret" not in str(raised.value)
            await pool.retire(ONE)
            with pytest.raises(UnavailableError):
                await answer(pool, ONE)
            with pytest.raises(UnavailableError):
                await pool.metadata(ONE)
            assert await answer(pool, TWO) == 20.0

    asyncio.run(story())


def test_flips_versions_under_load_without_a_failed_request(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (_, pool):
            current, done, answers = ONE, asyncio.Event(), 0
            await pool.load(ONE)

            async def ask() -> None:
                nonlocal answers
                while not done.is_set():
                    asked = current
                    assert await answer(pool, asked) == 10.0 * asked.version
                    answers += 1

            async def flip() -> None:
                nonlocal current
                for new in (TWO, ONE, TWO, ONE, TWO):
                    old = current
                    await pool.load(new)
                    current = new
                    await pool.retire(old)
                done.set()

            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(ask())
                group.create_task(flip())
            assert answers > 50

    asyncio.run(story())


def test_retiring_waits_for_requests_under_way(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (_, pool):
            await pool.load(ONE)
            slow = encode_request("triage", {"x": np.array([[-2, 0, 0, 0]], np.float32)}).SerializeToString()
            under_way = asyncio.create_task(answer(pool, ONE, slow))
            await asyncio.sleep(0)  # lets it go out
            await pool.retire(ONE)
            assert under_way.done()
            assert await under_way == -20.0

    asyncio.run(story())


def test_requests_whose_callers_have_gone_are_not_run_where_triton_batches(tmp_path: Path) -> None:
    """Without a dynamic batcher Triton runs them all the same: FACTS that docs/gateway.md tells."""
    slow = encode_request("triage", {"x": np.array([[-2, 0, 0, 0]], np.float32)}).SerializeToString()

    async def story() -> None:
        async with running(tmp_path, watched=False) as (server, pool):
            client = TritonClient(server.address)
            (pool.folder(TWO) / "config.pbtxt").write_text(
                CONFIG.replace("max_batch_size: 8", "max_batch_size: 1") + "dynamic_batching { }"
            )
            for heavy in (ONE, TWO):
                await pool.load(heavy)

            async def counts(heavy: HeavyId) -> tuple[int, int]:
                found = {model.name: model for model in await client.statistics()}[heavy.name]
                return found.execution_count, found.inference_stats.fail.count

            async def leave(heavy: HeavyId, *, timeout_s: float) -> None:
                asked = [asyncio.create_task(pool.infer(heavy, slow, timeout_s=timeout_s)) for _ in range(6)]

                async def reached_triton() -> bool:
                    return pool._loaded[heavy].running == 6

                await eventually(reached_triton, "the requests are there")
                await asyncio.wait(asked, timeout=0.1)  # Triton has begun with the first
                for task in asked:
                    task.cancel()
                await asyncio.gather(*asked, return_exceptions=True)

            async def settled(heavy: HeavyId, all_run: bool) -> bool:
                runs, dropped = await counts(heavy)
                return runs == 6 if all_run else runs + dropped == 6

            await leave(TWO, timeout_s=10)
            await eventually(lambda: settled(TWO, False), "what was cancelled is dropped")
            assert (await counts(TWO))[0] <= 2
            await leave(ONE, timeout_s=10)
            await eventually(lambda: settled(ONE, True), "without a batcher all run")
            await client.close()

    asyncio.run(story())


def test_a_full_queue_and_an_unknown_model_are_said_to_have_run_nothing(tmp_path: Path) -> None:
    """These words of Triton's decide what may be tried elsewhere."""
    slow = encode_request("triage", {"x": np.array([[-2, 0, 0, 0]], np.float32)}).SerializeToString()

    async def story() -> None:
        async with running(tmp_path, watched=False) as (server, pool):
            (pool.folder(ONE) / "config.pbtxt").write_text(
                CONFIG.replace("max_batch_size: 8", "max_batch_size: 1")
                + "dynamic_batching { default_queue_policy { max_queue_size: 1 } }"
            )
            await pool.load(ONE)
            asked = (pool.infer(ONE, slow, timeout_s=20) for _ in range(8))
            found = await asyncio.gather(*asked, return_exceptions=True)
            refused = [error for error in found if isinstance(error, NotAcceptedError)]
            assert refused
            assert len(refused) == sum(isinstance(error, BaseException) for error in found)
            assert {error.reason for error in refused} == {"heavy-busy"}
            client = TritonClient(server.address)
            statistics = {model.name: model for model in await client.statistics()}
            assert statistics[ONE.name].execution_count == len(found) - len(refused)
            with pytest.raises(NotAcceptedError) as raised:
                await client.infer(slow, timeout_s=20)  # "triage" is not what Triton calls it
            assert raised.value.reason == "heavy-not-loaded"
            await client.close()
            nobody = TritonClient(f"unix:{tmp_path / 'nobody'}")
            with pytest.raises(NotAcceptedError) as raised:
                await nobody.infer(slow, timeout_s=20)
            assert raised.value.reason == triton.LOST
            await nobody.close()

    asyncio.run(story())


def test_a_killed_triton_comes_back_with_its_models(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (server, pool):
            await pool.load(ONE)
            first = server.pid
            os.kill(first, signal.SIGKILL)

            took: list[float] = []

            async def serves_again() -> bool:
                started = time.monotonic()
                try:
                    return await answer(pool, ONE) == 10.0 and server.restarts == 1
                except UnavailableError:
                    took.append(time.monotonic() - started)
                    return False

            await eventually(serves_again, "the model serves again")
            assert statistics.median(took) < 0.25  # requests fail at once while Triton is down
            assert server.pid not in (0, first)
            assert server.restarts == 1

    asyncio.run(story())


def test_a_connection_that_pauses_is_no_reason_to_start_triton_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that fail while Triton is down make the connection wait; a Triton that is up by then must live."""
    patient = [(name, 3000 if name.endswith("_backoff_ms") else value) for name, value in triton._OPTIONS]
    monkeypatch.setattr(triton, "_OPTIONS", patient)

    async def story() -> None:
        write_heavy(tmp_path / "repository" / ONE.name, factor=10)
        server = TritonServer(tmp_path / "repository", log_file=tmp_path / "triton.log", stop_s=0.2)
        client = TritonClient(server.address)
        monkeypatch.undo()  # the server's own connections are quick
        pool = HeavyPool(client, tmp_path / "repository")
        await server.start(pool.restore)
        try:
            await pool.load(ONE)
            os.kill(server.pid, signal.SIGKILL)
            refused = 0

            async def serves_again() -> bool:
                nonlocal refused
                try:
                    return await answer(pool, ONE) == 10.0 and refused > 0
                except UnavailableError:
                    refused += 1
                    return False

            await eventually(serves_again, "the model serves again")
            assert server.restarts == 1
        finally:
            await client.close()
            await server.stop()

    asyncio.run(story())


def test_a_dead_model_process_is_mended_without_traffic(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (server, pool):
            await pool.load(ONE)
            await pool.load(TWO)
            for pid in stubs_of(server):
                if b"triage@1_" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

            async def mended() -> bool:
                return pool.repaired == 1

            await eventually(mended, "the dead process is replaced")
            assert [await answer(pool, ONE), await answer(pool, TWO)] == [10.0, 20.0]

    asyncio.run(story())


def test_a_dead_model_process_costs_one_slow_request_at_most(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path, watched=False) as (server, pool):
            await pool.load(ONE)
            for pid in stubs_of(server):
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(UnavailableError):
                await answer(pool, ONE)
            started = time.monotonic()
            with pytest.raises(UnavailableError):
                await answer(pool, ONE)
            assert time.monotonic() - started < 0.9  # Triton itself takes a second to say so, each time

            async def mended() -> bool:
                return pool.repaired == 1 and await pool.is_ready(ONE)

            await eventually(mended, "the dead process is replaced")
            assert await answer(pool, ONE) == 10.0

    asyncio.run(story())


def test_a_model_that_cannot_load_is_refused_and_others_serve_on(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (_, pool):
            await pool.load(ONE)
            (pool.folder(TWO) / "1" / "model.py").write_text("raise RuntimeError('broken')")
            with pytest.raises(BundleError, match="triage@2") as raised:
                await pool.load(TWO)
            assert raised.value.reason == "heavy-not-loadable"
            assert pool.loaded == (ONE,)
            assert await answer(pool, ONE) == 10.0

    asyncio.run(story())


def test_a_form_that_this_triton_cannot_load_is_refused_by_name(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (_, pool):
            await pool.load(ONE)
            config = pool.folder(TWO) / "config.pbtxt"
            config.write_text(config.read_text().replace('"python"', '"tensorrt" platform: "tensorrt_plan"'))
            with pytest.raises(BundleError, match=r"this Triton has no backend 'tensorrt'.* triage@2") as raised:
                await pool.load(TWO)
            assert raised.value.reason == "heavy-not-loadable"
            assert "triton-python" in raised.value.hint
            assert pool.loaded == (ONE,)
            assert await answer(pool, ONE) == 10.0

    asyncio.run(story())


def test_a_model_without_a_process_of_its_own_is_not_taken_for_dead(tmp_path: Path) -> None:
    """An ensemble stands for every form but the Python one: Triton runs it itself."""

    async def story() -> None:
        async with running(tmp_path, watched=False) as (_, pool):
            await pool.load(ONE)
            write_ensemble(pool.folder(TWO), of=ONE)
            await pool.load(TWO)
            assert await answer(pool, TWO) == 10.0
            assert pool._dead() == set()

    asyncio.run(story())


def write_ensemble(folder: Path, *, of: HeavyId) -> None:
    shutil.rmtree(folder)
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "empty").write_bytes(b"")
    step = f"""
    platform: "ensemble" ensemble_scheduling {{ step {{
      model_name: "{of.name}" model_version: 1
      input_map {{ key: "x" value: "x" }} output_map {{ key: "logits" value: "logits" }}
    }} }}
    """
    lines = [line for line in CONFIG.splitlines() if "backend" not in line and "instance_group" not in line]
    (folder / "config.pbtxt").write_text("\n".join(lines) + step)


# y has as many columns as the first element of x says, and one row for each of x, or for each two
VARYING: Final = """
import numpy as np
import triton_python_backend_utils as utils


class TritonPythonModel:
    def execute(self, requests):
        inputs = [utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        arrays = [np.ones((len(x) // {share}, int(x.flat[0])), np.float32) for x in inputs]
        return [utils.InferenceResponse([utils.Tensor("logits", array)]) for array in arrays]
"""


def test_golden_answers_may_vary_in_length_but_not_in_number(tmp_path: Path) -> None:
    manifest = open_bundle(make_bundle(tmp_path / "bundle", 1))
    outputs = (TensorSpec(name="logits", datatype="FP32", shape=(-1, -1)),)
    manifest = manifest.model_copy(update={"outputs": outputs})
    golden = {"x": np.full((4, 4), 7, np.float32)}

    async def story() -> None:
        async with running(tmp_path) as (_, pool):
            for heavy, share in ((ONE, 1), (TWO, 2)):
                config = pool.folder(heavy) / "config.pbtxt"
                config.write_text(config.read_text().replace("dims: [ 3 ]", "dims: [ -1 ]"))
                (pool.folder(heavy) / "1" / "model.py").write_text(VARYING.format(share=share))
                await pool.load(heavy)
            await pool.try_out(ONE, manifest, golden)
            with pytest.raises(BundleError, match=r"expected FP32 \[4, -1\], got float32 \[2, 7\]"):
                await pool.try_out(TWO, manifest, golden)

    asyncio.run(story())


def test_a_model_that_cannot_be_batched_is_tried_with_one_sample(tmp_path: Path) -> None:
    manifest = open_bundle(make_bundle(tmp_path / "bundle", 1))
    tensors = {"inputs": ("x", (2, 4)), "outputs": ("logits", (2, -1))}
    specs = {end: (TensorSpec(name=name, datatype="FP32", shape=shape),) for end, (name, shape) in tensors.items()}
    manifest = manifest.model_copy(update={**specs, "max_batch": 1})

    async def story() -> None:
        async with running(tmp_path) as (_, pool):
            config = pool.folder(ONE) / "config.pbtxt"
            text = config.read_text().replace("max_batch_size: 8", "max_batch_size: 0")
            config.write_text(text.replace("dims: [ 4 ]", "dims: [ 2, 4 ]").replace("dims: [ 3 ]", "dims: [ 2, -1 ]"))
            (pool.folder(ONE) / "1" / "model.py").write_text(VARYING.format(share=1))
            await pool.load(ONE)
            await pool.try_out(ONE, manifest, {"x": np.full((3, 2, 4), 5, np.float32)})

    asyncio.run(story())


def test_stopping_leaves_no_process_socket_or_shared_memory(tmp_path: Path) -> None:
    async def story() -> tuple[list[int], Path]:
        async with running(tmp_path, stop_s=4.0) as (server, pool):
            await pool.load(ONE)
            return [server.pid, *stubs_of(server)], Path(server.address.removeprefix("unix:"))

    pids, socket = asyncio.run(story())
    assert len(pids) >= 2
    assert not [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()]
    assert not socket.parent.exists()


def test_a_triton_that_ignores_us_is_killed_with_its_models(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (server, pool):
            await pool.load(ONE)
            pids = [server.pid, *stubs_of(server)]
            os.kill(server.pid, signal.SIGSTOP)
        assert len(pids) >= 2

        async def are_gone() -> bool:
            return not [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()]

        await eventually(are_gone, "no process is left")

    asyncio.run(story())


def test_whatever_goes_wrong_when_triton_comes_back_is_tried_again(tmp_path: Path) -> None:
    async def story() -> None:
        write_heavy(tmp_path / "repository" / ONE.name, factor=10)
        server = TritonServer(tmp_path / "repository", log_file=tmp_path / "triton.log", stop_s=0.2)
        starts = 0

        async def on_started() -> None:
            nonlocal starts
            starts += 1
            if starts == 2:
                raise KeyError("something that nobody thought of")

        await server.start(on_started)
        try:
            os.kill(server.pid, signal.SIGKILL)

            async def is_back() -> bool:
                return starts == 3

            await eventually(is_back, "Triton is started a third time")
        finally:
            await server.stop()

    asyncio.run(story())


def test_environment_that_cannot_host_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="corrupts tensors silently") as raised:
        find_installation(numpy_version="2.1.0")
    assert "numpy<2" in raised.value.hint


def test_configuration_is_renamed_and_instances_counted() -> None:
    config, instances = read_config(CONFIG.replace("count: 1", "count: 3"), name="triage@7", what="config.pbtxt")
    assert '"triage@7"' in config
    assert instances == 3
    with pytest.raises(BundleError, match=r"heavy/config\.pbtxt"):
        read_config("nonsense {", name="x", what="heavy/config.pbtxt")


def test_callers_do_not_hear_where_triton_is() -> None:
    async def story() -> None:
        client = TritonClient("unix:/private/folder/s:8001")
        calls = (
            client.metadata("triage@1"), client.statistics(), client.server_version(), client.unload("triage@1"),
            client.load("triage@1", "{}", timeout_s=5.0), client.infer(REQUEST, timeout_s=5.0),
        )  # fmt: skip
        for call in calls:
            with pytest.raises(UnavailableError) as raised:
                await call
            assert raised.value.reason == "triton-unavailable"
            assert "private" not in raised.value.message + raised.value.hint
        await client.close()

    asyncio.run(story())


def test_plain_text_to_another_machine_must_be_meant() -> None:
    check_link("127.0.0.1:8001", ca=None, plaintext=False)
    check_link("triton.internal:8001", ca=None, plaintext=True)
    with pytest.raises(ConfigError, match="plain text"):
        check_link("triton.internal:8001", ca=None, plaintext=False)
