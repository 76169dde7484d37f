"""An agent's listener that swaps versions when it is told to: real slots, verification, self-test and swap, no cloud.

`python -m benchmarks.servers.swapping BUNDLE VARIANT FOLDER` serves version 1 of the bundle from a new FOLDER. A line
`{"version": N}` on its standard input makes version N of it (the same model under another number), brings it to serve,
and answers with the milliseconds that it took and what became of it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import sys
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from isthmus import tls13

tls13.enforce()  # before anything imports grpc

import grpc  # noqa: E402
import structlog  # noqa: E402

from edge.agent import describe_status, open_runner  # noqa: E402
from edge.breaker import Breaker  # noqa: E402
from edge.conditions import Conditions  # noqa: E402
from edge.config import UpdateSettings  # noqa: E402
from edge.model import ServedModels, open_model  # noqa: E402
from edge.router import Router  # noqa: E402
from edge.server import AgentServer, InferenceService  # noqa: E402
from edge.state import Order  # noqa: E402
from edge.store import SlotStore  # noqa: E402
from edge.trial import Terms  # noqa: E402
from edge.updater import Updater  # noqa: E402
from edge.uplink import Uplink  # noqa: E402
from isthmus.bundle import CALIBRATION, MANIFEST, index_files, parse_calibration, parse_manifest  # noqa: E402
from isthmus.errors import NotFoundError  # noqa: E402
from security.trust import SignedTarget  # noqa: E402

_QUEUE: Final = 128


class Versions:
    """A registry of as many versions of one bundle as somebody asks for.

    Args:
        bundle: Version 1.
        scratch: For the files that differ.
    """

    def __init__(self, bundle: Path, scratch: Path) -> None:
        self._bundle = bundle
        self._scratch = scratch
        self._blobs: dict[str, Path] = {}
        self.name = parse_manifest((bundle / MANIFEST).read_bytes()).name

    def target(self, model: str, version: int) -> SignedTarget:
        """Return the manifest of a version."""
        del model
        manifest = parse_manifest((self._bundle / MANIFEST).read_bytes())
        record = parse_calibration((self._bundle / CALIBRATION).read_bytes())
        folder = self._scratch / str(version)
        folder.mkdir(exist_ok=True)
        (folder / CALIBRATION).write_bytes(record.model_copy(update={"version": version}).to_json())
        files = dict(manifest.files) | index_files(folder)
        for path, entry in files.items():
            self._blobs[entry.sha256] = (folder if path == CALIBRATION else self._bundle) / path
        return SignedTarget(
            manifest.model_copy(update={"version": version, "files": files}).to_json(), rollback_floor=0, withdrawn=""
        )

    async def blob(self, sha256: str, path: Path, *, length: int) -> int:
        """Copy a file."""
        await asyncio.to_thread(shutil.copyfile, self._blobs[sha256], path)
        return length

    async def delta(self, from_sha256: str, to_sha256: str, path: Path, *, limit: int) -> int:
        """Refuse: what differs is small."""
        del from_sha256, to_sha256, path, limit
        raise NotFoundError("no delta")


async def serve(bundle: Path, variant: str, folder: Path) -> None:
    """Serve, and swap, until the standard input ends."""
    scratch = folder / "versions"
    scratch.mkdir(parents=True)
    versions = Versions(bundle, scratch)
    models = ServedModels((versions.name,))
    updater = Updater(
        versions.name,
        SlotStore(folder / "device"),
        models,
        manifests=versions,
        fetcher=versions,
        choose=lambda manifest: manifest.variant(variant),
        open_slot=partial(open_model, queue=_QUEUE),
        report=lambda _: None,
        conditions=Conditions(UpdateSettings(trial=Terms()), "benchmark", versions.name, now=lambda: datetime.now(UTC)),
    )
    channel = grpc.aio.insecure_channel("127.0.0.1:1")  # nothing escalates
    uplink = Uplink(channel, lambda: None, Breaker(), Breaker(), guard_s=0.05, longest_s=1.0)
    service = InferenceService(models, Router(models, uplink))
    status = partial(describe_status, "benchmark", models, {versions.name: updater}, uplink)
    server = AgentServer("127.0.0.1:0", service, status)
    await updater.update(Order(version=1))
    address = await server.start()
    _say({"address": address})
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        started = time.perf_counter()
        outcome = await updater.update(Order(version=json.loads(line)["version"]))
        took_ms = (time.perf_counter() - started) * 1e3
        shutil.rmtree(scratch / str(outcome.to_version))
        _say({"ms": took_ms, "became": outcome.became.value, "detail": outcome.detail})
    await server.stop(0)
    await channel.close()


def _say(told: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with open_runner() as runner:
        runner.run(serve(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
