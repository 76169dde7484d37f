"""The recipe: one TOML file that says what to compile, from which data, and what may not get worse.

Rules: unknown fields are refused; every error names the file and the field; paths are relative to the recipe's folder.
What the fields mean together (inputs, labels, data) is checked where the files are read, not here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compiler.evaluate import METRICS
from compiler.sources import SourceOptions, resolve
from compiler.targets import TARGETS, Serving
from isthmus.bundle import INT8, Name, OperatingPoint, Precision, Version
from isthmus.decoding import Decoding
from isthmus.digests import sha256_bytes
from isthmus.errors import InputError

MAX_RECIPE_BYTES: Final = 1 << 20
MAX_LABELS: Final = 65_536

_POINTS: Final[tuple[Literal["max_escalation", "max_risk", "target_accuracy"], ...]] = (
    "max_escalation", "max_risk", "target_accuracy"
)  # fmt: skip
_DEFAULT_ESCALATION: Final = 0.3

Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Cost = Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """What the bundle is called."""

    name: Name
    version: Version
    labels: tuple[str, ...] = Field(default=(), max_length=MAX_LABELS)
    labels_file: Path | None = None  # one label a line, instead of `labels`
    max_batch: int = Field(default=64, ge=1, le=65_536)

    @model_validator(mode="after")
    def _one_source_of_labels(self) -> ModelSection:
        if self.labels and self.labels_file is not None:
            raise ValueError("give labels or labels_file, not both")
        return self


class SourceSection(_Section):
    """A model, as it is after fine-tuning."""

    source: str = Field(min_length=1, max_length=4096)  # a file, a folder or an address, see compiler.sources
    task: str = ""
    adapter: Path | None = None
    lengths: dict[str, int | tuple[int, int]] = {}
    constants: dict[str, float | int] = {}
    outputs: tuple[str, ...] = ()
    factory: str = ""
    allow_pickle: bool = False

    @property
    def options(self) -> SourceOptions:
        """Return how the source is to be read."""
        return SourceOptions(
            task=self.task,
            adapter=self.adapter,
            lengths=self.lengths,
            constants=self.constants,
            outputs=self.outputs,
            factory=self.factory,
            allow_pickle=self.allow_pickle,
        )


class LightSection(SourceSection):
    """The model that devices run."""


class HeavySection(SourceSection):
    """The model that the cloud runs, and how Triton serves it."""

    target: Name = "triton-python"
    precision: Precision = "fp32"
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime"  # what Triton's Python backend runs
    instances: int = Field(default=1, ge=1, le=64)
    threads: int = Field(default=2, ge=1, le=256)  # of each instance
    max_queue_delay_us: int = Field(default=500, ge=0, le=10_000_000)
    preferred_batch: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = ()
    warm_up: bool = False
    response_cache: bool = False
    keep_versions: int = Field(default=0, ge=0, le=1000)
    gpus: tuple[Annotated[int, Field(ge=0, le=255)], ...] = ()

    @property
    def serving(self) -> Serving:
        """Return how Triton is to serve it."""
        names = ("instances", "threads", "max_queue_delay_us", "preferred_batch", "warm_up", "response_cache")
        rest = ("runtime", "keep_versions", "gpus")
        return Serving(**{name: getattr(self, name) for name in (*names, *rest)})


class VariantSection(_Section):
    """One artefact of the light model."""

    target: Name  # or "all": every target and precision that is installed here
    precision: Precision = "fp32"
    platform: Literal["", "x86_64", "aarch64"] = ""  # empty: the target's own choice
    cpu: str = Field(default="", max_length=64, pattern=r"^[A-Za-z0-9_.+,-]*$")  # least processor, for compiled code
    setting: str = Field(default="", max_length=64)  # empty: from the fastest on, until the guard is content
    required: bool = True  # False: left out, and reported, when it cannot be built or is worse than the guard allows
    max_latency_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # a device refuses what is slower
    max_memory_mb: float | None = Field(default=None, gt=0, le=1e6, allow_inf_nan=False)  # ... or takes more memory
    tune_trials: int = Field(default=0, ge=0, le=1_000_000)
    tune_minutes: float = Field(default=0, ge=0, le=100_000, allow_inf_nan=False)

    @property
    def id(self) -> str:
        """Return the variant's name in the bundle."""
        return "-".join(part for part in (self.target, self.precision, self.platform) if part)


