"""A device that is killed while it updates itself, again and again; in a process of its own, which forks it.

`python -m tests.edge.killed_device FOLDER random KILLS SEED` kills it at random instants,
`python -m tests.edge.killed_device FOLDER steps` around the write of every named step. Each start of the device must
serve a whole version that answers right; what was seen is printed as JSON.

The device is on version 1 and is told to go to 2 (good), 3 (bad: goes back by itself) and 4 (good), each on trial.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from edge import assembly
from edge.model import ServedModels
from edge.state import Course, Order, State, Step
from edge.store import SlotStore, check_slot
from edge.tally import Tally
from edge.trial import Terms
from edge.updater import Updater
from isthmus.delta import apply_delta
from isthmus.errors import UnavailableError
from tests.edge import bundles
from tests.edge.manual_time import ManualTime
from tests.edge.registry import Registry, make_updater

MODEL = "triage"
VERSIONS = (2, 3, 4)
BAD = 3
TERMS = Terms(soak_s=40, shadow_requests=0, max_error_rate=0.05)
PATIENCE_S = 60.0
STEPS = [step for step in Step if step not in (Step.IDLE, Step.SHADOW)]


async def right(models: ServedModels) -> int:
    """Return the version that serves, after it has answered right."""
    live = models.find(MODEL)
    with live.in_use():
        outputs = await live.infer({"x": np.array([[1, 0, 0]], np.float32)})
    version = live.manifest.version
    assert np.allclose(outputs["logits"], np.array([[1, 0, 0]]) @ bundles.weights(version))
    return version


async def device(home: Path, registry: Registry, tell: Callable[[str], None]) -> None:
    """Live the life of a device until killed."""
    models = ServedModels((MODEL,))

    async def traffic() -> None:
        await right(models)
        live = models.find(MODEL)
        tally: Tally = live.tally
        tally.computed(0.001)
        tally.errors += live.manifest.version == BAD

    time_ = ManualTime(traffic)
    updater = make_updater(home, registry, models, clock=time_.clock, pause=time_.pause)
    await updater.start()
    version = await right(models)
    check_slot(home / "slots" / str(version), "onnxruntime-fp32")
    tell(f"serves {version}")
    trials = asyncio.ensure_future(updater.probation.watch())
    await updater.probation.settled()
    for wanted in VERSIONS:
        order = Order(version=wanted, terms=TERMS, attempt=1)
        if models.version(MODEL) >= wanted or updater.gave_up(order) is not None:
            continue
        try:
            await updater.update(order)
        except UnavailableError as error:
            tell(f"error {error.message}")
        await updater.probation.settled()
        await right(models)
    tell("done")
    await trials


async def apply_here(old: Path, delta: Path, out: Path, *, sha256: str, length: int) -> None:
    """Apply a delta without a process of its own, whose start would take most of each life."""
    await asyncio.to_thread(apply_delta, old, delta, out, sha256=sha256, length=length)


class Forked:
    """One life of the device."""

    def __init__(self, home: Path, registry: Registry, prepare: Callable[[], None] = lambda: None) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            code = 1
            try:
                prepare()
                asyncio.run(device(home, registry, lambda line: self._tell(writing, line)))
            except BaseException as error:  # nothing else would be heard of it
                self._tell(writing, f"error {error!r}"[:400])
            finally:
                os._exit(code)
        os.close(writing)
        self._pipe = reading
        self._heard = b""
        self.lines: list[str] = []

    @staticmethod
    def _tell(pipe: int, line: str) -> None:
        os.write(pipe, line.encode() + b"\n")

    def hear(self, until: Callable[[], bool], patience_s: float) -> None:
        """Read what it says until a condition holds, it is gone, or the time is over."""
        deadline = time.monotonic() + patience_s
        while not until():
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._pipe], [], [], left)[0]:
                return
            data = os.read(self._pipe, 4096)
            if not data:
                return
            *lines, self._heard = (self._heard + data).split(b"\n")
            self.lines += [line.decode() for line in lines]
            errors = [line for line in self.lines if line.startswith("error")]
            if errors:
                raise AssertionError(errors[0])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        os.close(self._pipe)
        return os.waitstatus_to_exitcode(status)

    @property
    def serves(self) -> bool:
        return any(line.startswith("serves") for line in self.lines)

    @property
    def done(self) -> bool:
        return "done" in self.lines


def new_home(folder: Path, registry: Registry) -> Path:
    """Return a template of a device with version 1."""

    async def install() -> None:
        models = ServedModels((MODEL,))
        updater: Updater = make_updater(folder, registry, models)
        await updater.update(Order(version=1))
        SlotStore(folder).prove(1)
        await updater.probation.stop()
        models.swap(MODEL, None)

    elsewhere(lambda: asyncio.run(install()))
    return folder


def elsewhere(act: Callable[[], object]) -> None:
    """Do something in a child: this process stays without the threads of runtimes, or it could not be forked."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def copy(template: Path, home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(template, home)


