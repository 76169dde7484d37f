"""The heavy models that Triton serves now: loaded, mended, retired without losing a request.

Every heavy version is a Triton model of its own, named MODEL@VERSION, with its single version 1. Two versions then
share nothing: loading one does not load the other again, their inputs may differ, and a retired one leaves when its
last request has been answered. Rules:
1. New requests go where the catalog points; retiring waits for the requests that were under way.
2. A model whose process died is unloaded and loaded; requests meanwhile fail at once, not after a second each.
3. Loads, retirements and repairs happen one at a time.
4. Before anything is served, a known tensor goes through Triton and must come back right.
5. Only models of the Python backend have processes of their own; others live and die with Triton itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import structlog

from cloud.heavy_outputs import check_outputs, one_request
from cloud.triton import CONFIG, DeadStubError, NotAcceptedError, TritonClient, read_config
from isthmus.bundle import Manifest
from isthmus.errors import BundleError, ConfigError, InputError, IsthmusError, UnavailableError
from isthmus.oip import override_fields, service_pb2
from isthmus.tensors import Array, decode_outputs, encode_request

_CHECK: Final = "isthmus-check"
_CHECK_CONFIG: Final = """
backend: "python" max_batch_size: 0
input { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] } output { name: "y" data_type: TYPE_FP32 dims: [ -1, 3 ] }
instance_group { kind: KIND_CPU count: 1 }
"""
_CHECK_MODEL: Final = b"""
import triton_python_backend_utils as utils

