"""Which requests should leave the device: scores and policies on three real data sets, and whether promises are kept.

Each pair (benchmarks.pairs; trained on first use, some minutes each) is compiled by `isthmus compile` into bundles with
different scores, and these are replayed over test rows that no stage has seen. What is measured:

* scores: AURC of the light model, APGR, CPT, accuracy at a fifth of requests escalated; the learned score is trained
  for the gain (`learned`) and for the light model's errors (`learned, error`);
* policies at an escalation rate of 0.2: threshold, budget, cost, the filters of KubeEdge Sedna, lots, the oracle;
* promises: over random divisions of the pool into calibration and test, how often the risk among the edge's own answers
  exceeds the bound that was asked for; how far the budget policy strays over any 1,000 requests of a drifting stream.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer

from benchmarks.pairs import FEATURES, NAMES, Pair, pair
from benchmarks.result import Goal, publish, write
from compiler.bundle_answers import Evaluated, answer
from compiler.calibrate import Answers, Wish, calibrate, score_rows
from compiler.operating_point import TooFewSamplesError
from compiler.pipeline import compile_bundle
from compiler.record import ScoreWorseError
from compiler.replay import Figure, draws, judge_policy, judge_score, oracle_scores, replay
from isthmus.bundle import OperatingPoint
from isthmus.policies import POLICIES, Case, Link, make_policy
from isthmus.scores import HEAD, ScoreOptions, open_score
from isthmus.tensors import Array
from isthmus.terminal import note, progress, show_table

RATE: Final = 0.2
LINK: Final = Link(rtt_s=0.05, bytes_per_s=10 * 125_000)
CALIBRATED_ON: Final = 1000
# Risk bounds that the data can support, and the score that they are asked of.
BOUNDS: Final = {"text": ("max_probability", 0.10, 0.05), "sensor": ("learned", 0.15, 0.05)}
_RECIPE: Final = """\
[model]
name = "{name}"
version = 1
[light]
source = "{light}"
[heavy]
source = "{heavy}"
threads = 1
[[variants]]
target = "openvino"
[data]
calibration = "{calibration}"
deferral = "{deferral}"
[measure]
enabled = false
[calibration]
{calibration_lines}
{learned}"""
_LEARNED: Final = 'score = "learned"\nfeatures = "features"\n'

app = typer.Typer()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A pair with two learned scores, answered on test rows and on the pool of calibration and test rows."""

    pair: Pair
    gain: Evaluated
    error: Evaluated
    bundle_error: Path
    pool: Evaluated


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="The sensor pair only, fewer draws.")] = False,
    json: Annotated[Path | None, typer.Option(help="Where the figures go.")] = None,
) -> None:
    """Measure scores, policies and promises."""
    build = Path("build").absolute()
    names = ("sensor",) if quick else NAMES
    with progress() as bars:
        pairs = [pair(name, build, bars) for name in names]
    rows: list[dict[str, Any]] = []
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory() as scratch:
        for found in pairs:
            prepared = _prepare(found, Path(scratch) / found.name, build)
            scores = _scores(prepared, 200 if quick else 1000)
            policies = _policies(prepared, 200 if quick else 1000)
            show_table(f"{found.name}: scores", scores)
            show_table(f"{found.name}: policies at {RATE:.0%}", policies)
            rows += [{"data": found.name, "table": "scores", **row} for row in scores]
            rows += [{"data": found.name, "table": "policies", **row} for row in policies]
            if found.name in BOUNDS:
                kept = _promise(prepared, 60 if quick else 500)
                rows.append({"data": found.name, "table": "promises", **kept})
                goals.append(Goal(f"{found.name}: violations of the risk bound / allowed", kept["ratio"], 1.0))
            strayed = _strayed(prepared)
            rows.append({"data": found.name, "table": "budget", "strayed": strayed})
            goals.append(
                Goal(f"{found.name}: budget, worst point over any 1,000 requests", round(strayed * 100, 3), 1.0)
            )
    goals += _learned_goals(rows, names)
    publish("policy", [_flat(row) for row in rows if row["table"] == "promises"], goals, None)
    if json is not None:
        write("policy", rows, goals, json)


