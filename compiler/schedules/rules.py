"""Which rule schedules which function, and the report of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from compiler.schedules.convolution import schedule_convolution
from compiler.schedules.elementwise import schedule_elementwise
from compiler.schedules.machine import Machine
from compiler.schedules.matmul import schedule_matmul
from compiler.schedules.rows import schedule_rows
from compiler.schedules.windows import schedule_depthwise, schedule_reduction

Rule = Callable[[Any, Machine], bool]

RULES: Final[tuple[tuple[str, Rule], ...]] = (
    ("convolution", schedule_convolution),
    ("depthwise", schedule_depthwise),
    ("matmul", schedule_matmul),
    ("rows", schedule_rows),
    ("reduction", schedule_reduction),
    ("elementwise", schedule_elementwise),
)
VIEW: Final = "view"  # a reshape: no code runs
UNSCHEDULED: Final = "none"


@dataclass(slots=True)
class LoweringReport:
    """Which rule scheduled each function; `reasons` says why one has none."""

    rules: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def unscheduled(self) -> tuple[str, ...]:
        """Functions that run as plain loops."""
        return tuple(name for name, rule in self.rules.items() if rule == UNSCHEDULED)


def apply_rules(module: Any, machine: Machine, report: LoweringReport) -> Any:
    """Return the module with every PrimFunc scheduled by the first rule that takes it."""
    from tvm import IRModule, tirx

    scheduled = {
        variable: _schedule(variable.name_hint, function, machine, report)
        if isinstance(function, tirx.PrimFunc)
        else function
        for variable, function in module.functions_items()
    }
    return IRModule(scheduled, attrs=module.attrs)


def _schedule(name: str, function: Any, machine: Machine, report: LoweringReport) -> Any:
    from tvm import relax, s_tir
    from tvm.s_tir.schedule import ScheduleError

    if relax.analysis.has_reshape_pattern(function):
        report.rules[name] = VIEW
        return function
    for rule_name, rule in RULES:
        schedule = s_tir.Schedule(function, enable_check=False, debug_mask="none")
        try:
            taken = rule(schedule, machine)
        except (ScheduleError, ValueError, RuntimeError) as error:
            report.reasons[name] = f"{rule_name}: {str(error).strip()[:300]}"
            continue
        if taken:
            report.rules[name] = rule_name
            return schedule.mod["main"].with_attr("tirx.is_scheduled", True)
    report.rules[name] = UNSCHEDULED
    return function
