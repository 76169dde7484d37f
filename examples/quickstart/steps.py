"""The story in ten steps, in the order in which they run.

1. data and models   2. compile   3. trust   4. cloud   5. device   6. requests   7. runtimes   8. update   9. outage
10. result

Each step uses the programs as a person would, through the `isthmus` command and an OIP client, and leaves its raw
results in the story's folder; the report is computed from those files alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from edge.runtimes import is_installed
from examples.quickstart import models as story_models
from examples.quickstart.datasets import Split, Splits
from examples.quickstart.programs import ProgramError, Shell, wait_until
from examples.quickstart.recipe import write_recipe
from examples.quickstart.site import VARIANT, Site
from examples.quickstart.story import Story
from examples.quickstart.traffic import Recording, SteadyLoad, send_all
from isthmus.bundle import open_bundle
from isthmus.digests import sha256_file
from isthmus.terminal import progress

WORKERS: Final = 2  # clients that send at the same time
RUNTIME_MESSAGES: Final = 400  # for each of the other runtimes


@dataclass(slots=True)
class Run:
    """One run of the story: what it works on, and what it has learned so far."""

    story: Story
    build: Path
    console: Console
    quiet_s: float = 3.0  # of undisturbed load before and after each event
    outage_s: float = 4.0  # how long the gateway stays away
    splits: Splits = field(init=False)
    models: story_models.Models = field(init=False)
    site: Site = field(init=False)
    facts: dict[str, Any] = field(default_factory=dict)
    step_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where this story's results go."""
        return self.build / ("demo" if self.story.name == "news" else f"demo-{self.story.name}")

    @property
    def raw(self) -> Path:
        """Where the rows of all requests go."""
        return self.folder / "raw"


def run_story(run: Run) -> None:
    """Run all steps; the servers end with it, whatever happens."""
    shutil.rmtree(run.folder, ignore_errors=True)
    run.raw.mkdir(parents=True)
    run.site = Site(Shell(run.console, run.folder), run.folder, run.story.model_name)
    steps: list[tuple[str, Callable[[Run], None]]] = [
        ("data and models", prepare_models),
        ("compile", compile_first),
        ("trust", create_trust),
        ("cloud", start_cloud),
        ("device", start_device),
        ("requests", send_requests),
        ("runtimes", try_runtimes),
        ("update", update_light_model),
        ("outage", kill_the_cloud),
    ]
    started = time.monotonic()
    try:
        for number, (name, step) in enumerate(steps, 1):
            run.console.rule(f"[bold]{number}. {name}", align="left")
            begun = time.monotonic()
            step(run)
            run.step_seconds[name] = round(time.monotonic() - begun, 1)
    finally:
        run.site.stop()
    run.facts |= {"step_seconds": run.step_seconds, "wall_s": round(time.monotonic() - started, 1)}
    (run.raw / "facts.json").write_text(json.dumps(run.facts, indent=2))


def prepare_models(run: Run) -> None:
    """Fetch data and weights, train the heavy model and version 1 of the light one (kept for the next run)."""
    run.console.print(f"[dim]{run.story.licence}[/]")
    with progress() as bars:
        run.splits = run.story.prepare(run.build / "data", bars)
        run.models = story_models.train_first(run.story, run.splits, run.build / "models", bars)
    np.save(run.raw / "test-labels.npy", run.splits.test.labels)
    story_models.save_samples(run.splits.quantization, run.folder / "quantization.safetensors", labels=False)
    story_models.save_samples(run.splits.calibration, run.folder / "calibration.safetensors", labels=True)
    parts = {name: len(getattr(run.splits, name)) for name in ("labelled", "traffic", "calibration", "test")}
    run.console.print("samples: " + ", ".join(f"{count:,} {name}" for name, count in parts.items()))


def compile_first(run: Run) -> None:
    """Make bundle version 1: five variants of the light model, the heavy one for Triton, thresholds and proofs."""
    bundle = _compile(run, 1, run.models.light, previous=None)
    manifest = json.loads((bundle / "manifest.json").read_text())
    run.facts["bundle"] = {
        "files": len(manifest["files"]),
        "bytes": sum(entry["length"] for entry in manifest["files"].values()),
        "variants": [variant["id"] for variant in manifest["variants"]],
    }


