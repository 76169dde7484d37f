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


def fits(variant: Variant, *, machine: str, bfloat16: bool, installed: Callable[[str], bool]) -> str:
    """Return why this machine cannot run a variant, or nothing when it can; arguments as for `choose_variant`."""
    if not installed(variant.runtime):
        return f"runtime {variant.runtime} is not installed"
    if variant.platform not in ("any", machine):
        return f"it is for {variant.platform}, this is {machine}"
    if variant.inference_precision == "bf16" and not bfloat16:
        return "this processor does not compute in bfloat16"
    return ""


def choose_variant(
    manifest: Manifest,
    configured: str | None,
    *,
    machine: str,
    bfloat16: bool,
    installed: Callable[[str], bool],
    preferred: str | None = None,
) -> Variant:
    """Return the variant to install: the configured one, else the preferred, else the first that fits this machine.

    Args:
        manifest: Offers the variants, best first.
        configured: Id of the only acceptable variant, or None.
        machine: This machine's platform, for example "x86_64".
        bfloat16: Whether its processor computes in bfloat16.
        installed: Returns whether a runtime can be used here.
        preferred: Id of the variant that was fastest here, or None; it may be missing.

    Raises:
        BundleError: There is none.
    """
    fitting = [
        variant
        for variant in manifest.variants
        if not fits(variant, machine=machine, bfloat16=bfloat16, installed=installed)
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
    return next((variant for variant in fitting if variant.id == preferred), fitting[0])
