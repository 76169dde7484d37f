"""What an update would do, before it does anything: the variant to install and the files to bring. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from isthmus.bundle import FileEntry, Manifest, Variant
from isthmus.errors import BundleError


@dataclass(frozen=True, slots=True)
class FilePlan:
    """What is wanted at `path`, and the installed file of the same name, if any."""

    path: str
    wanted: FileEntry
    base: FileEntry | None


def plan_files(wanted: Mapping[str, FileEntry], installed: Mapping[str, FileEntry]) -> tuple[FilePlan, ...]:
    """Return what to bring, small files first."""
    plans = [FilePlan(path, entry, installed.get(path)) for path, entry in wanted.items()]
    return tuple(sorted(plans, key=lambda plan: (plan.wanted.length, plan.path)))


def choose_variant(
    manifest: Manifest,
    configured: str | None,
    *,
    machine: str,
    bfloat16: bool,
    installed: Callable[[str], bool],
) -> Variant:
    """Return the variant to install: the configured one, else the first whose runtime and platform fit.

    Args:
        manifest: Offers the variants, best first.
        configured: Id of the only acceptable variant, or None.
        machine: This machine's platform, for example "x86_64".
        bfloat16: Whether its processor computes in bfloat16.
        installed: Returns whether a runtime can be used here.

    Raises:
        BundleError: There is none.
    """
    fitting = [
        variant
        for variant in manifest.variants
        if installed(variant.runtime)
        and variant.platform in ("any", machine)
        and (bfloat16 or variant.inference_precision != "bf16")
    ]
    if configured is not None:
        fitting = [variant for variant in fitting if variant.id == configured]
    if not fitting:
        asked = f"variant {configured}" if configured else "a variant"
        offered = ", ".join(f"{v.id} ({v.runtime}, {v.platform})" for v in manifest.variants)
        processor = machine if bfloat16 else f"{machine} without bfloat16"
        raise BundleError(
            f"expected {asked} for {processor} and the installed runtimes, the bundle has {offered}",
            reason="no-fitting-variant",
        )
    return fitting[0]