def create_trust(run: Run) -> None:
    """Make the private CA, the keys that sign updates and the keys that sign tokens."""
    run.site.init_keys()


def start_cloud(run: Run) -> None:
    """Start gateway, registry and Triton; publish version 1."""
    state = run.site.start_cloud()
    run.console.print(f"  listening on {state['address']} (TLS 1.3 only), Triton is process {state['triton_pid']}")
    run.site.publish(run.folder / "bundle-1")


def start_device(run: Run) -> None:
    """Enrol the device with a one-time code, start its agent, let it fetch and check version 1."""
    run.site.enrol_device()
    run.site.start_agent()
    run.console.print(f"  the agent serves {run.story.model_name} on {run.site.agent_address}")


def send_requests(run: Run) -> None:
    """Send the unlabelled traffic, then the test messages: routed, light model alone, heavy model alone.

    The heavy model's answers to the traffic are collected before the first test message is sent, so that nothing of
    the test part can reach the training of version 2.
    """
    traffic = _send(run, "traffic", run.splits.traffic, "unlabelled traffic")
    run.site.export_captures(run.folder / "captured.safetensors", traffic.routes()["cloud"])
    before = run.site.agent_status()["uplink"]["bytes_up"]
    _send(run, "v1-isthmus", run.splits.test, "test messages")
    run.facts["bytes_up"] = {"v1": run.site.agent_status()["uplink"]["bytes_up"] - before}
    _send(run, "v1-edge", run.splits.test, "test messages, light model only", route="edge")
    _send(run, "v1-cloud", run.splits.test, "test messages, heavy model only", route="cloud")


def try_runtimes(run: Run) -> None:
    """Run every other variant that this machine can, each on a device of its own, over the first test messages."""
    manifest = open_bundle(run.folder / "bundle-1")
    split = run.splits.test.take(np.arange(min(RUNTIME_MESSAGES, len(run.splits.test))))
    for variant in manifest.variants:
        if variant.id == VARIANT or not is_installed(variant.runtime):
            continue
        with run.site.another_device(variant.id) as address:
            _send(run, f"runtime-{variant.id}", split, f"{variant.id}", route="edge", address=address)


def update_light_model(run: Run) -> None:
    """Train version 2 on the heavy model's answers, publish it, and watch the agent change over under load."""
    light = run.folder / "light-v2.onnx"
    with progress() as bars:
        learned = story_models.train_update(
            run.story, run.splits, run.models, run.folder / "captured.safetensors", light, bars
        )
    run.console.print(f"  version 2 learned from {learned:,} answers of the heavy model")
    bundle = _compile(run, 2, light, previous=run.folder / "bundle-1")
    with _steady_load(run, "update") as load:
        time.sleep(run.quiet_s)
        published = time.time()
        run.site.publish(bundle)
        wait_until(lambda: any(r.version == 2 for r in load.since(published)), "the agent to serve version 2", 60)
        run.facts["update_events"] = {"published": published, "serving": time.time()}
        wait_until(lambda: _trial_ended(run, version=2), "the end of its trial", 60)
    if (last := _last_update(run))["outcome"] != "active":
        raise ProgramError(f"version 2 did not stand its trial: {last['reason']}, {last['detail']}")
    run.facts["update"] = _last_update(run) | {"rebuilt_equal": _slot_equals(run, bundle)}
    before = run.site.agent_status()["uplink"]["bytes_up"]
    _send(run, "v2-isthmus", run.splits.test, "test messages, version 2")
    run.facts["bytes_up"]["v2"] = run.site.agent_status()["uplink"]["bytes_up"] - before
    _send(run, "v2-edge", run.splits.test, "test messages, version 2, light model only", route="edge")


