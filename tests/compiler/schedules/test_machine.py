"""Machines as read from targets."""

from __future__ import annotations

import pytest

from compiler.schedules.machine import Machine
from tests.compiler.schedules.onnx_graphs import target


@pytest.mark.parametrize(
    ("cpu", "lanes", "registers"),
    [("x86-64-v4", 16, 32), ("cascadelake", 16, 32), ("x86-64-v3", 8, 16), ("x86-64", 4, 16)],
)
def test_vector_widths_follow_the_cpu(cpu: str, lanes: int, registers: int) -> None:
    machine = Machine.of(target(cpu))

    assert (machine.lanes, machine.registers, machine.cores) == (lanes, registers, 1)


def test_a_64_bit_arm_has_four_lanes() -> None:
    machine = Machine.of(target("cortex-a72", mtriple="aarch64-linux-gnu"))

    assert (machine.lanes, machine.registers, machine.broadcasts_from_memory) == (4, 32, False)
