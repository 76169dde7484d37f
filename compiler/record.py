"""The calibration record of a bundle: every variant's answers, its learned score where one is asked for, its threshold.

A variant that cannot run here is calibrated with the source's answers: its self-test on the device compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from compiler.calibrate import Answers, Wish, calibrate, choose_temperature, divide
from compiler.capture import CapturedModel
from compiler.data import LabelledSamples, load_labelled
from compiler.deferral import LEAST_ROWS, deferral_target, train_head
from compiler.evaluate import Flags, Floats, Logits, area_under_risk, correct, mean_accuracy, measure
from compiler.heavy import heavy_logits
from compiler.ladder import Accepted
from compiler.recipe import Recipe
from compiler.replay import draws
from compiler.targets import load_target
from compiler.verify import BATCH
from compiler.workshop import Workshop
from isthmus.bundle import Calibration, CalibrationData, VariantCalibration
from isthmus.errors import BundleError, InputError, VerificationError
from isthmus.scores import HEAD, ScoreOptions, open_score
from isthmus.scores.learned import deferral_features
from isthmus.tensors import Array

SEED: Final = 0
_DRAWS: Final = 300  # of the bootstrap
_SURE: Final = 0.9


@dataclass(frozen=True, slots=True)
class Stage:
    """What the stage works with."""

    recipe: Recipe
    light: CapturedModel
    heavy: CapturedModel
    output: str  # the one that the score reads
    data: LabelledSamples
    heavy_answers: Logits
    shop: Workshop


def calibration_record(stage: Stage, accepted: list[Accepted], bundle: Path) -> Calibration:
    """Calibrate every variant; a learned score's weights go into the variant's folder of the bundle.

    Raises:
        TooFewSamplesError: The data cannot support the operating point.
        InputError: The learned score has too few rows to be trained on.
        ScoreWorseError: It clearly loses against the largest probability.
    """
    section, model = stage.recipe.calibration, stage.recipe.model
    costs = class_costs(section.class_costs, model.labels)
    learned = _Deferral(stage) if section.score == "learned" else None
    variants: dict[str, VariantCalibration] = {}
    for entry in accepted:
        stage.shop.advance(f"calibrate {entry.candidate.id}", 0, 1)
        light = learned.calibration_outputs(entry) if learned else {stage.output: _logits(entry)}
        head = learned.train(entry, light, bundle / "variants" / entry.candidate.id / HEAD) if learned else None
        wish = Wish(
            section.point,
            score=section.score,
            costs=costs,
            fusion="auto" if section.fusion and len(stage.heavy.outputs) == 1 else "off",
            features=section.features,
            head=head,
        )
        answers = Answers(light, stage.heavy_answers, stage.data.labels, stage.output, section.read_as)
        variants[entry.candidate.id] = calibrate(answers, wish)
        stage.shop.advance(f"calibrate {entry.candidate.id}", 1, 1)
    return Calibration(
        model=model.name,
        version=model.version,
        score=section.score,
        output=stage.output,
        decoding=section.read_as,
        features=section.features,
        costs=costs,
        seed=SEED,
        operating_point=section.point,
        data=CalibrationData(sha256=stage.data.sha256, samples=len(stage.data), fitted=len(divide(len(stage.data))[0])),
        heavy_accuracy=measure("accuracy", stage.heavy_answers, stage.data.labels, section.read_as),
        variants=variants,
    )


def class_costs(costs: Mapping[str, float], labels: tuple[str, ...]) -> tuple[float, ...]:
    """Return the cost of a wrong answer by class; classes that are not named cost 1.

    Raises:
        InputError: A class is named that there is not.
    """
    if not costs:
        return ()
    unknown = sorted(costs.keys() - set(labels))
    if unknown:
        raise InputError(
            f"calibration.class_costs: no class {unknown[0]!r}",
            hint=f"expected labels of the model: {', '.join(labels[:20]) or 'it has none, give model.labels'}",
        )
    return tuple(float(costs.get(label, 1.0)) for label in labels)


class ScoreWorseError(VerificationError):
    """The learned score clearly loses against one that needs no training."""

    reason = "score-worse"


class _Deferral:
    """Rows for the learned score, and what the heavy model says to them."""

    def __init__(self, stage: Stage) -> None:
        path = stage.recipe.data.deferral
        if path is None:
            raise InputError("calibration.score is learned: data.deferral is needed")  # the recipe was checked
        self._stage = stage
        classes = next(spec.shape[1] for spec in stage.light.outputs if spec.name == stage.output)
        self._data = load_labelled(path, stage.light, classes=classes)
        if len(self._data) < LEAST_ROWS:
            raise InputError(
                f"{path}: expected at least {LEAST_ROWS} rows for the learned score, got {len(self._data)}",
                hint="labelled rows that neither model was trained on; thousands are better",
            )
        if self._data.sha256 == stage.data.sha256:
            raise InputError(
                "data.deferral and data.calibration are the same file",
                hint="a score is trained on rows that have no say in its threshold",
            )
        self._heavy = heavy_logits(
            stage.heavy, self._data, stage.output, stage.shop.cache,
            partial(stage.shop.advance, "heavy model on deferral data"), threads=stage.shop.budget.cores,
        )  # fmt: skip

    def calibration_outputs(self, entry: Accepted) -> Mapping[str, Array]:
        """Return a variant's outputs for the calibration data."""
        return self._outputs(entry, self._stage.data)

    def train(self, entry: Accepted, calibration: Mapping[str, Array], path: Path) -> Path:
        """Train the score of one variant, and write its weights to `path`."""
        stage, section = self._stage, self._stage.recipe.calibration
        fit, _ = divide(len(stage.data))
        temperature = choose_temperature(calibration[stage.output][fit], stage.data.labels[fit])
        outputs = self._outputs(entry, self._data)
        rows, _ = deferral_features(outputs, stage.output, section.features, temperature)
        labels = self._data.labels
        target = deferral_target(
            section.point.kind, correct(outputs[stage.output], labels), correct(self._heavy, labels)
        )
        train_head(rows, target, path, seed=SEED)
        options = ScoreOptions(stage.output, temperature, features=section.features, head=path)
        learned, plain = (open_score(name, options)(calibration) for name in ("learned", "max_probability"))
        self._check_not_worse(learned, plain, correct(calibration[stage.output], stage.data.labels))
        return path

    def _check_not_worse(self, learned: Floats, plain: Floats, light: Flags) -> None:
        """Check, on the calibration rows, that training the score was not in vain.

        Rows that it was trained on, or rows of the same users or machines, would flatter it. What lies within the noise
        of so few rows (paired bootstrap) passes: the data cannot tell.
        """
        heavy = correct(self._stage.heavy_answers, self._stage.data.labels)
        kind = self._stage.recipe.calibration.point.kind

        def worth(scores: Floats, at: NDArray[np.int64] | slice) -> float:
            if kind == "max_risk":
                return -area_under_risk(scores[at], light[at])
            return mean_accuracy(scores[at], light[at], heavy[at])

        gains = [worth(learned, rows) - worth(plain, rows) for rows in draws(len(light), _DRAWS, SEED)]
        if np.quantile(gains, _SURE) < 0.0:
            what = "AURC" if kind == "max_risk" else "mean accuracy up to half of the requests escalated"
            ours, theirs = (abs(worth(scores, slice(None))) for scores in (learned, plain))
            raise ScoreWorseError(
                f"the learned score is worse than max_probability on the {len(light)} calibration samples: "
                f"{what} {ours:.4f} against {theirs:.4f}",
                hint="give more rows as data.deferral, or leave calibration.score at max_probability",
            )

    def _outputs(self, entry: Accepted, data: LabelledSamples) -> Mapping[str, Array]:
        stage, candidate = self._stage, entry.candidate
        if candidate.runs_here:
            target, file, tools = candidate.target_name, entry.entry, candidate.target.tools
        else:
            target, file = "onnxruntime", stage.light.path
            tools = load_target(target, role="light").tools
        return stage.shop.answers(target, file, stage.light, data, tools=tools, name=candidate.id, batch=BATCH)


def _logits(entry: Accepted) -> Logits:
    if entry.logits is None:
        raise BundleError(f"{entry.candidate.id}: no logits to calibrate with")
    return np.asarray(entry.logits)