def _prepare(found: Pair, folder: Path, build: Path) -> Prepared:
    folder.mkdir()
    bundles = {}
    for name, lines in (("gain", f"max_escalation = {RATE}"), ("error", "max_risk = 0.5\ndelta = 0.2")):
        recipe = folder / f"{name}.toml"
        recipe.write_text(
            _RECIPE.format(
                name=found.name, light=found.light, heavy=found.heavy, calibration=found.part("calibration"),
                deferral=found.part("deferral"), calibration_lines=lines, learned=_LEARNED,
            )
        )  # fmt: skip
        note(f"{found.name}: compiling with the score learned for {name}")
        try:
            compile_bundle(recipe, folder / name, cache=build / "compile-cache")
        except ScoreWorseError as error:
            note(f"{found.name}: {error.message}")
            text = recipe.read_text().replace(_LEARNED, "").replace("[heavy]", 'outputs = ["logits"]\n[heavy]')
            recipe.write_text(text)
            compile_bundle(recipe, folder / name, cache=build / "compile-cache")
        bundles[name] = folder / name
    pool = folder / "pool.safetensors"
    _join(found.part("calibration"), found.part("test"), pool)
    return Prepared(
        found,
        answer(bundles["gain"], found.part("test")),
        answer(bundles["error"], found.part("test")),
        bundles["error"],
        answer(bundles["error"], pool),
    )


def _join(first: Path, second: Path, out: Path) -> None:
    from safetensors.numpy import load_file, save_file

    one, other = load_file(first), load_file(second)
    save_file({name: np.concatenate([one[name], other[name]]) for name in one}, out)


def _scores(prepared: Prepared, number: int) -> list[dict[str, Any]]:
    rows, answers = prepared.gain.rows, prepared.gain.answers
    temperature = prepared.gain.calibration.variants[prepared.gain.variant.id].temperature
    options = ScoreOptions(answers.output, temperature)
    found: dict[str, Array] = {
        name: open_score(name, options)(answers.light) for name in ("max_probability", "margin", "entropy", "energy")
    }
    learned = {"learned": prepared.gain, "learned, error": prepared.error}
    found |= {
        name: evaluated.rows.scores for name, evaluated in learned.items() if evaluated.calibration.score == "learned"
    }
    found |= {"random": np.random.default_rng(0).random(len(rows))}
    found |= {"oracle": oracle_scores(rows.light_right, rows.cloud_right)}
    samples = draws(len(rows), number)
    table = []
    for name, scores in found.items():
        figures = judge_score(scores, rows.light_right, rows.cloud_right, samples, (0.1, RATE, 0.3, 0.5))
        table.append(
            {
                "score": name,
                "AURC": _interval(figures.aurc, 4),
                "APGR": _interval(figures.apgr, 3),
                **{f"CPT_{target:.0%}": _value(figure) for target, figure in figures.cpt.items()},
                **{f"at_{share:.0%}": _interval(figure, 4) for share, figure in figures.accuracy.items()},
            }
        )
    return table


def _policies(prepared: Prepared, number: int) -> list[dict[str, Any]]:
    rows, evaluated = prepared.gain.rows, prepared.gain
    point = evaluated.calibration.variants[evaluated.variant.id]
    samples = draws(len(rows), number)
    table = []
    for text in ("threshold", f"budget:rate={RATE}", "cost:second=1", f"random:rate={RATE}", "oracle", *_filters()):
        figures = judge_policy(replay(text, point, rows, LINK), rows, samples, link=LINK, light_ms=None)
        table.append(
            {
                "policy": text,
                "escalated": _interval(figures.escalated, 4),
                "accuracy": _interval(figures.accuracy, 4),
                "edge_risk": _interval(figures.edge_risk, 4),
                "PGR": _interval(figures.pgr, 2),
                "bytes": round(figures.bytes_per_request),
            }
        )
    return table


