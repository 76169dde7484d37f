"""The bundle: what the compiler makes, operators publish and devices install.

A folder with these entries, and no pickle. TVM variants are machine code: signed like all the rest.

    manifest.json            this module's `Manifest`; names every other file with its SHA-256 and length
    variants/<id>/...        the light model, one folder for each (runtime, precision, platform)
    heavy/...                a Triton model version folder for the heavy model, and its config.pbtxt
    calibration.json         `Calibration`: how scores become routes, for this version only
    calibration.png          the same as a picture, for people
    golden.safetensors       inputs ("input.<name>") and each variant's outputs ("output.<variant id>.<name>")
    report.json              what the compiler measured (parity, accuracy, latency, size for each variant)

Same source, recipe and tool versions give the same bytes, but for the files listed under `varies` in the manifest
(times that were measured, tools that do not allow it): there is no time stamp and JSON is canonical (`to_json`).
Trust comes from outside: signed metadata vouches for manifest.json, and manifest.json for everything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from isthmus.decoding import Decoding
from isthmus.digests import check_file, sha256_bytes, sha256_file, tree_digest
from isthmus.errors import BundleError, VerificationError

MANIFEST: Final = "manifest.json"
CALIBRATION: Final = "calibration.json"
GOLDEN: Final = "golden.safetensors"
PICTURE: Final = "calibration.png"
REPORT: Final = "report.json"
MAX_MANIFEST_BYTES: Final = 4 << 20
MAX_FILES: Final = 10_000

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}")


def check_name(value: str) -> str:
    """Return `value` when it is a valid model, variant or device name (it becomes part of paths).

    Raises:
        ValueError: It is not.
    """
    if not _NAME.fullmatch(value) or ".." in value:
        raise ValueError(
            "expected a name of letters, digits, '.', '_' and '-' (64 at most, starting with a letter or digit), "
            f"got {value[:80]!r}"
        )
    return value


def _check_path(value: str) -> str:
    parts = value.split("/")
    if len(value) > 512 or any(not _PART.fullmatch(part) or ".." in part for part in parts):
        raise ValueError(f"expected a relative path of plain names, got {value[:120]!r}")
    return value


Name = Annotated[str, AfterValidator(check_name)]
RelativePath = Annotated[str, AfterValidator(_check_path)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Version = Annotated[int, Field(ge=1, le=2**53)]
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64"
]
Rate = Annotated[float, Field(ge=0.0, le=1.0)]
# Of weights and activations; a "w" at the end: of the weights only, computed in float; "-bf16": what is not quantized
# computes in bfloat16.
Precision = Literal["fp32", "bf16", "fp16", "int8", "int8-bf16", "int4", "int8w", "int4w"]
INT8: Final = frozenset({"int8", "int8-bf16"})  # whose activations are quantized, with ranges from samples
BFLOAT16: Final = frozenset({"bf16", "int8-bf16"})  # which need a processor that computes in it
_T = TypeVar("_T", bound=BaseModel)


class _Strict(BaseModel):
    # NaN and infinity would pass every comparison with a threshold or tolerance, or none.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def to_json(self) -> bytes:
        """Return canonical JSON: fixed key order, two spaces, UTF-8, one newline at the end."""
        return self.model_dump_json(indent=2).encode() + b"\n"


class TensorSpec(_Strict):
    """Name, OIP datatype and shape of one input or output; -1 is an axis that may vary: the batch, or a length."""

    name: str = Field(min_length=1, max_length=256)
    datatype: Datatype
    shape: tuple[int, ...] = Field(max_length=16)

    @model_validator(mode="after")
    def _positive_or_symbolic(self) -> TensorSpec:
        if any(axis < 1 and axis != -1 for axis in self.shape):
            raise ValueError(f"{self.name}: expected axes of at least 1, or -1, got {list(self.shape)}")
        return self


class FileEntry(_Strict):
    """Digest and length of one file."""

    sha256: Sha256
    length: int = Field(ge=0, le=1 << 40)  # bytes


class Ceilings(_Strict):
    """What a variant may take on a device before it is refused there."""

    latency_ms: float | None = Field(default=None, gt=0)  # batch 1, median
    memory_bytes: int | None = Field(default=None, gt=0)  # that opening and running it adds to the agent's process


class Variant(_Strict):
    """One artefact of the light model for one runtime, precision and platform."""

    id: Name
    runtime: Name  # a key of edge.runtimes.RUNTIMES
    precision: Precision
    platform: Literal["any", "x86_64", "aarch64"] = "any"
    entry: RelativePath  # the file that the runtime opens
    inference_precision: Literal["f32", "bf16", "f16"] = "f32"  # the hint that it was verified with
    tolerance: float = Field(gt=0.0)  # largest absolute difference from the golden outputs on another machine
    verified: Literal["compiler", "device"] = "compiler"  # "device": it could not run where it was built
    accuracy: Rate | None = None
    latency_ms: float | None = Field(default=None, gt=0)  # batch 1, one thread, median on the compiling machine
    ceilings: Ceilings | None = None


class Heavy(_Strict):
    """The heavy model as a Triton model folder below `heavy/`."""

    platform: Name  # "python" today: ONNX Runtime in Triton's Python backend
    digest: Sha256  # of the whole folder; equal digests share one Triton version
    accuracy: Rate | None = None


class Provenance(_Strict):
    """What the bundle was made from and with."""

    sources: dict[str, Sha256]
    recipe: Sha256
    tools: dict[str, str]


class Manifest(_Strict):
    """The bundle's table of contents; trusted once signed metadata vouches for its digest."""

    schema_version: Literal[1] = 1
    name: Name
    version: Version
    labels: tuple[str, ...] = ()
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    features: tuple[TensorSpec, ...] = ()  # further outputs of the light model, which only the score reads
    max_batch: int = Field(default=64, ge=1, le=65536)
    max_length: int = Field(default=65536, ge=1, le=1 << 24)  # of every other axis that may vary
    variants: tuple[Variant, ...] = Field(min_length=1)
    heavy: Heavy
    provenance: Provenance
    varies: dict[RelativePath, str] = {}  # files that another build of the same may make otherwise, and why
    files: dict[RelativePath, FileEntry] = Field(min_length=1, max_length=MAX_FILES)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        ids = [variant.id for variant in self.variants]
        if len(set(ids)) != len(ids):
            raise ValueError(f"variant ids must differ, got {ids}")
        required = [CALIBRATION, GOLDEN, *(variant.entry for variant in self.variants)]
        missing = [path for path in (*required, *self.varies) if path not in self.files]
        if missing:
            raise ValueError(f"files lack {', '.join(missing)}")
        if MANIFEST in self.files:
            raise ValueError(f"files must not list {MANIFEST} itself")
        for variant in self.variants:
            if not variant.entry.startswith(f"variants/{variant.id}/"):
                raise ValueError(
                    f"entry of variant {variant.id} must lie in variants/{variant.id}/, got {variant.entry}"
                )
        heavy = tree_digest({path: entry.sha256 for path, entry in self.files_below("heavy/")})
        if heavy != self.heavy.digest:
            raise ValueError(f"heavy.digest is {self.heavy.digest}, its files give {heavy}")
        return self

    def files_below(self, prefix: str) -> Iterator[tuple[str, FileEntry]]:
        """Yield (path, entry) of the files whose path starts with `prefix`, in order."""
        for path in sorted(self.files):
            if path.startswith(prefix):
                yield path, self.files[path]

    def variant(self, variant_id: str) -> Variant:
        """Return the variant with this id.

        Raises:
            BundleError: There is none; the message lists those there are.
        """
        for variant in self.variants:
            if variant.id == variant_id:
                return variant
        raise BundleError(f"no variant {variant_id!r}; the bundle has {', '.join(v.id for v in self.variants)}")

    def device_files(self, variant_id: str) -> dict[str, FileEntry]:
        """Return the files that a device with this variant needs: variant, calibration, golden answers."""
        variant = self.variant(variant_id)
        wanted = dict(self.files_below(f"variants/{variant.id}/"))
        return wanted | {path: self.files[path] for path in (CALIBRATION, GOLDEN)}


