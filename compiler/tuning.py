"""A search for faster loops than the rules give, for who has the time: MetaSchedule on each function, best of both.

TVM's own tuner starts workers that take half a minute to import what it needs; here candidates are built and measured
in this process, one after the other, on one thread. What was found is kept in a folder, by processor and workload:

    <processor>/database_workload.json        the functions that were searched, as TVM writes them
    <processor>/database_tuning_record.json   the fastest schedules of each
    <processor>/ledger.json                   `_Entry` of each: what was spent, and whether the rules were beaten

A later build spends what its budget has left for the workloads of its model, and nothing when that was spent before:
then it measures nothing either, and gives the same bytes as every other build from that folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from compiler.targets import Tuning
from isthmus.errors import InputError

LEDGER: Final = "ledger.json"
_INTRINSICS: Final = "tvm.s_tir.tensor_intrin"
_BATCH: Final = 8  # candidates of one function in turn
_POPULATION: Final = 64  # schedules that the search keeps; more take longer to mutate than to measure
_WORTH: Final = 0.97  # a tuned function replaces the rules' when it takes at most this share of their time
_LEAST_SHARE: Final = 0.005  # of the model's time: functions below are not searched
_SECONDS_OF_ONE: Final = 0.004  # a candidate is run for this long, at least three times
_TOLERANCE: Final = 1e-3  # relative to the largest value: loops in another order round differently

Advance = Callable[[str, int, int], None]


@dataclass(slots=True)
class _Entry:
    """What is known of one workload."""

    trials: int = 0
    seconds: float = 0.0
    tuned_is_faster: bool = False


@dataclass(frozen=True, slots=True)
class Tuned:
    """A scheduled module, and how it came about."""

    module: Any  # tvm.IRModule, ready for relax.build
    trials: int  # that this call ran
    functions: int  # that run a schedule which was found by searching

    @property
    def note(self) -> str:
        """Say it to a person."""
        return f"tuned: {self.trials} trials, {self.functions} functions faster than by the rules"


def lower_tuned(module: Any, target: Any, tuning: Tuning, advance: Advance) -> Tuned:
    """Return the module as loops: by the rules, or by what a search found where that is faster.

    Args:
        module: As for `compiler.schedules.lower`.
        target: This machine, as TVM describes it: candidates are run.
        tuning: How many trials and seconds may be spent on this model, over all builds from one database; 0 trials
            with seconds means as many as there is time for, 0 of both means none.
        advance: Told ("tune", done, total), in trials or, where there is no limit to those, seconds.

    Raises:
        InputError: The database cannot be read.
    """
    from compiler.schedules import LoweringReport, fuse
    from compiler.schedules.machine import Machine
    from compiler.schedules.rules import apply_rules

    with tempfile.TemporaryDirectory(prefix="isthmus-tuning-") as scratch, _quiet():
        folder = (tuning.database or Path(scratch)) / _fingerprint(str(target))
        folder.mkdir(parents=True, exist_ok=True)
        plain = fuse(module, target)
        with target:
            ruled = apply_rules(plain, Machine.of(target), LoweringReport())
        search = _Search(folder, target, tuning, advance)
        tasks = _tasks(plain, ruled)
        search.run(tasks)
        replaced = 0
        for task in tasks:
            better = search.better(task)
            if better is not None:
                ruled[task.name] = better.with_attr("global_symbol", task.name).with_attr("tirx.is_scheduled", True)
                replaced += 1
        return Tuned(ruled, search.trials, replaced)


@dataclass(slots=True)
class _Task:
    """One function of the model; functions that differ in their name alone are tasks of one workload."""

    name: str
    calls: int
    plain: Any  # tvm.IRModule with the function as `main`, not scheduled
    ruled: Any  # the same by the rules
    key: str
    seconds: float = 0.0  # of one call, by the rules; 0 before it is measured
    best: float = 0.0  # of one call, the fastest so far
    rounds: int = 0
    context: Any = None
    exhausted: bool = False
    arguments: list[Any] = field(default_factory=list)


def _tasks(plain: Any, ruled: Any) -> list[_Task]:
    from tvm import IRModule, ir, relax, tirx

    calls: Counter[str] = Counter()

    def count(expression: Any) -> None:
        if isinstance(expression, ir.Call) and expression.args and isinstance(expression.args[0], ir.GlobalVar):
            calls[expression.args[0].name_hint] += 1

    relax.analysis.post_order_visit(ruled["main"].body, count)

    def alone(function: Any) -> Any:
        return IRModule({"main": function.with_attr("global_symbol", "main").with_attr("tirx.noalias", True)})

    tasks = []
    for variable, function in sorted(plain.functions_items(), key=lambda item: item[0].name_hint):
        if isinstance(function, tirx.PrimFunc) and not relax.analysis.has_reshape_pattern(function):
            before = alone(function)
            name = variable.name_hint
            tasks.append(_Task(name, max(1, calls[name]), before, alone(ruled[name]), _fingerprint(before.script())))
    return tasks


class _Search:
    """Spends the budget on the functions that take the longest."""

    def __init__(self, folder: Path, target: Any, tuning: Tuning, advance: Advance) -> None:
        from tvm.s_tir import meta_schedule

        self._folder = folder
        self._target = target
        self._tuning = tuning
        self._advance = advance
        self._ledger = _read_ledger(folder / LEDGER)
        try:
            self._database = meta_schedule.database.JSONDatabase(work_dir=str(folder))
        except Exception as error:  # TVM's errors share no base class
            raise InputError(f"tuning database {folder}: cannot be read: {str(error)[-200:]}") from error
        self.trials = 0

    def run(self, tasks: list[_Task]) -> None:
        """Search until the budget is spent, and write down what was found."""
        known = [self._ledger.get(key, _Entry()) for key in {task.key for task in tasks}]
        left = self._tuning.trials - sum(entry.trials for entry in known)
        seconds = self._tuning.seconds - sum(entry.seconds for entry in known)
        if (self._tuning.trials and left <= 0) or (self._tuning.seconds and seconds <= 0):
            return
        if not self._tuning.trials and not self._tuning.seconds:
            return
        ahead = self._worth_searching(tasks)
        start = time.monotonic()
        until = start + seconds if self._tuning.seconds else float("inf")
        searched: set[str] = set()
        while ahead and time.monotonic() < until and (not self._tuning.trials or self.trials < left):
            task = max(ahead, key=lambda task: task.calls * task.best / (1 + task.rounds))
            began, before = time.monotonic(), self.trials
            room = left - self.trials if self._tuning.trials else _BATCH
            self._round(task, min(_BATCH, room), until)
            entry = self._ledger.setdefault(task.key, _Entry())
            entry.trials += self.trials - before
            entry.seconds += time.monotonic() - began
            searched.add(task.key)
            ahead = [task for task in ahead if not task.exhausted]
            if self._tuning.trials:
                self._advance("tune", self.trials, left)
            else:
                self._advance("tune", min(int(time.monotonic() - start), int(seconds)), int(seconds))
        for task in tasks:
            if task.key in searched:
                self._ledger[task.key].tuned_is_faster = self._beats_the_rules(task)
        _write_ledger(self._folder / LEDGER, self._ledger)

    def better(self, task: _Task) -> Any:
        """Return the function by the schedule that was found, or None where the rules are as fast."""
        if not self._ledger.get(task.key, _Entry()).tuned_is_faster:
            return None
        found = self._found(task)
        return None if found is None else found["main"]

    def _worth_searching(self, tasks: list[_Task]) -> list[_Task]:
        unique = {task.key: task for task in reversed(tasks)}
        for task in unique.values():
            task.calls = sum(other.calls for other in tasks if other.key == task.key)
            task.arguments = _arguments(task.plain["main"])
            task.seconds = task.best = _seconds(self._build(task.ruled), task.arguments)
            found = self._found(task)
            if found is not None:
                task.best = min(task.best, _seconds(self._build(found), task.arguments))
        whole = sum(task.calls * task.seconds for task in unique.values())
        return [task for task in unique.values() if task.calls * task.seconds >= _LEAST_SHARE * whole]

    def _round(self, task: _Task, count: int, until: float) -> None:
        """Build and run the next candidates of one function."""
        from tvm.s_tir import meta_schedule

        task.rounds += 1
        if task.context is None:
            task.context = self._start(task, count)
        candidates = task.context.generate_measure_candidates() if task.context else None
        if not candidates:
            task.exhausted = True
            return
        results = []
        for candidate in candidates[:count]:
            if time.monotonic() >= until:
                break
            self.trials += 1
            try:
                taken = _seconds(self._build(candidate.sch.mod), task.arguments, stop=2 * task.best)
            except Exception as error:  # a schedule that cannot be built is an answer, whatever was raised
                results.append(meta_schedule.runner.RunnerResult(None, str(error)[:200]))
                continue
            results.append(meta_schedule.runner.RunnerResult([taken], None))
            if taken < task.best:
                task.best = taken
                self._keep(task, candidate, taken)
        if len(results) < len(candidates):
            rest = len(candidates) - len(results)
            results += [meta_schedule.runner.RunnerResult(None, "no time was left")] * rest
        task.context.notify_runner_results(candidates, results)

    def _start(self, task: _Task, count: int) -> Any:
        from tvm.s_tir import meta_schedule as ms

        rules = [
            ms.schedule_rule.InlineConstantScalars(),
            ms.schedule_rule.AutoInline(
                into_producer=False, into_consumer=True, inline_const_tensor=True, disallow_if_then_else=True,
                require_injective=True, require_ordered=True, disallow_op=["tirx.exp"],
            ),
            ms.schedule_rule.AddRFactor(max_jobs_per_core=-1, max_innermost_factor=64),
            ms.schedule_rule.MultiLevelTiling(
                structure="SSRSRS", max_innermost_factor=64,
                reuse_write=ms.schedule_rule.ReuseType(req="may", levels=[1, 2], scope="global"),
            ),
            ms.schedule_rule.ParallelizeVectorizeUnroll(
                max_jobs_per_core=-1, max_vectorize_extent=64, unroll_max_steps=[0, 16, 64, 512], unroll_explicit=True
            ),
            ms.schedule_rule.RandomComputeLocation(),
        ]  # fmt: skip
        space = ms.space_generator.PostOrderApply(
            sch_rules=rules,
            postprocs=[
                ms.postproc.DisallowDynamicLoop(),
                ms.postproc.RewriteParallelVectorizeUnroll(),
                ms.postproc.RewriteReductionBlock(),
            ],
            mutator_probs={
                ms.mutator.MutateTileSize(): 0.9,
                ms.mutator.MutateComputeLocation(): 0.05,
                ms.mutator.MutateUnroll(): 0.05,
            },
        )
        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=_POPULATION, init_min_unmeasured=16, genetic_num_iters=2
        )
        # A context imports the intrinsics of all machines, which takes half a minute, and these rules use none of them.
        sys.modules.setdefault(_INTRINSICS, ModuleType(_INTRINSICS))
        try:
            context = ms.TuneContext(
                mod=task.plain, target=self._target, space_generator=space, search_strategy=strategy,
                task_name=task.name, rand_state=1 + int(task.key[:6], 16), num_threads=1,
            ).clone()  # fmt: skip
            context.pre_tuning(1 << 20, count, database=self._database)
        except Exception:  # the space of a function that MetaSchedule does not understand is empty
            return None
        return context

    def _keep(self, task: _Task, candidate: Any, taken: float) -> None:
        from tvm.s_tir.meta_schedule.database import TuningRecord

        workload = self._database.commit_workload(task.plain)
        record = TuningRecord(candidate.sch.trace, workload, [taken], self._target, candidate.args_info)
        self._database.commit_tuning_record(record)

    def _found(self, task: _Task) -> Any:
        """Return the function by the fastest schedule in the database, or None."""
        if not self._database.has_workload(task.plain):
            return None
        return self._database.query_ir_module(task.plain, self._target, task.name)

    def _beats_the_rules(self, task: _Task) -> bool:
        """Return whether what was found is right and faster, both run in turn."""
        found = self._found(task)
        if found is None:
            return False
        arguments = task.arguments or _arguments(task.plain["main"])
        ruled, tuned = self._build(task.ruled), self._build(found)
        outputs = []
        for library in (ruled, tuned):
            library(*arguments)
            outputs.append([argument.numpy().astype(np.float64) for argument in arguments])
        for expected, got in zip(*outputs, strict=True):
            if not np.allclose(got, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(np.abs(expected).max())):
                return False
        pairs = [(_seconds(ruled, arguments), _seconds(tuned, arguments)) for _ in range(5)]
        return min(pair[1] for pair in pairs) <= _WORTH * min(pair[0] for pair in pairs)

    def _build(self, module: Any) -> Any:
        import tvm

        return tvm.compile(module, target=self._target)["main"]


def _arguments(function: Any) -> list[Any]:
    """Return tensors of small random numbers for the function's parameters, outputs too."""
    import tvm

    source = np.random.default_rng(0)
    arguments = []
    for parameter in function.params:
        shape, dtype = [int(axis) for axis in parameter.ty.shape], str(parameter.ty.dtype)
        values = source.uniform(0.1, 1, shape) if dtype.startswith("float") else np.zeros(shape)
        arguments.append(tvm.runtime.tensor(values.astype(dtype)))
    return arguments


def _seconds(library: Any, arguments: list[Any], stop: float = float("inf")) -> float:
    """Return the least time of a call; a first call that takes longer than `stop` is not repeated."""
    began = time.perf_counter()
    library(*arguments)
    least = time.perf_counter() - began
    if least > 4 * stop:  # the first call also pays for cold caches
        return least
    calls, end = 0, time.perf_counter() + _SECONDS_OF_ONE
    while calls < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        library(*arguments)
        least = min(least, time.perf_counter() - began)
        calls += 1
    return least


def _fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read_ledger(path: Path) -> dict[str, _Entry]:
    try:
        content: Mapping[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return {key: _Entry(**entry) for key, entry in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"tuning database {path}: cannot be read: {str(error)[:200]}", hint="remove the folder to start again"
        ) from error


def _write_ledger(path: Path, ledger: Mapping[str, _Entry]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps({key: asdict(entry) for key, entry in sorted(ledger.items())}, indent=1) + "\n")
    part.replace(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MetaSchedule from logging every step."""
    loggers = [logging.getLogger(name) for name in ("tvm.s_tir.meta_schedule", "tvm.s_tir.meta_schedule.tune_context")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