def _filters() -> list[str]:
    return [name for name in POLICIES if name.startswith("sedna-")]


def _promise(prepared: Prepared, rounds: int) -> dict[str, Any]:
    """Return how often the bound on the risk was broken on the rows that were not calibrated on."""
    score, risk, delta = BOUNDS[prepared.pair.name]
    pool = prepared.pool
    answers, wrong = pool.answers, ~pool.rows.light_right
    point = OperatingPoint(kind="max_risk", value=risk, delta=delta)
    head = prepared.bundle_error / "variants" / pool.variant.id / HEAD
    learned = {"features": FEATURES, "head": head} if score == "learned" else {}
    wish = Wish(point, score=score, fusion="off", **learned)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    broken = refused = 0
    coverage = []
    for _ in range(rounds):
        order = rng.permutation(len(answers))
        part, rest = order[:CALIBRATED_ON], order[CALIBRATED_ON:]
        try:
            record = calibrate(_taken(answers, part), wish)
        except TooFewSamplesError:
            refused += 1
            continue
        kept = rest[score_rows(answers.light, answers.output, record.temperature, wish)[rest] >= record.threshold]
        broken += bool(len(kept)) and float(wrong[kept].mean()) > risk
        coverage.append(len(kept) / len(rest))
    allowed = delta + 2 * np.sqrt(delta * (1 - delta) / rounds)
    return {
        "score": score,
        "asked": f"risk <= {risk:g}, confidence {1 - delta:g}",
        "resplits": rounds,
        "refused": refused,
        "violations": broken,
        "rate": round(broken / rounds, 4),
        "allowed": round(float(allowed), 4),
        "ratio": round(broken / rounds / float(allowed), 3),
        "coverage": round(float(np.mean(coverage)), 3) if coverage else None,
    }


def _taken(answers: Answers, rows: Array) -> Answers:
    light = {name: array[rows] for name, array in answers.light.items()}
    return Answers(light, answers.heavy[rows], answers.labels[rows], answers.output)


def _strayed(prepared: Prepared) -> float:
    """Return the largest gap between the budget and the rate over any 1,000 requests, as difficulty drifts."""
    scores = prepared.gain.rows.scores
    stream = np.concatenate([np.sort(scores)[::-1], scores, np.sort(scores), scores])
    evaluated = prepared.gain
    policy = make_policy(f"budget:rate={RATE}", evaluated.calibration.variants[evaluated.variant.id])
    totals = np.concatenate([[0], np.cumsum([policy.escalates(Case(float(score))) for score in stream])])
    return float(np.abs((totals[1000:] - totals[:-1000]) / 1000 - RATE).max())


def _learned_goals(rows: list[dict[str, Any]], names: tuple[str, ...]) -> list[Goal]:
    """Return, for the data set where it is best, the ends of the intervals that must not overlap."""

    scores = {(row["data"], row["score"]): row for row in rows if row["table"] == "scores"}
    column = f"at_{RATE:.0%}"
    aurc = accuracy = float("inf")
    for name in names:
        plain = scores[name, "max_probability"]
        if (name, "learned, error") in scores:
            aurc = min(aurc, scores[name, "learned, error"]["AURC"][2] / plain["AURC"][1])
        if (name, "learned") in scores:
            accuracy = min(accuracy, plain[column][2] / scores[name, "learned"][column][1])
    note(f"learned against max_probability, ends of intervals, best data set: AURC {aurc:.3f}, accuracy {accuracy:.3f}")
    name = (
        "learned score apart from max_probability: ends of the intervals of AURC or of accuracy at 20 %, best data set"
    )
    return [Goal(name, round(min(aurc, accuracy), 3), 1.0)]


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "table"}


def _interval(figure: Figure, digits: int) -> tuple[float, float, float] | None:
    if figure.value is None or figure.low is None or figure.high is None:
        return None
    return round(figure.value, digits), round(figure.low, digits), round(figure.high, digits)


def _value(figure: Figure) -> float | None:
    return None if figure.value is None else round(figure.value, 3)


if __name__ == "__main__":
    app()