class CurvePoint(_Strict):
    """What one threshold does to the calibration data; 1 - `escalation_rate` is the coverage of its risk."""

    threshold: float
    escalation_rate: Rate
    accuracy: Rate  # of the routed whole
    risk: Rate | None = None  # share of errors among the answers that stay on the edge; None when none stays


class GainStep(_Strict):
    """From this score on, what escalating adds to the chance of being right (it falls as the score rises)."""

    score: float
    gain: float


class Fusion(_Strict):
    """An escalated request is answered by both models: a weighted mean of their log-probabilities."""

    light_weight: float = Field(gt=0.0, lt=1.0)  # the rest is the heavy model's
    gain: float  # what it added to the accuracy of all rows of the calibration data, were they all escalated


class VariantCalibration(_Strict):
    """Scores and threshold of one compiled variant, measured on held-out data together with the heavy model."""

    temperature: float = Field(gt=0)  # divides the logits before the softmax
    threshold: float  # a score below it escalates
    class_thresholds: tuple[float, ...] = ()  # what it amounts to for each class, where errors have costs
    bound: Rate | None = None  # what holds with confidence 1 - delta: the rate, the risk or the accuracy asked for
    samples: int = Field(default=0, ge=0)  # that had a say in the threshold
    escalation_rate: Rate
    accuracy: Rate  # of the routed whole
    edge_accuracy: Rate
    agreement: Rate  # light and heavy give the same label
    edge_agreement: Rate | None = None  # the same among the answers that stay on the edge
    mends: Rate | None = None  # rows that are wrong on the edge and right in the cloud
    spoils: Rate | None = None  # rows that are right on the edge and wrong in the cloud
    ece_before: Rate  # expected calibration error, 15 bins, at temperature 1
    ece_after: Rate
    aurc: float | None = Field(default=None, ge=0)  # area under the risk-coverage curve; less is better
    scores: tuple[float, ...] = Field(default=(), max_length=101)  # quantiles 0, 1, ... 100 %
    gains: tuple[GainStep, ...] = Field(default=(), max_length=256)
    fusion: Fusion | None = None
    curve: tuple[CurvePoint, ...] = Field(min_length=1)