class DataSection(_Section):
    """Safetensors files with tensors named as the model's inputs."""

    calibration: Path  # and the tensor "labels", int64
    quantization: Path | None = None  # needed for int8; with "labels" too, a target may control accuracy itself
    deferral: Path | None = None  # with "labels"; needed for the learned score: rows that no model was trained on


class GuardSection(_Section):
    """How much worse than the source a variant may be before it is refused."""

    metric: str = "accuracy"  # one of compiler.evaluate.METRICS
    max_accuracy_drop: Share = 0.02  # of the metric, for every precision but fp32
    max_difference: float = Field(default=1e-3, gt=0, allow_inf_nan=False)  # fp32: largest absolute one of any output

    @model_validator(mode="after")
    def _known_metric(self) -> GuardSection:
        if self.metric not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {self.metric!r}")
        return self


class CalibrationSection(_Section):
    """The operating point, one of three, with confidence 1 - `delta`, and the score that it is about."""

    max_escalation: Share | None = None  # at most this share of all requests goes up; 0.3 when nothing is asked for
    max_risk: Share | None = None  # at most this share of the edge's own answers is wrong
    target_accuracy: Share | None = None  # at least this share of all answers is right
    delta: float = Field(default=0.1, gt=0, lt=1, allow_inf_nan=False)
    output: str = ""  # the output with one logit per class or token; empty: "logits", or the only one there is
    score: Literal["max_probability", "margin", "entropy", "energy", "learned", "sequence"] = "max_probability"
    decoding: Decoding = ""  # of sequences: "ctc" when empty, or "tokens"
    features: str = ""  # a further output of the light model, for the learned score
    class_costs: dict[str, Cost] = {}  # of a wrong answer, by label; 1 for all others
    fusion: bool = True  # let both models answer escalated requests, where that wins on the calibration data

    @model_validator(mode="after")
    def _one_point(self) -> CalibrationSection:
        asked = [name for name in _POINTS if getattr(self, name) is not None]
        if len(asked) > 1:
            raise ValueError(f"give one of {', '.join(_POINTS)}, not {' and '.join(asked)}")
        if self.features and self.score != "learned":
            raise ValueError(f"features are read by the learned score only, and score is {self.score!r}")
        if self.score != "sequence" and self.decoding:
            raise ValueError(f"decoding is how sequences are read, and score is {self.score!r}")
        if self.score == "sequence" and self.class_costs:
            raise ValueError("class_costs are of classes, and score is 'sequence'")
        return self

    @field_validator("score", mode="before")
    @classmethod
    def _no_detections(cls, score: object) -> object:
        if score == "detection":
            raise ValueError(
                "'detection' cannot be calibrated: what a right answer is (which boxes must be found, how well) "
                "is not defined by labels that are read here; use the score in a policy of your own"
            )
        return score

    @property
    def read_as(self) -> Decoding:
        """Return how the output is read."""
        return (self.decoding or "ctc") if self.score == "sequence" else ""

    @property
    def point(self) -> OperatingPoint:
        """Return what is asked for."""
        for name in _POINTS:
            value = getattr(self, name)
            if value is not None:
                return OperatingPoint(kind=name, value=value, delta=self.delta)
        return OperatingPoint(value=_DEFAULT_ESCALATION, delta=self.delta)


class MeasureSection(_Section):
    """What is measured of each variant: times and memory differ from build to build, so report.json then does, too."""

    enabled: bool = True
    seconds: float = Field(default=0.5, gt=0, le=60, allow_inf_nan=False)  # for each number of threads


class UpdateSection(_Section):
    """The version that devices have now, so that the way to this one can be short."""

    delta_from: Path | None = None


class Recipe(_Section):
    """A whole recipe, paths made absolute."""

    model: ModelSection
    light: LightSection
    heavy: HeavySection
    variants: tuple[VariantSection, ...] = Field(min_length=1, max_length=32)
    data: DataSection
    guard: GuardSection = GuardSection()
    calibration: CalibrationSection = CalibrationSection()
    measure: MeasureSection = MeasureSection()
    update: UpdateSection = UpdateSection()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        ids = [variant.id for variant in self.variants]
        if len(set(ids)) != len(ids):
            raise ValueError(f"variants must differ, got {', '.join(ids)}")
        if any(variant.precision in INT8 for variant in self.variants) and self.data.quantization is None:
            raise ValueError("data.quantization is needed, for a variant has precision int8")
        if self.heavy.precision in INT8 and self.data.quantization is None:
            raise ValueError("data.quantization is needed, for heavy.precision is int8")
        if self.calibration.score == "learned" and self.data.deferral is None:
            raise ValueError("data.deferral is needed, for calibration.score is learned")
        if self.calibration.score == "sequence" and self.guard.metric != "accuracy":
            raise ValueError(
                f"guard.metric {self.guard.metric!r} is of classes; sequences are right or wrong: 'accuracy'"
            )
        roles = {name: entry.role for name, entry in TARGETS.items()}
        heavy = [variant.target for variant in self.variants if roles.get(variant.target) == "heavy"]
        if heavy:
            raise ValueError(f"target {heavy[0]!r} is for the heavy model: name it as heavy.target, not as a variant")
        return self


