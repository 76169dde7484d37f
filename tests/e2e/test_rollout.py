"""A staged rollout to real agents: a bad version stops in its first stage, and the device that took it goes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from onnx import numpy_helper
from rich.console import Console
from safetensors.numpy import load_file, save_file

from examples.quickstart.programs import Server, Shell, wait_until
from examples.quickstart.site import Site
from isthmus.bundle import GOLDEN, MANIFEST, open_bundle
from isthmus.digests import sha256_file
from tests.e2e.tiny import CLASSES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

VARIANT = "onnxruntime-fp32"
SETTINGS = """\
audit_share = 1.0
longest_escalation_s = 2.0
"""


class Fleet:
    """Three devices with real agents, all of one line."""

    def __init__(self, site: Site, stack: ExitStack) -> None:
        self.site = site
        self.addresses: dict[str, str] = {}
        for name in ("kiosk-a", "kiosk-b", "kiosk-c"):
            home = site.folder / "devices" / name
            home.parent.mkdir(exist_ok=True)
            site.enrol(name, home, VARIANT)
            with (home / "edge.toml").open("a") as settings:
                settings.write(SETTINGS)
            site.shell.run("device", "label", name, "group=line-3", *site.operator())
            agent: Server = site.start(name, home, "127.0.0.1:0")
            stack.callback(agent.stop)
            self.addresses[name] = str(agent.wait_ready()["address"])

    def command(self, *words: str | Path) -> Any:
        return self.site.shell.run_json(*words, *self.site.operator())

    def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.site.shell.run_json("edge", "status", "--address", self.addresses[name])
        return found

    def serving(self) -> dict[str, int]:
        return {name: version_at(address) for name, address in self.addresses.items()}

    def ask(self, points: np.ndarray[Any, Any]) -> list[str]:
        """Send each point to every device; return what failed."""
        failed = []
        for name, address in self.addresses.items():
            with triton.InferenceServerClient(address) as client:
                for point in points:
                    tensor = triton.InferInput("point", [1, 16], "FP32")
                    tensor.set_data_from_numpy(point[None])
                    try:
                        client.infer("tiny", [tensor], client_timeout=10)
                    except triton.InferenceServerException as error:
                        failed.append(f"{name}: {error}")
        return failed


def version_at(address: str) -> int:
    with triton.InferenceServerClient(address) as client:
        return int(client.get_model_metadata("tiny").versions[-1]) if client.is_model_ready("tiny") else 0


def confidently_wrong(bundle: Path, out: Path) -> Path:
    """A version whose light model names the next class, as sure as before; its golden answers agree with it."""
    shutil.copytree(bundle, out)
    manifest = json.loads((out / MANIFEST).read_text())
    variant = next(row for row in manifest["variants"] if row["id"] == VARIANT)
    entry = out / variant["entry"]
    model = onnx.load(entry)
    last = [tensor for tensor in model.graph.initializer if CLASSES in tensor.dims][-2:]
    for tensor in last:
        values = numpy_helper.to_array(tensor)
        axis = values.shape.index(CLASSES)
        tensor.CopyFrom(numpy_helper.from_array(np.roll(values, 1, axis=axis), tensor.name))
    onnx.save(model, entry)
    golden = load_file(out / GOLDEN)
    name = next(key for key in golden if key.startswith(f"output.{VARIANT}."))
    save_file({**golden, name: np.roll(golden[name], 1, axis=1)}, out / GOLDEN)
    for path in (entry.relative_to(out).as_posix(), GOLDEN):
        changed = out / path
        manifest["files"][path].update(sha256=sha256_file(changed), length=changed.stat().st_size)
    (out / MANIFEST).write_text(json.dumps(manifest))
    open_bundle(out)
    return out


@pytest.fixture
def fleet(tmp_path: Path, bundles: tuple[Path, Path]) -> Iterator[Fleet]:
    site = Site(Shell(Console(quiet=True), tmp_path), tmp_path, "tiny")
    with ExitStack() as stack:
        stack.callback(site.stop)
        site.init_keys()
        site.start_cloud()
        site.publish(bundles[0])
        running = Fleet(site, stack)
        wait_until(lambda: set(running.serving().values()) == {1}, "all devices to serve version 1", 90)
        yield running


def test_a_bad_second_version_stops_in_its_first_stage_and_goes_back(
    fleet: Fleet, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    bad = confidently_wrong(bundles[1], tmp_path / "bad")
    site = fleet.site
    operator = site.folder / "site" / "operator"
    site.shell.run("model", "publish", bad, *site.operator(), "--operator", operator, "--no-release")
    rollout = fleet.command(
        *("rollout", "start", "tiny@2", "--stages", "1,2,100%", "--soak", "30s", "--to", "group=line-3"),
        *("--min-agreement", "60%", "--min-samples", "20"),
    )
    points = np.random.default_rng(3).normal(size=(20, 16)).astype(np.float32) * 2
    failed: list[str] = []
    seen: set[tuple[str, int]] = set()

    def is_over() -> bool:
        failed.extend(fleet.ask(points))
        seen.update(fleet.serving().items())
        return bool(fleet.command("rollout", "status", rollout["rollout"])["state"] == "aborted")

    wait_until(is_over, "the rollout to stop by itself", 120)
    wait_until(lambda: set(fleet.serving().values()) == {1}, "the device to go back", 60)
    failed.extend(fleet.ask(points))
    assert failed == []
    took = {name for name, version in seen if version == 2}
    assert len(took) == 1  # the first cohort, and nobody else

    status = fleet.command("rollout", "status", rollout["rollout"])
    assert len(status["stages"]) == 3
    assert status["stage"] == 1
    for name in fleet.addresses:
        history = json.dumps(fleet.command("device", "show", name))
        assert ("rolled_back" in history) == (name in took)
        last = fleet.status(name)["models"][0]["last_update"]
        # Its own trial found out, or the rollout took it back because of what it reported.
        assert (last.get("reason") in ("trial-agreement", "taken-back")) == (name in took), last