class OperatingPoint(_Strict):
    """What the operator asked for.

    `max_escalation`: at most this share of requests goes up. `max_risk`: at most this share of the answers that stay on
    the edge is wrong. `target_accuracy`: at least this share of all answers is right.
    """

    kind: Literal["max_escalation", "max_risk", "target_accuracy"] = "max_escalation"
    value: Rate
    delta: float = Field(gt=0, lt=1)  # chance, over the drawing of the data, that it does not hold


class CalibrationData(_Strict):
    """Which data the record was measured on."""

    sha256: Sha256
    samples: int = Field(ge=1)
    fitted: int = Field(default=0, ge=0)  # of them, those for the temperature; the others choose the threshold


class Calibration(_Strict):
    """How scores become routes. It belongs to one bundle version and is never used with another."""

    schema_version: Literal[1] = 1
    model: Name
    version: Version
    score: Literal["max_probability", "margin", "entropy", "energy", "learned", "sequence", "detection"] = (
        "max_probability"  # a key of isthmus.scores.SCORES
    )
    output: str = "logits"  # the output that the score is taken from
    decoding: Decoding = ""  # how that output is read, where it is no class per row
    features: str = ""  # the output with features for the learned score
    costs: tuple[Annotated[float, Field(gt=0)], ...] = ()  # of a wrong answer, by class; empty: all alike
    seed: int = 0  # of everything that was drawn
    operating_point: OperatingPoint
    data: CalibrationData
    heavy_accuracy: Rate
    variants: dict[Name, VariantCalibration] = Field(min_length=1)

    @model_serializer(mode="wrap")
    def _told(self, told: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not said: records of classes keep their bytes, and so their ids."""
        return {key: value for key, value in told(self).items() if key != "decoding" or value}

    @property
    def id(self) -> str:
        """Return the short digest that answers carry as `isthmus.calibration`."""
        return sha256_bytes(self.to_json())[:16]


def parse_manifest(data: bytes) -> Manifest:
    """Return the manifest in `data`.

    Raises:
        BundleError: It is too large, not JSON, or breaks the schema; the message names the first offending field.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST}: expected at most {MAX_MANIFEST_BYTES} bytes, got {len(data)}")
    return _parse(Manifest, data, MANIFEST)


def parse_calibration(data: bytes) -> Calibration:
    """Return the calibration record in `data`.

    Raises:
        BundleError: It is not JSON or breaks the schema.
    """
    return _parse(Calibration, data, CALIBRATION)


def check_calibration(manifest: Manifest, variant: Variant, calibration: Calibration) -> None:
    """Check that the record belongs to this bundle version, covers the variant, and reads what the model gives.

    Raises:
        VerificationError: It does not.
    """
    mine, theirs = f"{manifest.name}@{manifest.version}", f"{calibration.model}@{calibration.version}"
    output = next((spec for spec in manifest.outputs if spec.name == calibration.output), None)
    wrong = ""
    if mine != theirs:
        wrong = f"expected one for {mine}, got {theirs}"
    elif variant.id not in calibration.variants:
        wrong = f"no entry for variant {variant.id}"
    elif output is None:
        wrong = f"no output {calibration.output!r} in {mine}"
    elif calibration.features and calibration.features not in {spec.name for spec in manifest.features}:
        wrong = f"no features {calibration.features!r} in {mine}"
    elif calibration.costs and output.shape[-1:] != (len(calibration.costs),):
        wrong = f"{len(calibration.costs)} costs for output {output.name!r} of shape {list(output.shape)}"
    if wrong:
        raise VerificationError(f"calibration record: {wrong}", reason="calibration-mismatch")


def _parse(model: type[_T], data: bytes, what: str) -> _T:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise BundleError(f"{what}: {where}: {first['msg'].removeprefix('Value error, ')}") from error


def open_bundle(folder: Path, *, verify: bool = True) -> Manifest:
    """Return the manifest of the bundle in `folder`, after checking every file against it.

    Raises:
        BundleError: There is no manifest, it is malformed, or the folder holds a file that it does not name.
        DigestMismatchError: A file is not the one that the manifest names.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}", hint="isthmus compile RECIPE makes one")
    manifest = parse_manifest(path.read_bytes())
    present = {PurePosixPath(p.relative_to(folder)).as_posix() for p in folder.rglob("*") if p.is_file()}
    missing = sorted(set(manifest.files) - present)
    surplus = sorted(present - set(manifest.files) - {MANIFEST})
    if missing or surplus:
        raise BundleError(
            f"{folder}: files missing: {missing[:3] or 'none'}; files not in the manifest: {surplus[:3] or 'none'}"
        )
    if verify:
        for name, entry in manifest.files.items():
            check_file(folder / name, sha256=entry.sha256, length=entry.length, what=name)
    return manifest


def index_files(folder: Path) -> dict[str, FileEntry]:
    """Return the entry of every file below `folder` except the manifest, by relative path, in order."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {p.relative_to(folder).as_posix(): FileEntry(sha256=sha256_file(p), length=p.stat().st_size) for p in paths}
