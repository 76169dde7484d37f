"""The fastest variant at the first install: all that fit are brought once, measured here, and one stays.

Only where the setting `choose_by = "install"` asks for it, because it costs the bytes of every variant that fits. A
device is measured when nothing was measured for its model on this hardware (edge.bench keeps what was), or when a
version no longer offers what was fastest. Otherwise an update brings one variant, as ever. The rules:

1. The variant that the bundle prefers is brought first; what is wrong with another one costs that one its part, and
   never the update.
2. Nothing is measured over a metered link, or where the disk has no room for all.
3. A measurement that kills the process is not repeated: the next start finds the mark of it, and keeps the bundle's own
   choice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import structlog

from edge.bench import Choice, Timing, hardware, measure_variants, read_choice, write_choice
from edge.plan import fits
from edge.runtimes import is_installed
from isthmus.bundle import Manifest, Variant
from isthmus.errors import IsthmusError
from isthmus.machine import computes_bfloat16, machine

_MARK: Final = ".measuring"

Measure = Callable[[Path], tuple[Manifest, Sequence[Timing]]]
log = structlog.get_logger(__name__)


class Audition:
    """Measures the variants of a model; `hold` and `others` block.

    Args:
        home: The device's folder, where choices are kept.
        model: The model's name.
        measure: Ranks the variants that a folder holds, fastest first.
        installed: Returns whether a runtime can be used here.
    """

    def __init__(
        self,
        home: Path,
        model: str,
        *,
        measure: Measure = measure_variants,
        installed: Callable[[str], bool] = is_installed,
    ) -> None:
        self._home = home
        self._model = model
        self._measure = measure
        self._installed = installed

    def others(self, manifest: Manifest, first: Variant) -> list[Variant]:
        """Return the variants to bring beside the first one; none when there is nothing to measure."""
        fitting = [
            variant
            for variant in manifest.variants
            if not fits(variant, machine=machine(), bfloat16=computes_bfloat16(), installed=self._installed)
        ]
        choice = read_choice(self._home, self._model)
        if choice is not None and choice.hardware == hardware() and choice.variant in {v.id for v in fitting}:
            return []
        return [variant for variant in fitting if variant.id != first.id]

    def hold(self, folder: Path, version: int, first: Variant) -> str:
        """Measure what a folder holds; return and keep the id of the fastest.

        Args:
            folder: A partial slot, with the files of several variants.
            version: Of the bundle.
            first: The variant that the bundle prefers; it stays when none can be measured.

        Raises:
            OSError: The disk cannot take the choice.
        """
        mark = folder / _MARK
        if mark.exists():
            log.warning("measuring variants ended this process before: not done again", model=self._model)
            mark.unlink()
            self._keep(Choice(variant=first.id, version=version, hardware=hardware()))
            return first.id
        mark.touch()
        try:
            _, timings = self._measure(folder)
        except IsthmusError as error:
            log.warning("variants cannot be measured", model=self._model, error=error.message)
            timings = ()
        mark.unlink()
        best = next((timing for timing in timings if timing.latency_ms is not None), None)
        if best is None:  # the self-test will say why
            return first.id
        for timing in timings:
            log.info("measured", model=self._model, variant=timing.variant, ms=timing.latency_ms, note=timing.note)
        self._keep(Choice(variant=best.variant, latency_ms=best.latency_ms, version=version, hardware=hardware()))
        return best.variant

    def _keep(self, choice: Choice) -> None:
        write_choice(self._home, self._model, choice)


def drop_others(folder: Path, variant: str) -> None:
    """Remove the files of other variants from a partial slot, and the mark of a measurement that was not finished."""
    (folder / _MARK).unlink(missing_ok=True)
    for path in (folder / "variants").iterdir():
        if path.name != variant:
            shutil.rmtree(path)
