from __future__ import annotations

from pathlib import Path

import pytest

from compiler.measure import Timing
from compiler.pictures import draw
from compiler.report import VariantReport, pareto, recommend


def variant(
    name: str, ms: float, size: int, accuracy: float, *, target: str = "openvino", rss: float = 100.0
) -> VariantReport:
    timing = Timing(
        load_ms=1, p50_ms=ms, p99_ms=ms, least_ms=ms, threads=2, p50_threads_ms=10 - ms, batch=1, samples_per_s=1,
        peak_rss_mib=rss, model_rss_mib=1,
    )  # fmt: skip
    return VariantReport(
        id=name, target=target, precision="fp32", platform="any", setting="default", bytes=size, verified="compiler",
        accuracy=accuracy, interval=(accuracy - 0.1, accuracy + 0.1), accuracy_drop=0, drop_interval=(0, 0),
        parity=None, edges=(), tolerance=1, grid="", grid_note="", note="", clipped=0, attempts=(), timing=timing,
    )  # fmt: skip


FAST = variant("fast", 1.0, 50, 0.7)
EXACT = variant("exact", 4.0, 80, 0.9, rss=50)
WORSE = variant("worse", 4.5, 90, 0.9)
SMALL = variant("small", 3.0, 10, 0.7)
ENGINE = variant("engine", 1, 1, 0.9, target="tensorrt-rtx").model_copy(update={"timing": None})
EVERY = (FAST, EXACT, WORSE, SMALL, ENGINE)


def test_what_another_beats_in_everything_is_not_in_the_front() -> None:
    assert pareto(EVERY) == ("fast", "exact", "small")
    assert pareto((FAST, FAST.model_copy(update={"id": "twin"}))) == ("fast", "twin")
    assert pareto((ENGINE,)) == ()


def test_each_class_of_devices_gets_what_suits_it() -> None:
    assert recommend(EVERY, "x86_64") == {
        "x86_64": "fast",
        "x86_64, all cores": "worse",
        "little memory": "exact",
        "little storage": "small",
        "other processors": "fast",
        "nvidia gpu": "engine",
    }
    assert recommend((), "x86_64") == {}


def test_a_device_without_bfloat16_gets_the_fastest_of_the_others() -> None:
    quickest = variant("quickest", 0.5, 50, 0.7).model_copy(update={"precision": "int8-bf16"})
    found = recommend((*EVERY, quickest), "x86_64")
    assert (found["x86_64"], found["x86_64 without bfloat16"], found["other processors"]) == (
        "quickest",
        "fast",
        "fast",
    )


@pytest.mark.slow
def test_the_picture_is_one(tmp_path: Path) -> None:
    draw(EVERY, pareto(EVERY), "five variants", tmp_path / "p.png")
    draw((), (), "none", tmp_path / "empty.png")

    for name in ("p.png", "empty.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