class TritonPythonModel:
    def execute(self, requests):
        inputs = [utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [utils.InferenceResponse([utils.Tensor("y", 2 * x + 1)]) for x in inputs]
"""
_WATCH_S: Final = 0.5
_CHECK_S: Final = 20.0
_RETRY_S: Final = 30.0
_NO_BACKEND: Final = "unable to find backend library"

log = structlog.get_logger(__name__)


class HeavyId(NamedTuple):
    """One version of a model's heavy half."""

    model: str
    version: int

    @property
    def name(self) -> str:
        """Return what Triton calls it."""
        return f"{self.model}@{self.version}"


@dataclass(slots=True)
class _Loaded:
    stubs: int  # processes that run it when all is well
    generation: int = 0  # counts repairs, so that a late complaint about a mended process is ignored
    broken: bool = False
    retry_at: float = 0.0  # loop time after which loading a broken one is tried again
    expected: bool = False  # it was to be loaded while Triton was away
    running: int = 0  # requests
    idle: asyncio.Event | None = None  # set when the last of them ends, where somebody waits for that


class HeavyPool:
    """What is loaded in one Triton server.

    Args:
        client: The server.
        repository: Folder with one Triton model folder for each heavy version, by its Triton name.
        push: Send the files with each load, for a server that does not see `repository`.
        load_s: How long one load may take.
        drain_s: How long retiring waits for running requests.
        count_stubs: Tells how many processes run each model, or None while that cannot be seen.
    """

    def __init__(
        self,
        client: TritonClient,
        repository: Path,
        *,
        push: bool = False,
        load_s: float = 120.0,
        drain_s: float = 30.0,
        count_stubs: Callable[[], Mapping[str, int] | None] = lambda: None,
    ) -> None:
        self._client, self._repository, self._push = client, repository, push
        self._load_s, self._drain_s = load_s, drain_s
        self._count_stubs = count_stubs
        self._loaded: dict[HeavyId, _Loaded] = {}
        self._lock = asyncio.Lock()
        self._repairs: set[asyncio.Task[None]] = set()
        self._restoring = False
        self.repaired = 0

    @property
    def loaded(self) -> tuple[HeavyId, ...]:
        """Return what is loaded, or will be when Triton is back, in order."""
        return tuple(sorted(self._loaded))

    def serves(self, heavy: HeavyId) -> bool:
        """Return whether a heavy version is loaded and, as far as is known, whole."""
        state = self._loaded.get(heavy)
        return state is not None and not state.broken

    def folder(self, heavy: HeavyId) -> Path:
        """Return the Triton model folder of a heavy version."""
        return self._repository / heavy.name

    async def infer(self, heavy: HeavyId, request: bytes, *, timeout_s: float) -> bytes:
        """Return the serialized answer of one heavy version to a serialized ModelInferRequest.

        Raises:
            UnavailableError: It is not loaded, broken, or Triton is down: at once.
            IsthmusError: As TritonClient.infer.
        """
        state = self._loaded.get(heavy)
        if state is None or state.broken:
            raise NotAcceptedError("the heavy model is not available now", reason="heavy-not-loaded")
        generation = state.generation
        state.running += 1
        try:
            request = override_fields(request, model_name=heavy.name, model_version="1")
            return await self._client.infer(request, timeout_s=timeout_s)
        except UnavailableError as error:
            if isinstance(error, DeadStubError) or error.reason == "heavy-not-loaded":
                self._repair_soon(heavy, generation)
            raise
        finally:
            state.running -= 1
            if state.idle is not None and not state.running:
                state.idle.set()

    async def metadata(self, heavy: HeavyId) -> Any:
        """Return the ModelMetadataResponse of a heavy version, under Triton's name of it.

        Raises:
            UnavailableError: It is not loaded, or Triton is down.
        """
        if heavy not in self._loaded:
            raise UnavailableError("the heavy model is not available now", reason="heavy-not-loaded")
        return await self._client.metadata(heavy.name)

    async def is_ready(self, heavy: HeavyId) -> bool:
        """Return whether requests for this heavy version would be answered now."""
        state = self._loaded.get(heavy)
        return state is not None and not state.broken and await self._client.is_ready(heavy.name)

    async def has_all(self) -> bool:
        """Return whether Triton answers and has every model that it should have."""
        if self._restoring or not await self._client.is_live():
            return False
        for heavy, state in tuple(self._loaded.items()):
            if state.expected or not await self._client.is_ready(heavy.name):
                return False
        return True

    def expect(self, heavy: HeavyId) -> None:
        """Have a heavy version loaded when Triton is back: by `restore` or `load_expected`."""
        self._loaded.setdefault(heavy, _Loaded(stubs=0, broken=True, retry_at=math.inf, expected=True))

    async def load_expected(self) -> None:
        """Load what was expected in the meantime.

        Raises:
            UnavailableError: Triton is down again.
        """
        async with self._lock:
            for heavy, state in sorted(self._loaded.items()):
                if state.expected:
                    await self._reload(heavy, state)

    async def load(self, heavy: HeavyId) -> None:
        """Load a heavy version from its folder; nothing happens when it is loaded.

        Raises:
            BundleError: Triton cannot load it.
            UnavailableError: Triton is down, or the load took too long.
        """
        async with self._lock:
            if heavy not in self._loaded:
                self._loaded[heavy] = _Loaded(stubs=await self._load(heavy))
                log.info("heavy model loaded", heavy=heavy.name)

    async def _load(self, heavy: HeavyId) -> int:
        """Load the model; return how many processes of its own it has."""
        folder = self.folder(heavy)
        path = folder / CONFIG
        if not path.is_file():
            raise BundleError(f"heavy model {heavy.name} has no {CONFIG}", reason="heavy-not-loadable")
        config, instances = read_config(path.read_text(), name=heavy.name, what=f"{heavy.name}/{CONFIG}")
        backend = json.loads(config).get("backend", "")
        files = await asyncio.to_thread(_read_files, folder) if self._push else None
        try:
            await self._client.load(heavy.name, config, files=files, timeout_s=self._load_s)
        except UnavailableError:
            # A load that ran out of time goes on inside Triton: take back what it may yet finish.
            with contextlib.suppress(UnavailableError):
                await self._client.unload(heavy.name)
            raise
        except BundleError as error:
            if _NO_BACKEND not in error.message:
                raise
            raise BundleError(
                f"this Triton has no backend {backend!r}, which the heavy model {heavy.name} is for",
                hint="compile it for target triton-python, or let the cloud use a Triton with that backend",
                reason=error.reason,
            ) from error
        return instances if backend == "python" else 0

    async def retire(self, heavy: HeavyId) -> None:
        """Unload a heavy version once its running requests are answered; nothing happens when it is not loaded."""
        async with self._lock:
            state = self._loaded.pop(heavy, None)
            if state is None:
                return
            await self._drain(heavy, state)
            with contextlib.suppress(UnavailableError):  # a Triton that is down has nothing loaded
                await self._client.unload(heavy.name)
            log.info("heavy model retired", heavy=heavy.name)

    async def sweep(self) -> None:
        """Remove the folders of heavy versions that are not loaded."""
        async with self._lock:
            wanted = {heavy.name for heavy in self._loaded}
            for folder in self._repository.iterdir():
                if folder.name not in wanted:
                    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _drain(self, heavy: HeavyId, state: _Loaded) -> None:
        if not state.running:
            return
        state.idle = asyncio.Event()
        try:
            await asyncio.wait_for(state.idle.wait(), self._drain_s)
        except TimeoutError:
            log.warning("heavy model retired while requests run", heavy=heavy.name, requests=state.running)

    async def restore(self) -> None:
        """Check a Triton that has just started, and load everything that was loaded.

        Raises:
            ConfigError: Known tensors come back wrong, or models cannot run at all.
            UnavailableError: Triton went away again.
        """
        self._restoring = True
        async with self._lock:
            await self._client.wait_until_live(_CHECK_S)
            await self._check()
            for heavy, state in sorted(self._loaded.items()):
                await self._reload(heavy, state)
            self._restoring = False

    async def _reload(self, heavy: HeavyId, state: _Loaded) -> None:
        state.generation += 1
        state.broken, state.retry_at = True, asyncio.get_running_loop().time() + _RETRY_S
        try:
            state.stubs = await self._load(heavy)
            state.broken = state.expected = False
        except BundleError as error:  # one broken model must not take the others down
            log.exception("heavy model does not load any more", heavy=heavy.name, reason=error.reason)

    async def _check(self) -> None:
        known = np.arange(-300, 300, dtype=np.float32).reshape(200, 3)
        config, _ = read_config(_CHECK_CONFIG, name=_CHECK, what=_CHECK)
        try:
            await self._client.load(_CHECK, config, files={"1/model.py": _CHECK_MODEL}, timeout_s=_CHECK_S)
            request = encode_request(_CHECK, {"x": known}).SerializeToString()
            answer = await self._client.infer(request, timeout_s=_CHECK_S)
        except (BundleError, DeadStubError) as error:
            raise ConfigError(f"Triton cannot run Python models: {error.message}") from error
        outputs = decode_outputs(service_pb2.ModelInferResponse.FromString(answer))
        if not np.array_equal(outputs.get("y", np.empty(0)), 2 * known + 1):
            raise ConfigError(
                "a known tensor came back wrong from Triton", hint="its Python must have numpy 1.26, not 2"
            )
        await self._client.unload(_CHECK)

    async def watch(self) -> None:
        """Look for models whose process died or that could not be loaded again, and mend them, for ever."""
        suspects: set[HeavyId] = set()
        while True:
            await asyncio.sleep(_WATCH_S)
            dead = self._dead()
            for heavy in dead & suspects:  # seen twice: not one that is just being loaded
                self._repair_soon(heavy, self._loaded[heavy].generation)
            suspects = dead
            now = asyncio.get_running_loop().time()
            for heavy, state in self._loaded.items():
                if state.broken and now > state.retry_at:
                    state.broken = False
                    self._repair_soon(heavy, state.generation)

    def _dead(self) -> set[HeavyId]:
        counts = self._count_stubs()
        if counts is None or self._lock.locked():
            return set()
        states = self._loaded.items()
        return {heavy for heavy, state in states if not state.broken and counts.get(heavy.name, 0) < state.stubs}

    def _repair_soon(self, heavy: HeavyId, generation: int) -> None:
        state = self._loaded.get(heavy)
        if state is None or state.broken or state.generation != generation:
            return
        state.broken, state.retry_at = True, asyncio.get_running_loop().time() + _RETRY_S
        task = asyncio.create_task(self._repair(heavy, state), name=f"repair-{heavy.name}")
        self._repairs.add(task)
        task.add_done_callback(self._repairs.discard)

    async def _repair(self, heavy: HeavyId, state: _Loaded) -> None:
        async with self._lock:
            if self._loaded.get(heavy) is not state or not state.broken:
                return
            log.warning("the heavy model's process died; loading it again", heavy=heavy.name)
            try:
                await self._client.unload(heavy.name)
                await self._reload(heavy, state)
                self.repaired += 1
            except IsthmusError as error:  # Triton itself is gone: its restart restores the model
                log.warning("heavy model not mended yet", heavy=heavy.name, reason=error.reason)
                state.broken = False

    async def close(self) -> None:
        """End repairs that are under way."""
        for task in tuple(self._repairs):
            task.cancel()
        await asyncio.gather(*self._repairs, return_exceptions=True)

    async def try_out(self, heavy: HeavyId, manifest: Manifest, inputs: Mapping[str, Array]) -> None:
        """Send inputs through a loaded heavy version and check the form of what comes back.

        Triton's Python backend does not check outputs: a wrong shape or a missing one would pass as OK. A model that
        cannot be batched gets the first of the samples that `inputs` hold; other axes that may vary can have any size.

        Raises:
            BundleError: Outputs lack, have another datatype or shape than the manifest says, or are not finite.
            UnavailableError: Triton is down.
        """
        rows = one_request(manifest, inputs)
        request = encode_request(heavy.name, rows).SerializeToString()
        try:
            answer = await self.infer(heavy, request, timeout_s=self._load_s)
            outputs = decode_outputs(service_pb2.ModelInferResponse.FromString(answer))
        except InputError as error:
            raise BundleError(
                f"the heavy model refuses golden inputs: {error.message}", reason="heavy-wrong"
            ) from error
        except UnavailableError:
            raise
        except IsthmusError as error:
            raise BundleError("the heavy model fails on golden inputs", reason="heavy-wrong") from error
        check_outputs(manifest, rows, outputs)


def _read_files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CONFIG)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