def kill_the_cloud(run: Run) -> None:
    """Kill Triton under load, then the gateway; both come back and are used again."""
    run.facts["cloud_status"] = run.site.cloud_status()
    cloud = run.site.running_cloud()
    events: dict[str, float] = {}
    with _steady_load(run, "outage") as load:
        time.sleep(run.quiet_s)
        events["triton killed"] = time.time()
        os.kill(int(cloud.state()["triton_pid"]), signal.SIGKILL)
        wait_until(lambda: _answered_by(load, "fallback", events["triton killed"]), "a fallback answer", 30)
        events["triton back"] = _wait_for_cloud(load)
        time.sleep(run.quiet_s)
        events["gateway killed"] = time.time()
        cloud.kill()
        time.sleep(run.outage_s)
        run.site.start_cloud()
        events["gateway back"] = _wait_for_cloud(load)
        time.sleep(run.quiet_s)
    run.facts["outage_events"] = events
    run.facts["agent_pid_unchanged"] = run.site.agent is not None and run.site.agent.alive()


def _compile(run: Run, version: int, light: Path, *, previous: Path | None) -> Path:
    recipe = write_recipe(
        run.folder / f"recipe-{version}.toml",
        story=run.story,
        version=version,
        light=light,
        heavy=run.models.heavy,
        samples=run.folder,
        previous=previous,
    )
    bundle = run.folder / f"bundle-{version}"
    cache = run.build / "compile-cache"
    rows = run.site.shell.run_json("compile", recipe, "--output", bundle, "--cache", cache)
    run.facts.setdefault("compiled", {})[str(version)] = rows
    return bundle


def _send(run: Run, name: str, split: Split, title: str, *, route: str = "", address: str = "") -> Recording:
    """Send all samples with live progress, keep the rows under `name` and return them."""
    with progress() as bars:
        task = bars.add_task(title, total=len(split))

        def tick(recording: Recording) -> None:
            counts = " ".join(f"{route} {n:,}" for route, n in recording.routes().items() if n) if route == "" else ""
            bars.update(task, completed=len(recording.records), description=f"{title} [dim]{counts}[/]")

        every = _every(50, tick)
        recording = send_all(
            address or run.site.agent_address, run.story.model_name, split, workers=WORKERS, route=route, tick=every
        )
        tick(recording)
    recording.save(run.raw / f"{name}.npz")
    return recording


def _every(count: int, tick: Callable[[Recording], None]) -> Callable[[Recording], None]:
    calls = iter(range(1 << 60))
    return lambda recording: tick(recording) if next(calls) % count == 0 else None


@contextmanager
def _steady_load(run: Run, name: str) -> Iterator[SteadyLoad]:
    load = SteadyLoad(run.site.agent_address, run.story.model_name, run.splits.test, workers=WORKERS)
    try:
        with load:
            yield load
    finally:
        load.recording.save(run.raw / f"{name}.npz")


def _answered_by(load: SteadyLoad, route: str, moment: float) -> bool:
    return any(record.route == route for record in load.since(moment))


def _wait_for_cloud(load: SteadyLoad) -> float:
    """Return when an escalation succeeded again."""
    now = time.time()
    wait_until(lambda: _answered_by(load, "cloud", now), "an escalation to succeed again", 90)
    return time.time()


def _model_status(status: Any, run: Run) -> dict[str, Any]:
    found: dict[str, Any] = next(m for m in status["models"] if m["model"] == run.story.model_name)
    return found


def _last_update(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = _model_status(run.site.agent_status(), run)["last_update"] or {"outcome": ""}
    return found


def _trial_ended(run: Run, *, version: int) -> bool:
    last = _last_update(run)
    return bool(last.get("to_version") == version and last["outcome"] not in ("updating", "soaking"))


def _slot_equals(run: Run, bundle: Path) -> bool:
    """Return whether every file of the device's variant is byte for byte the published one."""
    slot = run.site.device / "models" / run.story.model_name / "slots" / "2"
    paths = [path.relative_to(bundle) for path in (bundle / "variants" / VARIANT).iterdir()]
    return bool(paths) and all(sha256_file(slot / path) == sha256_file(bundle / path) for path in paths)
