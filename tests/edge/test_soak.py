"""Versions on trial, with real models: good ones are kept, bad ones go back by themselves; no request is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.conditions import PostponedError
from edge.config import UpdateSettings
from edge.model import LiveModel, ServedModels
from edge.outcome import Outcome
from edge.router import Router
from edge.shadow import Shadow
from edge.state import Became, Order, State, Step
from edge.store import SlotStore
from edge.trial import Reason, Terms, judge
from edge.uplink import Answer, Check, Failure, Need
from isthmus.bundle import Ceilings
from isthmus.errors import NotFoundError
from isthmus.policies import Link
from isthmus.tensors import Array, encode_request
from tests.edge import bundles
from tests.edge.manual_time import ManualTime
from tests.edge.registry import Registry, make_updater

MODEL = "triage"
TERMS = Terms(
    soak_s=60, min_requests=20, max_error_rate=0.05, max_latency_ratio=3.0, max_escalation_change=0.2, min_agreement=0.8
)


class NoCloud:
    link = Link()

    async def escalate(
        self, request: bytes, *, remaining_s: float, check: Check, late: Callable[[], None] | None = None
    ) -> Answer | Failure:
        return Failure("unavailable")

    async def hedge(self, request: bytes, *, remaining_s: float, needed: asyncio.Future[Need]) -> Answer | Failure:
        return Failure("unavailable")


@dataclass
class Device:
    """A device whose requests come in at every pause of its clock."""

    folder: Path
    registry: Registry
    settings: UpdateSettings = field(default_factory=lambda: UpdateSettings(trial=Terms()))
    now: Callable[[], datetime] = datetime.now
    reports: list[Outcome] = field(default_factory=list)
    x: Array = field(default_factory=lambda: bundles.SURE)
    requests: int = 1  # at a pause

    def __post_init__(self) -> None:
        self.time = ManualTime(self.traffic)
        self.boot()

    def boot(self, **parts: Any) -> None:
        """Start the agent anew; what was in memory is lost."""
        self.models = ServedModels((MODEL,))
        self.shadow = Shadow()
        self.router = Router(self.models, NoCloud(), shadow=self.shadow)
        self.updater = make_updater(
            self.folder,
            self.registry,
            self.models,
            report=self.reports.append,
            settings=self.settings,
            now=self.now,
            clock=self.time.clock,
            pause=self.time.pause,
            shadow=self.shadow,
            **parts,
        )

    async def traffic(self) -> None:
        for _ in range(self.requests):
            await self.ask()

    async def ask(self) -> Any:
        request = encode_request(MODEL, {"x": self.x})
        return await self.router.answer(request.SerializeToString(), request, 10.0)

    async def serve(self, version: int) -> None:
        """Install a first version, and let it serve for a while."""
        assert (await self.updater.update(Order(version=version))).active
        for _ in range(100):
            await self.ask()

    async def try_out(self, version: int, terms: Terms = TERMS, **order: Any) -> Outcome:
        """Bring a version, and let its trial come to its end."""
        outcome = await self.updater.update(Order(version=version, terms=terms, **order))
        assert outcome.became is Became.SOAKING, outcome
        await self.until_settled()
        assert self.updater.last is not None
        return self.updater.last

    async def until_settled(self) -> None:
        trials = asyncio.ensure_future(self.updater.probation.watch())
        async with asyncio.timeout(60):
            await self.updater.probation.settled()
        trials.cancel()

    async def right(self, version: int) -> bool:
        """Return whether this version answers, and right."""
        told = await self.ask()
        logits = np.frombuffer(told.raw_output_contents[0], np.float32)
        x = np.asarray(self.x)
        return told.model_version == str(version) and bool(np.allclose(logits, x @ bundles.weights(version)))

    @property
    def state(self) -> State:
        return State.model_validate_json((self.folder / "state.json").read_bytes())


def with_device(tmp_path: Path, scenario: Callable[[Device], Awaitable[None]], **changes: Any) -> None:
    async def run() -> None:
        device = Device(tmp_path / "device", Registry(tmp_path / "registry", (1, 2)), **changes)
        try:
            await scenario(device)
        finally:
            await device.updater.probation.stop()
            device.models.swap(MODEL, None)

    asyncio.run(run())


def spoil(device: Device, version: int, fault: str, **changes: Any) -> None:
    device.registry.publish(
        version, lambda folder, number: bundles.build_bundle(folder, number, fault=fault, **changes)
    )


def test_a_good_version_is_kept_and_the_one_before_it_stays_as_the_last_good_one(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        outcome = await device.try_out(2, rollout="r1", attempt=3)
        assert (outcome.became, outcome.reason, outcome.order.rollout) == (Became.ACTIVE, "", "r1")
        assert outcome.evidence is not None
        assert outcome.evidence.now.requests >= 20
        assert outcome.evidence.before.requests == 100
        assert [r.became for r in device.reports if r.to_version == 2] == ["updating", "soaking", "active"]
        assert (device.state.current, device.state.previous, device.state.newest) == (2, 1, 2)
        assert device.state.progress is None
        assert sorted(path.name for path in (device.folder / "slots").iterdir()) == ["1", "2"]
        assert await device.right(2)

    with_device(tmp_path, scenario)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("nan", "trial-errors"), ("hard", "trial-escalation"), ("slow", "trial-latency")],
)
def test_a_bad_version_goes_back_by_itself(tmp_path: Path, fault: str, reason: str) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        spoil(device, 3, fault)
        outcome = await device.try_out(3)
        assert (outcome.became, outcome.reason, outcome.serving_version) == (Became.ROLLED_BACK, reason, 1)
        assert outcome.detail
        assert outcome.evidence is not None
        assert outcome.evidence.now.requests < 60  # long before its time was over
        assert device.models.counters[MODEL].errors == 0
        assert await device.right(1)
        assert (device.state.current, device.state.newest, device.state.failed) == (1, 1, {3: reason})
        assert sorted(path.name for path in (device.folder / "slots").iterdir()) == ["1"]

    with_device(tmp_path, scenario)


@pytest.mark.parametrize("both_fit", [True, False])
def test_a_machine_that_has_become_busy_costs_a_good_version_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, both_fit: bool
) -> None:
    monkeypatch.setattr("edge.probation._memory_allows", lambda slot: both_fit)

    async def scenario(device: Device) -> None:
        await device.serve(1)
        asked = device.ask

        async def ask_busy() -> Any:
            told = await asked()
            live = device.models.live(MODEL)
            assert live is not None
            for _ in range(9):  # as long as it takes where something else wants the machine
                live.tally.computed(0.5)
            return told

        device.ask = ask_busy  # type: ignore[method-assign]
        outcome = await device.try_out(2)
        assert (outcome.became, outcome.reason) == (Became.ACTIVE, "")
        assert outcome.evidence is not None
        assert judge(TERMS, outcome.evidence).broken is Reason.LATENCY  # it looks much slower than the one before
        device.ask = asked  # type: ignore[method-assign]
        assert await device.right(2)

    with_device(tmp_path, scenario)


def test_a_slow_version_goes_back_where_memory_does_not_allow_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.probation._memory_allows", lambda slot: False)

    async def scenario(device: Device) -> None:
        await device.serve(1)
        spoil(device, 3, "slow")
        outcome = await device.try_out(3)
        assert (outcome.became, outcome.reason) == (Became.ROLLED_BACK, "trial-latency")
        assert await device.right(1)

    with_device(tmp_path, scenario)


def test_a_version_that_failed_here_is_not_tried_again_unless_told_so(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        spoil(device, 3, "nan")
        await device.try_out(3, attempt=2)
        device.boot()
        await device.updater.start()
        told = device.updater.gave_up(Order(version=3, attempt=2))
        assert told is not None
        assert (told.became, told.reason) == (Became.ROLLED_BACK, "trial-errors")
        assert device.updater.gave_up(Order(version=3, attempt=3)) is None
        assert device.updater.gave_up(Order(version=2)) is None

    with_device(tmp_path, scenario)


def test_a_trial_goes_on_after_a_crash_with_what_was_left_of_it(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        device.requests = 1
        await device.updater.update(Order(version=2, terms=TERMS.model_copy(update={"soak_s": 100.0})))
        trials = asyncio.ensure_future(device.updater.probation.watch())
        until = device.time.seconds + 40
        while device.time.seconds < until:
            await asyncio.sleep(0)
        trials.cancel()  # as a crash does: nothing is written any more
        await asyncio.gather(trials, return_exceptions=True)

        device.boot()
        await device.updater.start()
        assert device.reports[-1].became is Became.SOAKING
        again = device.time.seconds
        trial = device.updater.probation.trial
        assert trial is not None
        assert 25 <= trial.seen.seconds <= 40
        assert 25 <= trial.seen.requests <= 40
        assert trial.before.requests == 100
        await device.until_settled()
        assert device.updater.last is not None
        assert device.updater.last.became is Became.ACTIVE
        assert 60 <= device.time.seconds - again <= 76
        assert await device.right(2)

    with_device(tmp_path, scenario)


def test_a_version_that_kills_the_process_is_given_up_after_three_deaths(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def fatal(slot: Path, variant: str) -> LiveModel:
        if slot.name == "2":
            raise Killed
        return right(slot, variant)

    async def scenario(device: Device) -> None:
        await device.serve(1)
        await device.updater.update(Order(version=2, terms=TERMS, attempt=1))
        for _ in range(2):
            device.boot(open_slot=fatal)
            with pytest.raises(Killed):
                await device.updater.start()
        device.boot(open_slot=fatal)
        await device.updater.start()
        assert device.updater.last is not None
        assert (device.updater.last.became, device.updater.last.reason) == (Became.ROLLED_BACK, "trial-crashes")
        assert device.reports[-1] is device.updater.last
        assert await device.right(1)
        assert device.updater.gave_up(Order(version=2, attempt=1)) is not None

    from edge.model import open_model as right

    with_device(tmp_path, scenario)


def test_a_version_kept_at_once_is_given_up_too_when_it_kills_the_process(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        await device.updater.update(Order(version=2))
        for _ in range(3):
            device.models.swap(MODEL, None)
            device.boot()
            await device.updater.start()
        assert await device.right(1)

    with_device(tmp_path, scenario)


def test_the_only_version_is_not_given_up_however_often_the_power_fails(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        for _ in range(5):
            device.models.swap(MODEL, None)
            device.boot()
            await device.updater.start()
            assert await device.right(1)

    with_device(tmp_path, scenario)


def test_orderly_stops_are_no_crashes_and_a_version_that_lives_is_proven(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        await device.updater.update(Order(version=2))
        for _ in range(5):
            await device.updater.probation.stop()
            device.models.swap(MODEL, None)
            device.boot()
            await device.updater.start()
        assert await device.right(2)
        assert not device.state.proven
        trials = asyncio.ensure_future(device.updater.probation.watch())
        async with asyncio.timeout(60):
            while not device.state.proven:
                await asyncio.sleep(0)
        trials.cancel()
        for _ in range(5):
            device.models.swap(MODEL, None)
            device.boot()
            await device.updater.start()
        assert await device.right(2)

    with_device(tmp_path, scenario)


def test_a_self_test_that_kills_the_process_is_not_run_for_ever(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    from edge.model import open_model as right

    def fatal(slot: Path, variant: str) -> LiveModel:
        if slot.name == "2":
            raise Killed
        return right(slot, variant)

    async def scenario(device: Device) -> None:
        await device.serve(1)
        for _ in range(3):
            device.models.swap(MODEL, None)
            device.boot(open_slot=fatal)
            await device.updater.start()
            assert device.updater.order in (None, Order(version=2))
            with pytest.raises(Killed):
                await device.updater.update(Order(version=2))
        device.boot(open_slot=fatal)
        await device.updater.start()
        outcome = await device.updater.update(Order(version=2))
        assert (outcome.became, outcome.reason) == (Became.REFUSED, "self-test-crashed")
        assert await device.right(1)

    with_device(tmp_path, scenario)


def test_a_killed_roll_back_is_finished_at_the_next_start(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        await device.updater.update(Order(version=2, terms=TERMS, rollout="r"))
        store = SlotStore(device.folder)
        assert store.state.progress is not None
        going = {"step": Step.ROLL_BACK, "reason": "trial-errors", "detail": "so many"}
        store.enter(store.state.progress.model_copy(update=going))
        device.boot()
        await device.updater.start()
        assert device.updater.last is not None
        told = device.updater.last
        assert (told.became, told.reason, told.detail) == (Became.ROLLED_BACK, "trial-errors", "so many")
        assert (told.to_version, told.serving_version, told.order.rollout) == (2, 1, "r")
        assert await device.right(1)

    with_device(tmp_path, scenario)


def test_the_cloud_takes_a_version_back_while_it_is_on_trial(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        await device.updater.update(Order(version=2, terms=TERMS))
        assert not device.updater.probation.take_back(Order(version=3))
        assert device.updater.probation.take_back(Order(version=1))
        await device.until_settled()
        assert device.updater.last is not None
        assert (device.updater.last.became, device.updater.last.reason) == (Became.ROLLED_BACK, "taken-back")
        assert await device.right(1)

    with_device(tmp_path, scenario)


def test_without_memory_for_two_the_version_before_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.probation._memory_allows", lambda slot: False)

    async def scenario(device: Device) -> None:
        await device.serve(1)
        spoil(device, 3, "nan")
        assert (await device.try_out(3)).became is Became.ROLLED_BACK
        assert device.models.counters[MODEL].errors == 0
        assert await device.right(1)

    with_device(tmp_path, scenario)


def test_a_roll_back_does_not_wait_for_a_disk_that_takes_no_writes(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        spoil(device, 3, "nan")
        await device.updater.update(Order(version=3, terms=TERMS))
        refused = 0

        def refuse(*args: Any, **kwargs: Any) -> None:
            nonlocal refused
            refused += 1
            if refused < 5:
                raise OSError(30, "Read-only file system")
            write(*args, **kwargs)

        import edge.store

        write = edge.store.write_atomically
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("edge.store.write_atomically", refuse)
            await device.until_settled()
        assert refused >= 5
        assert await device.right(1)
        assert device.state.current == 1

    with_device(tmp_path, scenario)


@pytest.mark.slow
def test_what_a_shadow_run_finds_is_refused_before_it_serves(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        dark = TERMS.model_copy(update={"shadow_requests": 30})
        for version, (fault, reason) in enumerate(
            [("nan", "shadow-not-finite"), ("wrong", "shadow-agreement"), ("slow", "shadow-latency")], start=3
        ):
            spoil(device, version, fault)
            done = asyncio.Event()

            async def caller(done: asyncio.Event = done) -> None:
                while not done.is_set():
                    assert await device.right(1)
                    await asyncio.sleep(0)

            asking = asyncio.ensure_future(caller())
            outcome = await device.updater.update(Order(version=version, terms=dark))
            done.set()
            await asking
            assert (outcome.became, outcome.reason) == (Became.REFUSED, reason)
            assert outcome.serving_version == 1

    with_device(tmp_path, scenario)


def test_a_good_version_passes_its_shadow_run(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        updating = asyncio.ensure_future(
            device.updater.update(Order(version=2, terms=Terms(shadow_requests=30, min_agreement=0.9)))
        )
        while not updating.done():
            await device.ask()
            await asyncio.sleep(0)
        assert updating.result().became is Became.ACTIVE
        assert await device.right(2)
        live = device.models.live(MODEL)
        assert live is not None
        assert live.tally.requests == 1  # the run in the dark is not of its service

    with_device(tmp_path, scenario)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "ceilings", "reason"),
    [
        ("slow", Ceilings(latency_ms=0.5), "too-slow"),
        ("large", Ceilings(memory_bytes=10_000_000), "too-large"),
    ],
)
def test_a_version_above_its_ceilings_is_refused(tmp_path: Path, fault: str, ceilings: Ceilings, reason: str) -> None:
    async def scenario(device: Device) -> None:
        await device.serve(1)
        device.registry.fail["delta"] = NotFoundError("not worth its bytes")
        spoil(device, 3, fault, ceilings=ceilings)
        outcome = await device.updater.update(Order(version=3))
        assert (outcome.became, outcome.reason) == (Became.REFUSED, reason)
        spoil(device, 4, fault, ceilings=Ceilings(latency_ms=60_000.0, memory_bytes=4_000_000_000))
        assert (await device.updater.update(Order(version=4))).active

    with_device(tmp_path, scenario)


def test_a_signed_floor_lets_a_device_be_told_to_go_back_and_no_further(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        registry = device.registry
        for version in (3, 4, 5):
            registry.publish(version)
        registry.floors[5] = 3
        for version in (4, 5):
            assert (await device.updater.update(Order(version=version))).active
        calls = len(registry.calls)
        back = await device.updater.update(Order(version=4))
        assert back.active
        assert set(registry.calls[calls:]) == {"manifest"}  # its slot was there: nothing was fetched
        assert await device.right(4)
        assert device.state.newest == 5
        assert (await device.updater.update(Order(version=3))).active
        assert (await device.updater.update(Order(version=2))).reason == "rollback"
        assert await device.right(3)
        registry.withdrawn[5] = "it is bad"
        told = await device.updater.update(Order(version=5))
        assert (told.became, told.reason) == (Became.REFUSED, "withdrawn")
        assert "it is bad" in told.detail
        assert await device.right(3)

    with_device(tmp_path, scenario)


def test_a_damaged_slot_of_the_version_before_is_fetched_again(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        device.registry.floors[2] = 1
        for version in (1, 2):
            await device.updater.update(Order(version=version))
        model = device.folder / "slots" / "1" / "variants" / "onnxruntime-fp32" / "model.onnx"
        model.unlink()
        assert (await device.updater.update(Order(version=1))).active
        assert await device.right(1)

    with_device(tmp_path, scenario)


def test_files_come_at_any_time_and_versions_change_in_the_window(tmp_path: Path) -> None:
    hour = 12

    async def scenario(device: Device) -> None:
        nonlocal hour
        await device.updater.start()
        with pytest.raises(PostponedError) as postponed:
            await device.updater.update(Order(version=1))
        assert (postponed.value.reason, postponed.value.retry_s) == ("outside-window", 13 * 3600)
        assert device.reports[-1].reason == "outside-window"
        assert device.reports[-1].became is Became.UPDATING
        fetched = len(device.registry.calls)
        device.boot()
        await device.updater.start()
        assert device.updater.order == Order(version=1)
        hour = 2
        outcome = await device.updater.update(Order(version=1))
        assert outcome.active
        assert outcome.bytes_fetched > 0
        assert set(device.registry.calls[fetched:]) == {"manifest"}

    with_device(
        tmp_path,
        scenario,
        settings=UpdateSettings(trial=Terms(), window="01:00-05:00"),
        now=lambda: datetime(2026, 3, 2, hour),  # noqa: DTZ001 - windows are in local time
    )


def test_nothing_is_fetched_outside_the_window_where_that_was_asked_for(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        with pytest.raises(PostponedError, match="opens in 780 min"):
            await device.updater.update(Order(version=1))
        assert device.registry.calls == ["manifest"]

    with_device(
        tmp_path,
        scenario,
        settings=UpdateSettings(trial=Terms(), window="01:00-05:00", fetch_outside_window=False),
        now=lambda: datetime(2026, 3, 2, 12),  # noqa: DTZ001
    )


def test_a_metered_link_moves_what_it_may_and_no_more(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        with pytest.raises(PostponedError) as postponed:
            await device.updater.update(Order(version=1))
        assert postponed.value.reason == "metered"
        partial = device.folder / "slots" / ".partial-1"
        assert sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) <= 600
        rich = make_updater(device.folder, device.registry, device.models)
        outcome = await rich.update(Order(version=1))
        assert outcome.active
        assert outcome.bytes_fetched == outcome.bytes_full  # nothing moved twice

    with_device(tmp_path, scenario, settings=UpdateSettings(trial=Terms(), metered=True, metered_max_bytes=600))


def test_devices_take_turns(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        with pytest.raises(PostponedError) as postponed:
            await device.updater.update(Order(version=1))
        assert postponed.value.reason == "not-its-turn"
        assert 0 < postponed.value.retry_s <= 600
        await device.time.pause(postponed.value.retry_s)
        assert (await device.updater.update(Order(version=1))).active

    with_device(tmp_path, scenario, settings=UpdateSettings(trial=Terms(), jitter_s=600), requests=0)


def test_a_disk_without_room_postpones_and_says_how_much_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.store.SlotStore.free_bytes", lambda self: 4321)

    async def scenario(device: Device) -> None:
        with pytest.raises(PostponedError, match="got 4321") as postponed:
            await device.updater.update(Order(version=1))
        assert postponed.value.reason == "no-space"
        assert device.reports[-1].reason == "no-space"
        assert "blob" not in device.registry.calls

    with_device(tmp_path, scenario)
