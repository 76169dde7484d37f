from __future__ import annotations

from pathlib import Path

import pytest

from isthmus import machine
from isthmus.machine import computes_bfloat16, processor_features

X86_CPUINFO = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu\n"
ARM_CPUINFO = "processor\t: 0\nBogoMIPS\t: 100.00\nFeatures\t: fp asimd crc32\n"


@pytest.mark.parametrize(
    ("text", "features"),
    [(X86_CPUINFO, {"fpu", "avx2", "fma"}), (ARM_CPUINFO, {"fp", "asimd", "crc32"}), ("processor\t: 0\n", set())],
)
def test_features_are_those_of_the_first_processor(tmp_path: Path, text: str, features: set[str]) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)

    assert processor_features(path) == features


def test_a_machine_that_does_not_tell_has_no_features(tmp_path: Path) -> None:
    assert processor_features(tmp_path / "cpuinfo") == frozenset()


@pytest.mark.parametrize(
    ("features", "can"), [({"avx2", "avx512_bf16"}, True), ({"amx_bf16"}, True), ({"avx512f"}, False), (set(), False)]
)
def test_bfloat16_takes_instructions_for_it(monkeypatch: pytest.MonkeyPatch, features: set[str], can: bool) -> None:
    monkeypatch.setattr(machine, "processor_features", lambda: frozenset(features))
    assert computes_bfloat16() == can