def at_random(folder: Path, registry: Registry, template: Path, kills: int, seed: int) -> dict[str, Any]:
    rng, home = random.Random(seed), folder / "device"
    copy(template, home)
    first = Forked(home, registry)
    began = time.monotonic()
    first.hear(lambda: first.done, PATIENCE_S)
    course_s = time.monotonic() - began
    first.kill()
    assert first.done, first.lines
    found: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    copy(template, home)
    for _ in range(kills):
        life = Forked(home, registry)
        if rng.random() < 0.9:  # the others may be killed while they start
            life.hear(lambda life=life: life.serves, PATIENCE_S)  # type: ignore[misc]
            assert life.serves, life.lines
        life.hear(lambda life=life: life.done, rng.uniform(0, course_s))  # type: ignore[misc]
        life.kill()
        state = State.model_validate_json((home / "state.json").read_bytes())
        steps[state.progress.step if state.progress else Step.IDLE] += 1
        found[next((line for line in life.lines if line.startswith("serves")), "killed while it started")] += 1
        if life.done:
            copy(template, home)
    last = Forked(home, registry)
    last.hear(lambda: last.done, PATIENCE_S)
    last.kill()
    assert last.done, last.lines
    return {"found": found, "steps": steps, "course_s": course_s}


def at_steps(folder: Path, registry: Registry, template: Path) -> dict[str, Any]:
    home = folder / "device"
    found: dict[str, str] = {}
    for step in STEPS:
        for moment in ("before", "after"):
            copy(template, home)
            life = Forked(home, registry, lambda step=step, moment=moment: kill_at(step, moment))  # type: ignore[misc]
            life.hear(lambda: False, PATIENCE_S)
            assert life.wait() == -signal.SIGKILL, (step, moment, life.lines)
            again = Forked(home, registry)
            again.hear(lambda again=again: again.done, PATIENCE_S)  # type: ignore[misc]
            again.kill()
            assert again.done, (step, moment, again.lines)
            found[f"{moment} {step}"] = again.lines[0]
    return {"found": found}


def kill_at(step: Step, moment: str) -> None:
    """Kill this process when it is about to enter a step, or when the disk has just got to know of it."""
    enter, write = Course.enter, SlotStore._write_state

    def killing_enter(self: Course, to: Step, version: int) -> None:
        if moment == "before" and to is step:
            os.kill(os.getpid(), signal.SIGKILL)
        enter(self, to, version)
        killing_enter.entered = to  # type: ignore[attr-defined]

    def killing_write(self: SlotStore, state: State) -> None:
        write(self, state)
        at = state.progress.step if state.progress is not None else getattr(killing_enter, "entered", None)
        if moment == "after" and at is step:
            os.kill(os.getpid(), signal.SIGKILL)

    Course.enter = killing_enter  # type: ignore[assignment, method-assign]
    SlotStore._write_state = killing_write  # type: ignore[method-assign]


def main(folder: Path, what: str, *numbers: str) -> None:
    assembly.apply_apart = apply_here  # type: ignore[attr-defined]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    elsewhere(lambda: Registry(folder / "registry", (1, *VERSIONS)))
    registry = Registry(folder / "registry", ())
    for version in (1, *VERSIONS):
        registry.index(version)
    template = new_home(folder / "template", registry)
    if what == "steps":
        told = at_steps(folder, registry, template)
    else:
        told = at_random(folder, registry, template, int(numbers[0]), int(numbers[1]))
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
