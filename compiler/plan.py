"""What a recipe asks for, checked before any work is done: variants with their targets, and digests of all inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from compiler.cache import Cache, code_digest, key, tool_versions
from compiler.ladder import Candidate
from compiler.package import read_archive
from compiler.recipe import Recipe, VariantSection, load_recipe
from compiler.sources import digest
from compiler.targets import TARGETS, Target, Tuning, load_target
from compiler.workshop import CAPTURE_TOOLS
from isthmus.bundle import INT8, MANIFEST, Ceilings, Manifest, open_bundle
from isthmus.digests import sha256_file
from isthmus.errors import InputError, MissingExtraError

ALL: Final = "all"  # as a variant's target: every target and precision that is installed here
_BUNDLE: Final = "bundle"  # an unpacked archive, in its entry of the cache


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be compiled from what."""

    recipe: Recipe
    recipe_sha256: str
    candidates: tuple[Candidate, ...]
    sources: Mapping[str, str]  # digests by what they are of
    previous: tuple[Path, Manifest] | None  # the bundle that devices have now
    key: str  # the digest of everything that the bundle depends on


def make_plan(recipe_path: Path, output: Path, *, cores: int, cache: Cache, delta_from: Path | None = None) -> Plan:
    """Return the plan of a recipe.

    Args:
        recipe_path: The TOML file.
        output: Where the bundle goes.
        cores: How many cores measurements use.
        cache: Where an archive of the version before is unpacked.
        delta_from: The bundle of the version before, instead of the recipe's; a folder or an archive.

    Raises:
        InputError: The recipe is wrong, or a file that it names cannot be read.
        BundleError: The version before is not a whole bundle.
        MissingExtraError: The library of a target or source is not installed.
    """
    recipe, recipe_sha256 = load_recipe(recipe_path)
    candidates = _candidates(recipe)
    heavy = load_target(recipe.heavy.target, role="heavy")
    if recipe.heavy.precision not in heavy.precisions:
        raise InputError(
            f"target {recipe.heavy.target!r} has no precision {recipe.heavy.precision!r}; "
            f"it has {', '.join(heavy.precisions)}",
            hint="mend heavy.precision in the recipe",
        )
    previous = _previous(recipe, delta_from or recipe.update.delta_from, output, cache)
    sources = _digests(recipe, previous)
    tools = [tool for target in (heavy, *(candidate.target for candidate in candidates)) for tool in target.tools]
    whole = key(
        recipe=recipe_sha256,
        labels=recipe.model.labels,  # they may come from a file of their own
        sources=sources,
        variants=[candidate.id for candidate in candidates],
        tools=tool_versions([*tools, *CAPTURE_TOOLS, "numpy"]),
        code=code_digest(),
        cores=cores if recipe.measure.enabled else 0,
    )
    return Plan(recipe, recipe_sha256, candidates, sources, previous, whole)


def _candidates(recipe: Recipe) -> tuple[Candidate, ...]:
    """Return the variants of the recipe, checked before any work is done for them."""
    found: dict[str, Candidate] = {}
    for section in recipe.variants:
        if section.target != ALL:
            candidate = _candidate(section, load_target(section.target, role="light"))
            found[candidate.id] = candidate
            continue
        for candidate in _everything(recipe, section):
            found.setdefault(candidate.id, candidate)
    return tuple(found.values())


def _everything(recipe: Recipe, section: VariantSection) -> Iterator[Candidate]:
    for name in [name for name, entry in TARGETS.items() if entry.role == "light"]:
        try:
            target = load_target(name, role="light")
        except MissingExtraError:
            continue
        for precision in target.precisions:
            if precision in INT8 and recipe.data.quantization is None:
                continue
            update = {"target": name, "precision": precision, "required": False}
            yield _candidate(section.model_copy(update=update), target)


def _candidate(section: VariantSection, target: Target) -> Candidate:
    if section.precision not in target.precisions:
        raise InputError(
            f"target {section.target!r} has no precision {section.precision!r}; it has {', '.join(target.precisions)}",
            hint="mend the recipe",
        )
    if section.platform and section.platform not in target.platforms:
        raise InputError(
            f"target {section.target!r} has no platform {section.platform!r}; it has {', '.join(target.platforms)}",
            hint="mend the recipe",
        )
    settings = target.settings(section.precision)
    if section.setting and section.setting not in settings:
        raise InputError(
            f"target {section.target!r} has no setting {section.setting!r} for {section.precision}; "
            f"it has {', '.join(settings)}",
            hint="mend the recipe, or leave the setting to the guard",
        )
    return Candidate(
        id=section.id,
        target_name=section.target,
        target=target,
        precision=section.precision,
        platform=section.platform or target.platforms[0],
        cpu=section.cpu,
        setting=section.setting,
        required=section.required,
        ceilings=_ceilings(section),
        tuning=Tuning(trials=section.tune_trials, seconds=section.tune_minutes * 60),
    )


def _previous(recipe: Recipe, path: Path | None, output: Path, cache: Cache) -> tuple[Path, Manifest] | None:
    if path is None:
        return None
    if path.resolve() == output.resolve():
        raise InputError(f"update.delta_from is the output itself: {output}", hint="give another --output")
    folder = path if not path.is_file() else cache.get("previous", sha256_file(path), partial(_unpack, path)) / _BUNDLE
    manifest = open_bundle(folder)
    if manifest.name != recipe.model.name or manifest.version >= recipe.model.version:
        raise InputError(
            f"update.delta_from: expected an older version of {recipe.model.name!r} than {recipe.model.version}, "
            f"got {manifest.name}@{manifest.version}",
            hint="name the bundle that devices have now",
        )
    return folder, manifest


def _unpack(archive: Path, place: Path) -> None:
    read_archive(archive, place / _BUNDLE)


def _digests(recipe: Recipe, previous: tuple[Path, Manifest] | None) -> dict[str, str]:
    sources = {
        "light": digest(recipe.light.source, recipe.light.options),
        "heavy": digest(recipe.heavy.source, recipe.heavy.options),
        "calibration": _file_digest(recipe.data.calibration),
    }
    if recipe.data.quantization is not None:
        sources["quantization"] = _file_digest(recipe.data.quantization)
    if recipe.data.deferral is not None:
        sources["deferral"] = _file_digest(recipe.data.deferral)
    if previous is not None:
        sources["delta_from"] = sha256_file(previous[0] / MANIFEST)
    return sources


def _file_digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}",
            hint="the paths under [data] name safetensors files",
        ) from error


def _ceilings(section: VariantSection) -> Ceilings | None:
    if section.max_latency_ms is None and section.max_memory_mb is None:
        return None
    memory = None if section.max_memory_mb is None else round(section.max_memory_mb * 1e6)
    return Ceilings(latency_ms=section.max_latency_ms, memory_bytes=memory)
