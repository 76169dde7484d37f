"""The story on a tiny data set: every promise of the demo, on the real programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from examples.quickstart.cli import finish
from examples.quickstart.site import VARIANT
from examples.quickstart.steps import Run
from isthmus.bundle import open_bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Report = dict[str, Any]


def test_routing_is_much_better_than_chance(report: Report) -> None:
    gained = report["isthmus"]["accuracy"] - report["edge_only"]["accuracy"]
    available = report["cloud_only"]["accuracy"] - report["edge_only"]["accuracy"]
    assert available > 0.05
    rate = report["isthmus"]["escalation_rate"]
    assert 0.05 < rate <= 0.35
    assert gained >= 1.4 * rate * available


def test_every_request_of_the_routed_runs_was_answered(report: Report) -> None:
    for routed in (report["isthmus"], report["after_update"]["isthmus"]):
        assert routed["failed"] == 0
        assert routed["bytes_up"] > 0


def test_the_update_came_as_a_delta_and_lost_no_request(report: Report) -> None:
    update = report["update"]
    assert (update["from"], update["to"]) == (1, 2)
    assert update["requests"] > 50
    assert update["failed"] == 0
    assert 0 < update["delta_bytes"] < 0.5 * update["full_bytes"]
    assert update["rebuilt_equal"]


def test_every_runtime_answers_like_the_others(report: Report) -> None:
    runtimes = report["runtimes"]
    assert {"openvino-int8", "onnxruntime-fp32", "tvm-fp32"} <= set(runtimes)
    assert all(alone["failed"] == 0 for alone in runtimes.values())
    assert runtimes["tvm-fp32"]["accuracy"] == runtimes["onnxruntime-fp32"]["accuracy"]
    assert abs(runtimes["openvino-int8"]["accuracy"] - runtimes["tvm-fp32"]["accuracy"]) < 0.05


def test_the_bundle_holds_an_engine_that_only_a_gpu_can_verify(bundles: tuple[Path, Path]) -> None:
    variants = {variant.id: variant for variant in open_bundle(bundles[0]).variants}
    assert variants["tensorrt-rtx-fp16"].verified == "device"
    assert {variants[name].verified for name in ("openvino-int8", "tvm-fp32")} == {"compiler"}


def test_the_outage_cost_nobody_an_answer(report: Report) -> None:
    outage = report["outage"]
    assert outage["answered"] == outage["within_deadline"] == outage["requests"]
    assert outage["fallback"] > 0
    assert outage["cloud_after_recovery"] > 0
    assert outage["same_agent"]


def test_triton_did_the_work_over_tls13(report: Report) -> None:
    assert report["tls"]["version"] == "TLSv1.3"
    assert report["triton"]["version"].startswith("2.")
    # the traffic's and the test part's escalations, and the test part by the heavy model alone
    assert report["triton"]["inferences"] >= report["test_messages"] * (1 + report["isthmus"]["escalation_rate"])


def test_the_second_bundle_keeps_the_grid_of_the_first(bundles: tuple[Path, Path], story: Run) -> None:
    first, second = (open_bundle(bundle) for bundle in bundles)
    assert first.heavy.digest == second.heavy.digest
    graph = f"variants/{VARIANT}/model.xml"
    assert first.files[graph] == second.files[graph]
    assert first.files[f"variants/{VARIANT}/model.bin"] != second.files[f"variants/{VARIANT}/model.bin"]
    rows = story.facts["compiled"]["2"]["variants"]
    assert next(row for row in rows if row["variant"] == VARIANT)["grid"] == "kept"


def test_the_result_is_a_report_and_two_pictures(story: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(story.build)
    console = Console(record=True, width=120, quiet=True)
    finish(Run(story.story, story.build, console))
    for name in ("policy.png", "timeline.png"):
        assert (story.folder / name).read_bytes().startswith(b"\x89PNG")
    assert (story.folder / "report.json").stat().st_size > 500


def test_no_secret_reached_a_log(story: Run) -> None:
    site = story.folder / "site"
    secrets = [path.read_text().splitlines()[1] for path in site.rglob("*.key")]
    secrets.append(story.site.token.read_text().strip())
    assert len(secrets) > 6
    logs = "".join(path.read_text() for path in story.folder.glob("*.log"))
    assert "version released" in logs
    assert not [secret for secret in secrets if secret in logs]


def test_no_server_outlives_the_story(free_of_servers: Run) -> None:
    assert free_of_servers.facts["agent_pid_unchanged"]
