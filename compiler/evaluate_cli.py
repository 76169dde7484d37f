"""`isthmus evaluate`: replay labelled data through any policies, and print what each would have done."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from compiler.cli import ended_by_signals, stages
from isthmus.policies import POLICIES, Link
from isthmus.terminal import JsonOption, note, show_record, show_table

if TYPE_CHECKING:
    from compiler.bundle_answers import Evaluated
    from compiler.replay import Figure, PolicyFigures, ScoreFigures

app = typer.Typer(no_args_is_help=True, add_completion=False)

SHARES: Final = (0.1, 0.2, 0.3, 0.5)
_SCORES: Final = ("max_probability", "margin", "entropy", "energy")  # what needs nothing but logits


@app.command("evaluate")
def evaluate_command(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    data: Annotated[Path, typer.Argument(help="safetensors file: the inputs, and labels (int64).", show_default=False)],
    variant: Annotated[str, typer.Option(help="The variant.", show_default="the first that runs here")] = "",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A policy, NAME or NAME:KEY=VALUE,...; may be given again. There are {', '.join(POLICIES)}.",
            show_default="all",
        ),
    ] = None,
    rtt_ms: Annotated[float, typer.Option(min=0, help="Time of a round trip to the heavy model, ms.")] = 50.0,
    mbit: Annotated[float, typer.Option(min=0.001, help="Speed of the link, Mbit/s.")] = 10.0,
    draws: Annotated[int, typer.Option(min=10, max=10_000, help="Draws of the bootstrap.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each model.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Replay a labelled set through policies: accuracy, escalations, risk, bytes, latency, with 95 % intervals."""
    from compiler.bundle_answers import answer
    from compiler.replay import draws as draw_rows
    from compiler.replay import judge_policy, replay

    link = Link(rtt_s=rtt_ms / 1e3, bytes_per_s=mbit * 125_000)
    with ended_by_signals(), stages() as advance:
        evaluated = answer(bundle, data, variant_id=variant, threads=threads, advance=advance)
        rows, point = evaluated.rows, evaluated.calibration.variants[evaluated.variant.id]
        samples = draw_rows(len(rows), draws, seed)
        known = [name for name in POLICIES if name != "cost" or point.gains]  # older records have none
        # The filters of others read probabilities of classes.
        wanted = policy or [name for name in known if rows.probabilities is not None or not name.startswith("sedna")]
        policies: dict[str, PolicyFigures] = {}
        for place, text in enumerate(wanted):
            advance("policies", place, len(wanted))
            decisions = replay(text, point, rows, link, seed=seed)
            policies[text] = judge_policy(decisions, rows, samples, link=link, light_ms=evaluated.variant.latency_ms)
        advance("policies", len(wanted), len(wanted))
        scores = _judged_scores(evaluated, samples, advance)
    summary = _summary(evaluated)
    if as_json:
        found = {
            "policies": {name: asdict(figures) for name, figures in policies.items()},
            "scores": {name: asdict(figures) for name, figures in scores.items()},
        }
        show_record("", summary | found, as_json=True)
        return
    show_record(f"{evaluated.manifest.name}@{evaluated.manifest.version}", summary)
    show_table("Policies", [_policy_row(name, figures) for name, figures in policies.items()])
    show_table("Scores, at every threshold", [_score_row(name, figures) for name, figures in scores.items()])
    note(f"[low, high]: 95 % intervals, bootstrap over rows, {draws} draws; bytes: of requests, by all requests")


def _judged_scores(evaluated: Evaluated, samples: Any, advance: Any) -> dict[str, ScoreFigures]:
    import numpy as np

    from compiler.replay import judge_score, oracle_scores
    from isthmus.scores import ScoreOptions, open_score

    rows, answers = evaluated.rows, evaluated.answers
    temperature = evaluated.calibration.variants[evaluated.variant.id].temperature
    options = ScoreOptions(answers.output, temperature)
    found = {f"{evaluated.calibration.score}, as calibrated": rows.scores}
    others = () if answers.decoding else [name for name in _SCORES if name != evaluated.calibration.score]
    found |= {name: open_score(name, options)(answers.light) for name in others}
    found["random"] = np.random.default_rng(0).random(len(rows))
    found["oracle"] = oracle_scores(rows.light_right, rows.cloud_right)
    judged: dict[str, ScoreFigures] = {}
    for place, (name, scores) in enumerate(found.items()):
        advance("scores", place, len(found))
        judged[name] = judge_score(scores, rows.light_right, rows.cloud_right, samples, SHARES)
    advance("scores", len(found), len(found))
    return judged


def _summary(evaluated: Evaluated) -> dict[str, Any]:
    rows, point = evaluated.rows, evaluated.calibration.variants[evaluated.variant.id]
    asked = evaluated.calibration.operating_point
    return {
        "variant": evaluated.variant.id,
        "samples": len(rows),
        "operating_point": f"{asked.kind} {asked.value:g}, confidence {1 - asked.delta:g}",
        "score": evaluated.calibration.score,
        "threshold": point.threshold,
        "fusion_light_weight": None if point.fusion is None else point.fusion.light_weight,
        "light_accuracy": float(rows.light_right.mean()),
        "cloud_accuracy": float(rows.cloud_right.mean()),
    }


def _policy_row(name: str, figures: PolicyFigures) -> dict[str, Any]:
    return {
        "policy": name,
        "escalated_%": _percent(figures.escalated),
        "accuracy_%": _percent(figures.accuracy),
        "edge_risk_%": _percent(figures.edge_risk),
        "PGR": _plain(figures.pgr),
        "bytes": round(figures.bytes_per_request),
        "ms": None if figures.latency_ms is None else round(figures.latency_ms, 2),
    }


def _score_row(name: str, figures: ScoreFigures) -> dict[str, Any]:
    return {
        "score": name,
        "AURC": _plain(figures.aurc),
        "APGR": _plain(figures.apgr),
        **{f"CPT_{target:.0%}": _short(figure) for target, figure in figures.cpt.items()},
        **{f"accuracy_at_{share:.0%}": _percent(figure) for share, figure in figures.accuracy.items()},
    }


def _percent(figure: Figure) -> str:
    if figure.value is None or figure.low is None or figure.high is None:
        return "-"
    return f"{100 * figure.value:.1f} [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"


def _plain(figure: Figure) -> str:
    if figure.value is None or figure.low is None or figure.high is None:
        return "-"
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def _short(figure: Figure) -> str:
    return "-" if figure.value is None else f"{100 * figure.value:.0f} %"
