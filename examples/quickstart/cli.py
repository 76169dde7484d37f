"""The story's command: run all steps, then show the figures."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from examples.quickstart.datasets import DatasetError
from examples.quickstart.pictures import draw_policy, draw_timeline
from examples.quickstart.programs import ProgramError
from examples.quickstart.report import build_report
from examples.quickstart.steps import Run, run_story
from examples.quickstart.story import UnknownStoryError, load_story

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    story: Annotated[str, typer.Option(help="news (topic triage) or meter (smart meters; a minute).")] = "news",
    build: Annotated[Path, typer.Option(help="Where data, models and results go.")] = Path("build"),
    report_only: Annotated[bool, typer.Option(help="Recompute the report of the last run.")] = False,
) -> None:
    """Compile, publish, serve, escalate, update and survive an outage; then show the figures."""
    console = Console()
    try:
        run = Run(load_story(story), build.absolute(), console)
        run.facts["story"] = {"name": story, "title": run.story.title, "licence": run.story.licence}
        if not report_only:
            run_story(run)
        finish(run)
    except (ProgramError, DatasetError, UnknownStoryError, FileNotFoundError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)


def finish(run: Run) -> None:
    """Step 10: write report and pictures, print the table."""
    run.console.rule("[bold]10. result", align="left")
    report = build_report(run.folder)
    (run.folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_policy(run.folder, report, run.folder / "policy.png")
    draw_timeline(run.folder, run.folder / "timeline.png")
    run.console.print(result_table(report))
    for name in ("report.json", "policy.png", "timeline.png"):
        run.console.print(f"  {os.path.relpath(run.folder / name)}", highlight=False)


def result_table(report: dict[str, Any]) -> Table:
    """Return the figures that a person wants to see first."""
    table = Table(title=f"{report['story']['title']}: {report['test_messages']:,} test messages", title_justify="left")
    for heading in ("", "version 1", "version 2"):
        table.add_column(heading, justify="left" if not heading else "right")
    first, second = report["isthmus"], report["after_update"]["isthmus"]
    table.add_row(
        "light model alone",
        _percent(report["edge_only"]["accuracy"]),
        _percent(report["after_update"]["edge_only"]["accuracy"]),
    )
    table.add_row("heavy model alone", _percent(report["cloud_only"]["accuracy"]), "")
    table.add_row("isthmus", _percent(first["accuracy"]), _percent(second["accuracy"]), style="bold")
    table.add_row("escalated", _percent(first["escalation_rate"]), _percent(second["escalation_rate"]))
    for name, key in (
        ("p50", "p50_ms"),
        ("p99", "p99_ms"),
        ("p50 on the edge", "edge_p50_ms"),
        ("p50 by the cloud", "cloud_p50_ms"),
    ):
        table.add_row(name, _milliseconds(first[key]), _milliseconds(second[key]))
    table.add_section()
    for variant, alone in report["runtimes"].items():
        first_messages = f"{_percent(alone['accuracy'])} of {alone['messages']}"
        table.add_row(f"light alone, {variant}", first_messages, f"p50 {_milliseconds(alone['p50_ms'])}")
    table.add_section()
    update, outage = report["update"], report["outage"]
    share = update["delta_bytes"] / update["full_bytes"]
    table.add_row(
        "update: bytes moved",
        f"{update['delta_bytes']:,}",
        f"{100 * share:.1f} % of {update['full_bytes']:,}",
    )
    table.add_row("update: failed requests", f"{update['failed']}", f"of {update['requests']:,}")
    table.add_row("outage: answered in time", f"{outage['within_deadline']:,}", f"of {outage['requests']:,}")
    table.add_row("outage: fallback answers", f"{outage['fallback']:,}", "")
    table.add_row("TLS", report["tls"]["version"], report["tls"]["group"])
    table.add_row("Triton", report["triton"]["version"], f"{report['triton']['inferences']:,} inferences")
    table.add_row("whole story", f"{report['wall_s']:.0f} s", "")
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