_Source = TypeVar("_Source", bound=SourceSection)

_SECTIONS: Final[Mapping[str, type[BaseModel]]] = {
    "model": ModelSection,
    "light": LightSection,
    "heavy": HeavySection,
    "variants": VariantSection,
    "data": DataSection,
    "guard": GuardSection,
    "calibration": CalibrationSection,
    "measure": MeasureSection,
    "update": UpdateSection,
}
_NEEDED: Final = (
    "model.name", "model.version", "light.source", "heavy.source", "[[variants]] with a target", "data.calibration"
)  # fmt: skip


def load_recipe(path: Path) -> tuple[Recipe, str]:
    """Return the recipe in `path` with absolute paths and labels read, and the SHA-256 of the file.

    Raises:
        InputError: It cannot be read, is not TOML, or a field is missing, unknown or out of range.
    """
    data = _read(path, MAX_RECIPE_BYTES)
    try:
        document = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not a TOML document: {error}", hint="mend the recipe") from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply for a recipe") from error
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise _explained(path, error) from error
    return _resolve(recipe, path.resolve().parent), sha256_bytes(data)


def _explained(path: Path, error: ValidationError) -> InputError:
    """Return what is wrong first; an unknown field before the one that is missing because it is misspelt."""
    found = error.errors(include_url=False)
    first = min(found, key=lambda one: one["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"]) or "recipe"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = _fields_of(first["loc"][:-1])
        close = get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return InputError(f"{path}: {where}: there is no such field", hint=hint)
    if first["type"] == "missing":
        return InputError(f"{path}: {where} is missing", hint=f"every recipe needs {', '.join(_NEEDED)}")
    if first["type"] == "value_error":  # of a section as a whole
        return InputError(f"{path}: {where}: {message}", hint="mend the recipe")
    got = repr(first["input"])
    return InputError(
        f"{path}: {where}: {message}, got {got if len(got) <= 80 else got[:77] + '...'}",
        hint="mend the recipe",
    )


def _fields_of(where: Sequence[int | str]) -> list[str]:
    """Return the fields of the section at this place of a recipe."""
    section: type[BaseModel] = Recipe
    for part in where:
        if isinstance(part, str):
            section = _SECTIONS[part]
    return list(section.model_fields)


def _resolve(recipe: Recipe, folder: Path) -> Recipe:
    delta_from = recipe.update.delta_from
    paths = {name: folder / path for name, path in recipe.data if path is not None}
    data = recipe.data.model_copy(update=paths)
    return recipe.model_copy(
        update={
            "model": _with_labels(recipe.model, folder),
            "light": _from(recipe.light, folder),
            "heavy": _from(recipe.heavy, folder),
            "data": data,
            "update": UpdateSection(delta_from=None if delta_from is None else folder / delta_from),
        }
    )


def _from(section: _Source, folder: Path) -> _Source:
    """Return the section with its paths taken from the recipe's folder."""
    adapter = None if section.adapter is None else folder / section.adapter
    return section.model_copy(update={"source": resolve(section.source, folder), "adapter": adapter})


def _with_labels(model: ModelSection, folder: Path) -> ModelSection:
    if model.labels_file is None:
        return model
    path = folder / model.labels_file
    try:
        labels = tuple(_read(path, MAX_RECIPE_BYTES).decode().splitlines())
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: labels must be UTF-8 text") from error
    if not 0 < len(labels) <= MAX_LABELS or not all(labels):
        raise InputError(
            f"{path}: expected 1 to {MAX_LABELS} labels, one a line and none empty, got {len(labels)} lines"
        )
    return model.model_copy(update={"labels": labels, "labels_file": None})


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}", hint="paths in a recipe are relative to its folder"
        ) from error
    if len(data) > limit:
        raise InputError(f"{path}: expected at most {limit} bytes")
    return data
