"""Opens and starts the Tritons of a cloud: children of its own, or running ones that it is told of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import structlog

from cloud.config import CloudSettings
from cloud.heavy import HeavyPool
from cloud.replicas import Replica, Replicas
from cloud.supervisor import TritonServer
from cloud.triton import LOST, TritonClient, check_link
from isthmus.errors import IsthmusError, UnavailableError

log = structlog.get_logger(__name__)


def open_replicas(settings: CloudSettings, state: Path, stack: AsyncExitStack) -> Replicas:
    """Return the Tritons that the settings name, not started; the stack stops them.

    Raises:
        ConfigError: A link would be plain text over a network, or Triton cannot run here.
    """
    repository = state / "triton"
    replicas = []
    for address in settings.tritons:
        check_link(address, ca=settings.triton_ca, plaintext=settings.triton_plaintext)
        client = TritonClient(address, ca=settings.triton_ca)
        stack.push_async_callback(client.close)
        replicas.append(Replica(address, client, _pool(settings, client, repository, None)))
    for number in range(1, settings.triton_children + 1 if not replicas else 1):
        log_file = state / ("triton.log" if number == 1 else f"triton-{number}.log")
        server = TritonServer(
            repository, log_file=log_file, start_s=settings.triton_start_s, stop_s=settings.triton_stop_s
        )
        stack.push_async_callback(server.stop)
        client = TritonClient(server.address)
        stack.push_async_callback(client.close)
        pool = _pool(settings, client, repository, server)
        replicas.append(Replica(f"child-{number}", client, pool, server))
    return Replicas(replicas)


def _pool(settings: CloudSettings, client: TritonClient, repository: Path, server: TritonServer | None) -> HeavyPool:
    return HeavyPool(
        client,
        repository,
        push=server is None,
        load_s=settings.triton_load_s,
        drain_s=settings.default_deadline_s,
        count_stubs=server.count_stubs if server is not None else lambda: None,
    )


async def start_replicas(replicas: Replicas, restarted: Callable[[], None]) -> None:
    """Start the children and take in the running ones; `restarted` is called whenever a child has another process.

    Raises:
        ConfigError: A Triton cannot run the models.
        UnavailableError: None of the running ones answers. One that does is enough: the others come in when they do.
    """
    missing = []
    for replica in replicas:
        if replica.server is not None:
            await _start_child(replicas, replica, restarted)
        elif await replica.client.is_live():
            version = await replica.client.server_version()
            log.info("using an external Triton", address=replica.name, version=version)
            await replicas.admit(replica)
        else:
            missing.append(replica.name)
    if missing and not replicas.is_up:
        raise UnavailableError(
            f"no Triton answers at {', '.join(missing)}",
            hint="start it there, or leave --triton out to have one started here",
            reason=LOST,
        )
    for name in missing:
        log.warning("a Triton is not there yet", replica=name)


async def _start_child(replicas: Replicas, replica: Replica, restarted: Callable[[], None]) -> None:
    assert replica.server is not None  # noqa: S101 - the caller has seen it

    async def on_started() -> None:
        try:
            await replicas.admit(replica)
        except IsthmusError:
            replica.eject("it cannot be given its models")
            raise
        restarted()

    await replica.server.start(on_started)
