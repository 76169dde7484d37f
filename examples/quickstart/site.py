"""The site of the story: one cloud, one device, one operator, each with its own folder, all on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import tritonclient.grpc as triton

from examples.quickstart.programs import ProgramError, Server, Shell, wait_until

DEVICE: Final = "kiosk-1"
VARIANT: Final = "openvino-int8"
_DEVICE_SETTINGS: Final = """\
capture = true         # keep the heavy model's answers for the next training
capture_flush_s = 1.0  # and write them down soon: this story does not last long

[updates.trial]
soak_s = 5             # a new version serves on trial, a minute where nothing else is said
max_error_rate = 0.02
"""


@dataclass(slots=True)
class Site:
    """Folders, running servers and where they listen."""

    shell: Shell
    folder: Path
    model: str
    cloud: Server | None = None
    agent: Server | None = None
    cloud_address: str = "127.0.0.1:0"
    device_address: str = "127.0.0.1:0"  # of the cloud, for devices
    agent_address: str = "127.0.0.1:0"
    _device: Path = field(init=False)

    def __post_init__(self) -> None:
        self._device = self.folder / "device"

    @property
    def token(self) -> Path:
        """Where the operator's access token lies."""
        return self.folder / "site" / "operator" / "token"

    @property
    def device(self) -> Path:
        """The device's folder."""
        return self._device

    def init_keys(self) -> None:
        """Make the workspace: operator's keys, cloud's keys, and what devices trust."""
        self.shell.run("keys", "init", self.folder / "site", "--host", "localhost", "--host", "127.0.0.1")
        self.shell.run(
            *("token", "mint", "--home", self.folder / "site" / "cloud", "--role", "operator"),
            *("--subject", "demo-operator", "--output", self.token),
        )

    def start_cloud(self) -> Mapping[str, Any]:
        """Start (or start again, on the same port) the gateway, the registry and Triton."""
        self.cloud = self.shell.start(
            "cloud",
            "cloud",
            "serve",
            "--home",
            self.folder / "site" / "cloud",
            "--listen",
            self.cloud_address,
            "--device-listen",
            self.device_address,
        )
        state = self.cloud.wait_ready()
        self.cloud_address, self.device_address = str(state["address"]), str(state["device_address"])
        return state

    def running_cloud(self) -> Server:
        """Return the cloud's process.

        Raises:
            ProgramError: It was not started.
        """
        if self.cloud is None:
            raise ProgramError("the cloud was not started")
        return self.cloud

    def publish(self, bundle: Path) -> Mapping[str, Any]:
        """Publish a bundle and have devices move to it."""
        published: Mapping[str, Any] = self.shell.run_json(
            "model", "publish", bundle, *self.operator(), "--operator", self.folder / "site" / "operator"
        )
        return published

    def enrol_device(self, *hosts: str) -> None:
        """Invite the device and enrol it with the one-time code; `hosts` are names under which others may call it."""
        self.enrol(DEVICE, self.device, VARIANT, *hosts)
        with (self.device / "edge.toml").open("a") as settings:
            settings.write(_DEVICE_SETTINGS)

    def enrol(self, name: str, home: Path, variant: str, *hosts: str) -> None:
        """Invite a device and enrol it; it will run this variant."""
        invite = self.shell.run_json("device", "invite", name, *self.operator())
        self.shell.run(
            *("edge", "enrol", "--cloud", self.cloud_address, "--code", invite["code"]),
            *("--trust", self.folder / "site" / "trust", "--home", home),
            *(word for host in hosts for word in ("--host", host)),
        )
        (home / "edge.toml").write_text(f'variant = "{variant}"\n')

    def start_agent(self) -> None:
        """Start the agent on the device and wait until it serves."""
        self.agent = self.start("agent", self.device, self.agent_address)
        self.agent_address = str(self.agent.wait_ready()["address"])
        self._wait_until_ready(self.agent_address)

    @contextmanager
    def another_device(self, variant: str) -> Iterator[str]:
        """Enrol a device that runs another variant, start its agent, and yield its address."""
        home = self.folder / "devices" / variant
        home.parent.mkdir(exist_ok=True)
        self.enrol(f"kiosk-{variant}", home, variant)
        agent = self.start(f"agent-{variant}", home, "127.0.0.1:0")
        try:
            address = str(agent.wait_ready()["address"])
            self._wait_until_ready(address)
            yield address
        finally:
            agent.stop()

    def start(self, name: str, home: Path, listen: str) -> Server:
        """Start the agent on a device's folder."""
        return self.shell.start(
            *(name, "edge", "run", "--home", home, "--model", self.model),
            *("--listen", listen, "--config", home / "edge.toml"),
        )

    def _wait_until_ready(self, address: str) -> None:
        with triton.InferenceServerClient(address) as client:
            ready = f"the agent to serve {self.model}"
            wait_until(lambda: bool(client.is_model_ready(self.model)), ready, 60)

    def agent_status(self) -> Mapping[str, Any]:
        """Return what the agent says about itself."""
        status: Mapping[str, Any] = self.shell.run_json("edge", "status", "--address", self.agent_address)
        return status

    def cloud_status(self) -> Mapping[str, Any]:
        """Return what the cloud says about itself and about this connection."""
        status: Mapping[str, Any] = self.shell.run_json("cloud", "status", *self.operator())
        return status

    def export_captures(self, out: Path, rows: int) -> None:
        """Collect the heavy model's answers that the agent kept; wait until all `rows` of them are on its disk."""
        words = ("edge", "captures", "export", "--home", self.device, "--model", self.model, "--output", out)
        wait_until(lambda: self._exported(words) >= rows, f"{rows} captures", 30, every_s=0.5)

    def _exported(self, words: tuple[str | Path, ...]) -> int:
        try:
            return int(self.shell.run_json(*words)["rows"])
        except ProgramError:  # nothing was written yet
            return 0

    def stop(self) -> None:
        """End both servers."""
        for server in (self.agent, self.cloud):
            if server is not None:
                server.stop()

    def operator(self) -> tuple[str | Path, ...]:
        """Return the flags that an operator's command needs."""
        trust = self.folder / "site" / "trust"
        return ("--cloud", self.cloud_address, "--token-file", self.token, "--trust", trust)
