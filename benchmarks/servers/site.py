"""A real cloud and a real agent that serves several models, brought up by the commands that an operator would type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tritonclient.grpc as triton
from rich.console import Console

from benchmarks.servers import ServedModel
from benchmarks.servers.bundle import write_bundle
from examples.quickstart.programs import Server, Shell, wait_until


@dataclass(slots=True)
class Site:
    """The running programs; `cloud` may be killed and started again."""

    shell: Shell
    folder: Path
    cloud: Server
    agent: Server
    cloud_address: str
    device_address: str  # of the cloud, for devices
    agent_address: str

    def restart_cloud(self) -> None:
        """Start the cloud again, on the same port; does not wait until it is there."""
        self.cloud = _start_cloud(self.shell, self.folder, self.cloud_address, self.device_address)


@contextmanager
def running(
    folder: Path, models: Mapping[str, ServedModel], *, threshold: float = 0.0, settings: str = ""
) -> Iterator[Site]:
    """Serve the models, and stop everything afterwards.

    Args:
        folder: Of everything, logs included.
        models: What is served, by name.
        threshold: Requests with a lower score escalate.
        settings: Of the agent, as TOML.
    """
    shell = Shell(Console(stderr=True, quiet=True), folder)
    workspace, device = folder / "site", folder / "device"
    token, trust = workspace / "operator" / "token", workspace / "trust"
    shell.run("keys", "init", workspace, "--host", "localhost", "--host", "127.0.0.1")
    shell.run(
        *("token", "mint", "--home", workspace / "cloud", "--role", "operator"),
        *("--subject", "benchmark", "--output", token),
    )
    servers: list[Server] = []
    try:
        servers.append(cloud := _start_cloud(shell, folder, "127.0.0.1:0", "127.0.0.1:0"))
        ready = cloud.wait_ready()
        address = str(ready["address"])
        operator = ("--cloud", address, "--token-file", token, "--trust", trust)
        for name, model in models.items():
            bundle = folder / f"bundle-{name}"
            write_bundle(bundle, model, threshold=threshold)
            shell.run("model", "publish", bundle, *operator, "--operator", workspace / "operator")
        code = shell.run_json("device", "invite", "benchmark", *operator)["code"]
        shell.run("edge", "enrol", "--cloud", address, "--code", code, "--trust", trust, "--home", device)
        (device / "edge.toml").write_text(settings)
        wanted = [word for name in models for word in ("--model", name)]
        listen = ("--listen", "127.0.0.1:0", "--config", device / "edge.toml")
        servers.append(agent := shell.start("agent", "edge", "run", "--home", device, *wanted, *listen))
        site = Site(
            shell, folder, cloud, agent, address, str(ready["device_address"]), str(agent.wait_ready()["address"])
        )
        _wait_until_ready(site.agent_address)
        try:
            yield site
        finally:
            servers[0] = site.cloud
    finally:
        for server in reversed(servers):
            server.stop()


def _start_cloud(shell: Shell, folder: Path, listen: str, device_listen: str) -> Server:
    where = ("--listen", listen, "--device-listen", device_listen)
    return shell.start("cloud", "cloud", "serve", "--home", folder / "site" / "cloud", *where)


def _wait_until_ready(address: str) -> None:
    with triton.InferenceServerClient(address) as client:
        wait_until(lambda: bool(client.is_server_ready()), "the agent to serve", 60)
